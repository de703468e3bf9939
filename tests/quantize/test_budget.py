import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from random_models import CALIBRATION_TEXT, CONFIGS, write_small_llama
from torch import Tensor
from typer.testing import CliRunner

from llmctl.checkpoint.opening import open_checkpoint
from llmctl.checkpoint.reader import Checkpoint
from llmctl.cli.main import app
from llmctl.config import QuantizeConfig
from llmctl.errors import UsageError
from llmctl.graph.families import build_graph
from llmctl.graph.graph import Graph
from llmctl.quantize import budget, driver
from llmctl.quantize.budget import linear_groups
from llmctl.quantize.driver import quantize_checkpoint
from llmctl.quantize.modules import select_modules
from llmctl.quantize.report import QuantizeReport
from llmctl.quantize.sensitivity import Candidate


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_llama(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture
def config(model: Path, tmp_path: Path) -> QuantizeConfig:
    text = tmp_path / "calib.txt"
    text.write_text(CALIBRATION_TEXT)
    return QuantizeConfig(
        model=str(model),
        output=str(tmp_path / "out"),
        method="rtn",
        group_size=32,
        target_bpw=5.0,
        calib=str(text),
        calib_samples=4,
        calib_length=32,
    )


def test_linears_of_one_input_are_a_group() -> None:
    graph = build_graph({**CONFIGS["llama"], "vocab_size": 97})
    groups = linear_groups(graph, select_modules(graph, ["lm_head"]))
    names = [[module.name.rpartition(".")[2] for module in group] for group in groups]
    assert names == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]] * 2


def bits_of(report: QuantizeReport) -> dict[str, int]:
    return {name: linear.bits for name, linear in report.linears.items()}


def test_more_bits_a_weight_are_spent_and_lose_less(config: QuantizeConfig) -> None:
    losses = []
    for target in (4.3, 5.0, 9.0, 20.0):
        report = quantize_checkpoint(replace(config, target_bpw=target, output=f"{config.output}-{target}"))
        assert report.bits_per_weight <= target
        assert report.predicted_kl is not None
        losses.append(report.predicted_kl)
        assert len({report.linears[f"model.layers.0.self_attn.{n}_proj"].bits for n in "qkv"}) == 1
        if 4.3 < target < 9:
            assert len(set(bits_of(report).values())) > 1
            assert report.bits_per_weight > 0.9 * target
    assert losses == sorted(losses, reverse=True)
    assert set(bits_of(report).values()) == {8}


@pytest.mark.parametrize("method", [pytest.param("awq", marks=pytest.mark.slow), "gptq"])
def test_every_method_keeps_to_a_budget(method: str, config: QuantizeConfig) -> None:
    report = quantize_checkpoint(replace(config, method=method))
    assert report.bits_per_weight <= 5.0
    assert report.format == ("gptq_v2" if method == "awq" else "gptq")
    made = open_checkpoint(Path(config.output))
    stored = {name: made.describe(f"{name}.weight").quant for name in report.linears}
    assert {name: scheme and scheme.bits for name, scheme in stored.items()} == bits_of(report)


@pytest.mark.parametrize("form", [pytest.param("auto", marks=pytest.mark.slow), "gguf"])
def test_a_size_is_kept(form: str, config: QuantizeConfig, tmp_path: Path) -> None:
    output = tmp_path / ("out.gguf" if form == "gguf" else "out")
    size = 170_000
    report = quantize_checkpoint(
        replace(config, target_bpw=None, target_size=str(size), format=form, output=str(output))
    )
    assert 0.85 * size < report.size_after <= size


def test_settled_bits_stay(config: QuantizeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Candidate] = []
    inner = budget.measure_sensitivity
    monkeypatch.setattr(
        budget, "measure_sensitivity", lambda one, found, *rest: seen.extend(found) or inner(one, found, *rest)
    )
    overrides = ("down_proj:bits=8", "layers.0.q_proj:bits=3")
    report = quantize_checkpoint(replace(config, target_bpw=5.1, override=overrides))
    bits = bits_of(report)
    assert 5.0 < report.bits_per_weight <= 5.1
    assert bits["model.layers.0.mlp.down_proj"] == bits["model.layers.1.mlp.down_proj"] == 8
    assert bits["model.layers.0.self_attn.q_proj"] == 3
    assert [c.schemes["layers.0.q_proj.weight"].bits for c in seen if "layers.0.q_proj.weight" in c.schemes] == [3, 3]
    assert [c.schemes["layers.0.k_proj.weight"].bits for c in seen if "layers.0.k_proj.weight" in c.schemes] == [3, 4]
    assert not any("down_proj" in name for c in seen for name in c.schemes)


