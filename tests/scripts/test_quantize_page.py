"""The page of what to choose: which results count, what a layout is, and what is written."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import quantize_page
from md_table import with_section
from random_models import write_small_llama

from llmctl.config import QuantizeConfig

BASE = QuantizeConfig(model="m", method="gptq", bits=4, group_size=64, symmetric=False, calib="wiki")


def result(config: QuantizeConfig, case: str, kl: float, version: str = "1", **changes: Any) -> dict[str, Any]:
    key = [case, version, json.dumps(asdict(config), sort_keys=True), "text", 8, 1024]
    row = {"key": key, "case": case, "calibration": config.calib, "bits_per_weight": 4.3125, "kl": kl}
    row |= {"kl_error": 0.01, "delta_nll": kl, "delta_nll_error": 0.02, "top1": 0.8, "nll": 3.0, "original_nll": 2.9}
    return {**row, "tokens": 8184, "seconds": 12.0, **changes}


def cost(size: int, speed: float) -> dict[str, Any]:
    return {"size": size << 20, "memory": {"cpu": size << 19, "cuda:sm_90": size << 18}, "speed": speed, "machine": "M"}


def layout_key(config: QuantizeConfig) -> str:
    return json.dumps(asdict(quantize_page.layout_of(config)), sort_keys=True)


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_last_version_of_a_case_counts() -> None:
    old = [result(replace(BASE, seed=seed), "a", 0.5, "1") for seed in range(3)]
    new = [result(replace(BASE, seed=seed), "a", 0.1 + seed, "2") for seed in range(2)]
    again = result(BASE, "a", 0.2, "2")
    (row,) = quantize_page.latest([*old, *new, again])
    assert [found["kl"] for found in row] == [0.2, 1.1]
    with pytest.raises(ValueError, match="several models or protocols"):
        quantize_page.latest([*new, result(replace(BASE, model="other"), "b", 0.1, "2")])


def test_methods_of_one_layout_are_measured_once() -> None:
    gptq, stacked, awq = (replace(BASE, method=method) for method in ("gptq", "awq+gptq", "awq"))
    assert layout_key(gptq) == layout_key(stacked) == layout_key(replace(gptq, seed=5, calib="self"))
    assert quantize_page.layout_of(awq).format == "awq"
    assert quantize_page.layout_of(gptq).format == "gptq_v2"
    assert quantize_page.layout_of(QuantizeConfig(method="w8a8")).format == "compressed-tensors-w8a8"
    assert quantize_page.layout_of(QuantizeConfig(method="nf4")).method == "nf4"
    mixed = replace(BASE, bits=None, target_bpw=3.5)
    assert layout_key(mixed) != layout_key(replace(mixed, calib="self"))  # its bits depend on the text
    assert quantize_page.layout_of(mixed).method == "rtn"


def test_the_page_is_written_from_the_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rtn = replace(BASE, method="rtn", bits=8, symmetric=True)
    rows = [result(BASE, "gptq-4bit", 0.1, machine="M"), result(rtn, "rtn-8bit", 0.003, bits_per_weight=8.25)]
    rows.append(result(replace(BASE, calib="self"), "gptq-4bit", 0.2))
    costs = [{"layout": layout_key(BASE), **cost(80, 200.0)}, {"layout": layout_key(rtn), **cost(140, 150.0)}]
    costs.append({"layout": "original m", **cost(256, 100.0)})
    page = tmp_path / "page.md"
    markers = (*quantize_page.CHOICE, *quantize_page.SPREAD)
    page.write_text("\n".join(["before", *markers, "after"]))
    files = (write_lines(tmp_path / "results", rows), "--costs", write_lines(tmp_path / "costs", costs))
    monkeypatch.setattr(sys, "argv", ["quantize_page.py", *map(str, files), "--page", str(page)])
    assert quantize_page.main() == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after")
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert table[1] == "| original | 16.00 | 256.0 | 128.0 | 64.0 | 18.17 | 0 | 0 | 100 |  |"
    assert table[2] == "| **gptq-4bit** | 4.31 | 80.0 | 40.0 | 20.0 | 20.09 | 0.1000 ± 0.0100 | +0.1000 | 200 | 12 |"
    assert table[3].startswith("| **rtn-8bit** | 8.25 | 140.0 | 70.0 | 35.0 | ")
    assert [line.split(" | ")[1] for line in table[5:]] == ["wiki", "wiki", "self"]
    assert "llmctl 1." in text
    assert "made on" not in text  # where speeds are of, too
    assert "gptq-4bit" in (tmp_path / quantize_page.PICTURE).read_text()
    assert quantize_page.main() == 0
    assert page.read_text() == text


def test_the_real_page_has_its_markers() -> None:
    text = quantize_page.PAGE.read_text(encoding="utf-8")
    for markers in (quantize_page.CHOICE, quantize_page.SPREAD):
        assert markers[0] in with_section(quantize_page.PAGE.name, text, markers, "")


@pytest.mark.slow
def test_a_layout_is_made_measured_and_removed(tmp_path: Path) -> None:
    model = write_small_llama(tmp_path / "model")
    config = replace(BASE, model=str(model), group_size=32)
    costs = quantize_page.Costs(tmp_path / "costs", tmp_path, 1)
    found, original = costs.of(config), costs.original(str(model))
    assert 0 < found.memory["cpu"] < original.memory["cpu"]
    assert 0 < found.memory["cuda:sm_90"] < original.memory["cuda:sm_90"]
    assert found.size < original.size
    assert found.speed is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["costs", "model"]
    again = quantize_page.Costs(tmp_path / "costs", tmp_path / "nowhere", 1)
    assert (again.of(config), again.original(str(model))) == (found, original)
