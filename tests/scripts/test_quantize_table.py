"""The table of quantizers: what is measured once, and what a row says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import quantize_table
from random_models import write_model

TEXT = "the quick brown fox reads a book and the answer is that every question has an answer of its own. " * 9


def test_results_are_kept_and_make_the_same_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, text, results = write_model(tmp_path / "model", "llama"), tmp_path / "text.txt", tmp_path / "results.jsonl"
    text.write_text(TEXT)
    options = (
        f"--model {model} --text {text} --calib {text} --results {results} --seeds 0,1 --group-size 16 --threads 1"
    )
    sizes = "--calib-samples 4 --calib-length 24 --windows 3 --context 32"
    cases = "rtn-4bit-symmetric,gptq-3bit-asymmetric"
    monkeypatch.setattr(sys, "argv", ["quantize_table.py", *options.split(), *sizes.split(), "--only", cases])
    assert quantize_table.main() == 0
    first = capsys.readouterr()
    rows = [line for line in first.out.splitlines() if line.startswith("| ") and "bit-" in line]
    assert [row.split(" | ")[:2] for row in rows] == [
        ["| rtn-4bit-symmetric", "none"],
        ["| gptq-3bit-asymmetric", "text.txt"],
    ]
    assert first.err.count(": KL ") == 3  # round to nearest once, GPTQ with either seed
    assert quantize_table.main() == 0
    again = capsys.readouterr()
    assert again.out == first.out
    assert again.err == ""


def test_a_row_is_the_mean_over_seeds() -> None:
    row = {"case": "a", "calibration": "b", "bits_per_weight": 4.25, "kl": 0.1, "kl_error": 0.01, "delta_nll": 0.2}
    row |= {"delta_nll_error": 0.02, "top1": 0.8, "seconds": 3.0}
    found = quantize_table.cells([row, {**row, "kl": 0.2, "kl_error": 0.5}])
    assert found == ["a", "b", "4.25", "0.1500 ± 0.0100", "0.1000–0.2000", "+0.2000 ± 0.0200", "0.800", "3"]
