"""``llmctl convert`` as it is typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llmctl.checkpoint.opening import open_checkpoint
from llmctl.cli.main import app
from llmctl.config import QuantizeConfig


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from random_models import write_model

    from llmctl.quantize.driver import quantize_checkpoint

    root = tmp_path_factory.mktemp("model")
    model = write_model(root / "dense", "llama", num_hidden_layers=1)
    config = QuantizeConfig(str(model), str(root / "awq"), method="rtn", format="awq", group_size=32, symmetric=True)
    quantize_checkpoint(config)
    return root / "awq"


def convert(*args: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["convert", *args])
    return result.exit_code, result.stdout, result.stderr


def test_a_report_for_people(quantized: Path, tmp_path: Path) -> None:
    code, out, err = convert("--model", str(quantized), "--to", "gguf", "--output", str(tmp_path / "out.gguf"))
    assert code == 0
    assert err.splitlines()[-1].startswith("compared 100% (")
    for said in ("awq -> gguf", "7 of 4 bits, symmetric, groups of 32", "12 weights, read back: the same numbers"):
        assert said in out
    assert open_checkpoint(tmp_path / "out.gguf").quantization is not None


def test_a_report_for_programs(quantized: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {quantized}\nto: awq\noutput: {tmp_path / 'out'}\n")
    code, out, _ = convert("--config", str(recipe), "--to", "gptq", "--json")
    report = json.loads(out)
    assert (code, report["source"], report["format"], report["compared"]) == (0, "awq", "gptq", 12)
    assert report["schemes"] == {"4 bits, symmetric, groups of 32": 7}
    assert report["size_after"] == open_checkpoint(tmp_path / "out").nbytes


@pytest.mark.parametrize(
    ("to", "said"), [("exl2", "expected one of awq"), ("compressed-tensors-w8a8", "W8A8 has 8 bits"), ("", "--to")]
)
def test_a_refusal_is_one_line_and_exit_code_two(to: str, said: str, quantized: Path, tmp_path: Path) -> None:
    code, out, err = convert("--model", str(quantized), "--to", to, "--output", str(tmp_path / "out"))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err
    assert list(tmp_path.iterdir()) == []
