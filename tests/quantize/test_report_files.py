"""The report beside a quantized model: its parts, its files, that it is the same for the same inputs."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from random_models import CONFIGS, write_model
from typer.testing import CliRunner

from llmctl.checkpoint.assemble import checkpoint_graph
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.cli.main import app
from llmctl.config import QuantizeConfig
from llmctl.quantize.driver import quantize_checkpoint
from llmctl.quantize.error_chart import error_chart
from llmctl.quantize.parts import part_sizes
from llmctl.quantize.report_files import write_report_files

SVG = "{http://www.w3.org/2000/svg}"


def quantize(*args: str) -> None:
    result = CliRunner().invoke(app, ["quantize", "--method", "rtn", "--group-size", "32", *args])
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gpt2"])
def test_every_weight_is_in_one_part(family: str, tmp_path: Path) -> None:
    model = open_checkpoint(write_model(tmp_path / family, family))
    parts = part_sizes(checkpoint_graph(model), model)
    tied = CONFIGS[family].get("tie_word_embeddings", True)
    assert ("head" in parts) is not tied
    assert {"embeddings", "attention", "mlp", "norms and biases"} <= parts.keys()
    assert sum(part.size_after for part in parts.values()) == model.nbytes
    assert all(part.size_after == 2 * part.size_16bit for part in parts.values())  # float32 on disk
    width = 64
    attention = {"llama": 2 * width * width + 2 * width * 32, "gpt2": 4 * width * width}
    if family in attention:
        assert parts["attention"].size_16bit == 2 * 2 * attention[family]


def test_files_in_the_folder_say_what_was_done(tmp_path: Path) -> None:
    write_model(tmp_path / "model", "llama", tie_word_embeddings=True)
    outputs = [tmp_path / "one", tmp_path / "two"]
    for output in outputs:
        quantize("--model", str(tmp_path / "model"), "--output", str(output))
    files = [sorted((output / f"quantize_report.{suffix}") for suffix in ("json", "md", "svg")) for output in outputs]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]
    report = json.loads(files[0][0].read_text())
    assert report["quality"]["kl"] > 0
    assert report["quality"]["perplexity_after"] != report["quality"]["perplexity_before"]
    assert report["parts"]["mlp"]["size_after"] < report["parts"]["mlp"]["size_16bit"] / 3
    assert [len(layer["modules"]) for layer in report["layers"]] == [7, 7]
    rows = [line for line in files[0][1].read_text().splitlines() if re.match(r"\| \d+ \|", line)]
    assert [row.count("e-") for row in rows] == [8, 8]
    chart = ElementTree.fromstring(files[0][2].read_text())
    assert len(chart.findall(f"{SVG}polyline")) == 7


def test_one_file_has_its_report_beside_it(tmp_path: Path) -> None:
    write_model(tmp_path / "model", "llama", num_hidden_layers=1)
    quantize("--model", str(tmp_path / "model"), "-o", str(tmp_path / "a.gguf"), "--format", "gguf", "--symmetric")
    assert sorted(path.name for path in tmp_path.glob("a.*")) == [
        *("a.gguf", "a.report.json", "a.report.md", "a.report.svg")
    ]


def test_no_text_no_measurement(tmp_path: Path) -> None:
    write_model(tmp_path / "model", "llama", num_hidden_layers=1)
    quantize("--model", str(tmp_path / "model"), "--output", str(tmp_path / "out"), "--eval-text", "none")
    assert json.loads((tmp_path / "out" / "quantize_report.json").read_text())["quality"] is None


def test_a_text_that_is_too_short_is_a_warning(tmp_path: Path) -> None:
    write_model(tmp_path / "model", "llama", num_hidden_layers=1)
    (tmp_path / "text.txt").write_text("")
    args = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "out"), "--eval-text"]
    result = CliRunner().invoke(
        app, ["quantize", "--method", "rtn", "--group-size", "32", *args, f"{tmp_path}/text.txt"]
    )
    assert result.exit_code == 0
    assert "warning: perplexity and KL are not measured: perplexity needs at least 2 tokens" in result.stderr
    missing = CliRunner().invoke(app, ["quantize", *args, str(tmp_path / "none.txt")])
    assert (missing.exit_code, "none.txt: No such file" in missing.stderr) == (2, True)


def test_the_worst_five_layers(tmp_path: Path) -> None:
    write_model(tmp_path / "model", "llama", num_hidden_layers=1)
    report = quantize_checkpoint(
        QuantizeConfig(
            str(tmp_path / "model"), str(tmp_path / "out"), method="rtn", group_size=32, override=("down_proj:bits=8",)
        )
    )
    layers = tuple(replace(report.layers[0], layer=i, modules={"a": e}) for i, e in enumerate([1, 7, 3, 6, 5, 4, 2]))
    report = replace(report, layers=(*layers, replace(layers[0], layer=7, modules={})))
    assert [layer.layer for layer in report.worst_layers] == [1, 3, 4, 5, 2]
    write_report_files(report, tmp_path / "out")
    written = (tmp_path / "out" / "quantize_report.md").read_text()
    assert written.startswith(f"# {tmp_path}/model: rtn, 4/8 bits\n")
    assert "| 4 bits, symmetric, groups of 32 | 6 |\n| 8 bits, symmetric, groups of 32 | 1 |\n" in written


def test_a_chart_of_nothing_and_of_zeros_is_a_chart() -> None:
    for errors in ({}, {"q": {0: 0.0}}, {"q": {0: 1e-3, 5: 0.0, 9: 2.0}, "<k>": {3: 1.0}}):
        root = ElementTree.fromstring(error_chart("a & b", errors))
        assert root.find(f"{SVG}text").text == "a & b"
