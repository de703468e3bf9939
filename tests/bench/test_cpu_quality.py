"""scripts/cpu_quality.py: its judgement on given numbers, and a whole run on a tiny quantized checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from random_models import write_model

from llmctl.targets.cpu.toolchain import find_compiler

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
import cpu_quality


def row(perplexity: float, exact: float = 10.0) -> cpu_quality.Row:
    return cpu_quality.Row("int8", perplexity, exact, 0.01, 1.0)


def test_only_changes_beyond_the_bound_are_violations() -> None:
    assert cpu_quality.violations([row(10.09), row(9.91)], 0.01) == []
    worse, better, broken = cpu_quality.violations([row(10.11), row(9.89), row(float("nan"))], 0.01)
    assert "perplexity 10.110, the same weights in float32 10.000 (+1.10%, allowed 1%)" in worse
    assert "(-1.10%" in better
    assert "nan" in broken


def test_divergence_of_known_distributions() -> None:
    p, q = np.log([[0.5, 0.5], [0.9, 0.1]]), np.log([[0.25, 0.75], [0.9, 0.1]])
    expected = 0.5 * (0.5 * np.log(2) + 0.5 * np.log(2 / 3))
    assert cpu_quality.divergence(p, q) == pytest.approx(expected)
    assert cpu_quality.divergence(p, p) == 0


@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler on this machine")
@pytest.mark.xdist_group("cpu_kernels")
@pytest.mark.slow
def test_a_run_on_a_tiny_checkpoint(tmp_path: Path) -> None:
    """Quantized in 8 bits, the integer engine is near float32; a bound of nothing is not met, and exits with 1."""
    from llmctl.config import QuantizeConfig
    from llmctl.quantize.driver import quantize_checkpoint

    model, text = write_model(tmp_path / "dense", "llama"), tmp_path / "text.txt"
    quantize_checkpoint(
        QuantizeConfig(model=str(model), output=str(tmp_path / "q"), method="rtn", bits=8, group_size=32)
    )
    text.write_text("the quick brown fox reads a graph that is data and writes numbers into a cache. " * 8)
    command = [
        sys.executable,
        str(cpu_quality.__file__),
        "--text",
        str(text),
        "--context",
        "64",
        "--kl-tokens",
        "20",
        "--json",
    ]
    found = {}
    for name, extra, expected in (
        ("q", ["--bound", "0.05", "--heads", "dense,int8"], 0),
        ("q", ["--bound", "0", "--heads", "int8"], 1),
        ("dense", [], 2),
    ):
        result = subprocess.run(
            [*command, "--model", str(tmp_path / name), *extra],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert result.returncode == expected, result.stderr
        found[expected] = result
    rows = json.loads(found[0].stdout)["results"]
    assert [r["lm_head"] for r in rows] == ["dense", "int8"]
    assert all(0 < r["kl"] < 0.05 and r["perplexity"] != r["exact"] for r in rows)
    assert "out of bounds: lm_head int8" in found[1].stderr
    assert "is not quantized" in found[2].stderr