def test_bits_that_the_format_does_not_have_are_not_chosen(config: QuantizeConfig) -> None:
    report = quantize_checkpoint(replace(config, format="compressed-tensors"))
    assert set(bits_of(report).values()) == {4, 8}


def test_what_was_chosen_is_kept_for_a_resumed_run(config: QuantizeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(config, method="gptq")
    whole = quantize_checkpoint(config)
    shutil.move(config.output, config.output + "-whole")

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(driver.WorkFolder, "save_layer", dies)
        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(config)
    monkeypatch.setattr(driver, "spend", dies)
    again = quantize_checkpoint(replace(config, resume=True))
    assert bits_of(again) == bits_of(whole)
    assert again.predicted_kl == whole.predicted_kl
    files = {p.name: p.read_bytes() for p in Path(config.output).iterdir()}
    assert files == {p.name: p.read_bytes() for p in Path(config.output + "-whole").iterdir()}


def test_only_as_much_text_is_measured_on_as_there_is_time_for(
    config: QuantizeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    inner = budget.LayerwisePass

    def spy(graph: Graph, source: Checkpoint, tokens: Tensor, device: str) -> budget.LayerwisePass:
        seen.append(tokens.numel())
        return inner(graph, source, tokens, device)

    monkeypatch.setattr(budget, "LayerwisePass", spy)
    monkeypatch.setattr(budget, "_MIN_TOKENS", 64)
    quantize_checkpoint(config)
    monkeypatch.setattr(budget, "_MAX_WORK", 1)
    quantize_checkpoint(replace(config, output=config.output + "-2"))
    monkeypatch.setattr(budget, "_MIN_TOKENS", 20)  # less than a sample
    quantize_checkpoint(replace(config, output=config.output + "-3"))
    assert seen == [128, 64, 20]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_bpw": 3.5}, "in no less than 4.00"),
        ({"target_bpw": None, "target_size": "1KiB"}, "in no less than 1..KiB"),
        ({"target_bpw": None, "target_size": "lots"}, "expected a size"),
        ({"target_size": "4GiB"}, "expected one of them"),
        ({"target_bpw": math.nan}, "--target-bpw nan: expected a finite number"),
        ({"bits": 4}, "--bits: those of each linear are chosen"),
        ({"target_bpw": -1.0}, "in no less than"),
        (
            {"format": "compressed-tensors", "target_bpw": 4.0},
            "compressed-tensors stores these linears in no less than 4.5",
        ),
        ({"format": "awq", "method": "awq"}, "found linears that differ"),
        ({"calib": "missing.txt"}, "no such file"),
    ],
    ids=str,
)
def test_refusals_leave_nothing_behind(
    changes: dict[str, object], message: str, config: QuantizeConfig, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        quantize_checkpoint(replace(config, **changes))  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["calib.txt"]


def test_the_command_says_which_bits(config: QuantizeConfig) -> None:
    args = ["quantize", "--model", config.model, "--output", config.output, "--method", "rtn", "--group-size", "32"]
    args += ["--target-bpw", "4.5", "--calib", config.calib, "--calib-samples", "4", "--calib-length", "32"]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.stderr
    assert "bits in each layer" in result.stdout
    assert "KL predicted" in result.stdout
    assert "rtn, 3/4 bits, group 32" in result.stdout
    assert "an engine for NVIDIA GPUs stores them as 4" in result.stderr
    assert "measuring what each linear's bits change 100%" in result.stderr


def test_json_has_every_linear(config: QuantizeConfig) -> None:
    data = json.loads(json.dumps(quantize_checkpoint(config).to_json()))
    assert data["linears"]["model.layers.0.mlp.up_proj"]["bits"] in (3, 4, 8)
    assert data["predicted_kl"] > 0
