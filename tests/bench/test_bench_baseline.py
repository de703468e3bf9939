"""Regressions count only beyond the allowed share and beyond the noise."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmctl.bench import baseline as b
from llmctl.errors import UsageError

positive = st.floats(0.1, 1e4)
repeats = st.lists(positive, min_size=1, max_size=6)
metrics = st.sampled_from(["output_throughput", "median_ttft_ms", "p99_itl_ms", "request_goodput", "avg_latency"])


@given(metrics, repeats, repeats, st.floats(0, 1))
def test_a_regression_exceeds_both_limits(m: str, before: list[float], after: list[float], allowed: float) -> None:
    delta = b.compare_values(m, before, after, allowed, 0.95)
    assert (delta.noise is None) == (len(before) == len(after) == 1)
    if delta.regressed:
        assert delta.worse > allowed
        assert delta.noise is None or delta.worse > delta.noise
    elif delta.noise is not None:
        assert delta.worse <= max(allowed, delta.noise)


@given(metrics, repeats, st.floats(0, 1))
def test_no_change_is_no_regression(m: str, values: list[float], allowed: float) -> None:
    assert not b.compare_values(m, values, values, allowed, 0.95).regressed


@given(metrics, repeats, repeats, st.floats(0, 0.9), st.floats(0, 0.9))
def test_allowing_more_never_adds_regressions(
    m: str, before: list[float], after: list[float], x: float, y: float
) -> None:
    low, high = sorted((x, y))
    if b.compare_values(m, before, after, high, 0.95).regressed:
        assert b.compare_values(m, before, after, low, 0.95).regressed


@given(repeats, repeats)
def test_direction(before: list[float], after: list[float]) -> None:
    higher = b.compare_values("output_throughput", before, after, 0.05, 0.95)
    lower = b.compare_values("median_ttft_ms", before, after, 0.05, 0.95)
    assert higher.change == lower.change
    assert higher.worse == -higher.change
    assert lower.worse == lower.change
    assert not (higher.regressed and lower.regressed)


def test_same_distribution_rarely_alarms_and_a_real_slowdown_does() -> None:
    rng = random.Random(3)

    def alarms(shift: float, runs: int = 400) -> float:
        count = 0
        for _ in range(runs):
            before = {"repeats": [{"output_throughput": rng.gauss(100, 4)} for _ in range(3)]}
            after = {"repeats": [{"output_throughput": rng.gauss(100 * shift, 4)} for _ in range(3)]}
            (delta,) = b.compare(before, after, ["output_throughput"], 0.02)
            count += delta.regressed
        return count / runs

    assert alarms(1.0) < 0.05
    assert alarms(0.7) > 0.95


def test_more_metrics_need_more_evidence() -> None:
    names = ["output_throughput", "median_ttft_ms", "median_tpot_ms", "median_e2el_ms"]
    before = {"repeats": [dict.fromkeys(names, v) for v in (100, 102, 98)]}
    after = {"repeats": [dict.fromkeys(names, v) for v in (90, 92, 88)]}
    one = b.compare(before, after, names[:1], 0.05)[0]
    four = b.compare(before, after, names, 0.05)[0]
    assert one.noise is not None
    assert four.noise is not None
    assert four.noise > one.noise


def test_a_vanished_metric_is_a_regression_and_an_absent_one_is_not_compared() -> None:
    (delta,) = b.compare({"median_ttft_ms": 5.0, "completed": 1}, {}, ["median_ttft_ms", "median_itl_ms"], 0.05)
    assert delta.regressed
    (gate,) = b.regression_gates([delta], 0.05)
    assert not gate.passed
    assert gate.observed is None


def test_single_runs_say_that_noise_is_unknown() -> None:
    deltas = b.compare({"output_throughput": 100.0}, {"output_throughput": 90.0}, ["output_throughput"], 0.05)
    (gate,) = b.regression_gates(deltas, 0.05)
    assert not gate.passed
    assert "noise unknown" in gate.note


def test_within_noise_is_said() -> None:
    before = {"repeats": [{"output_throughput": v} for v in (100.0, 60.0, 140.0)]}
    after = {"repeats": [{"output_throughput": v} for v in (90.0, 50.0, 130.0)]}
    (gate,) = b.regression_gates(b.compare(before, after, ["output_throughput"], 0.05), 0.05)
    assert gate.passed
    assert gate.note == "fell 11% (94.4 → 83.6 tok/s; allowed 5%, noise ±160%): too noisy to tell, not counted"


def test_other_work_is_refused() -> None:
    old = {"model_id": "m", "max_concurrency": 8, "workload": {"input_len": "128"}}
    new = {"model_id": "m", "max_concurrency": 32, "workload": {"input_len": "64"}}
    with pytest.raises(UsageError, match="max_concurrency 8 there, 32 here; input_len '128' there, '64' here"):
        b.check_same_work(Path("x"), old, new)
    b.check_same_work(Path("x"), old, {**old})
    b.check_same_work(Path("x"), {"model_id": "m"}, new)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ("[]", "expected a bench result"),
        ("{}", "expected a bench"),
        ('{"completed": 0}', "no request"),
    ],
)
def test_files_that_are_no_baseline(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "b.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=said):
        b.load_baseline(path)
    with pytest.raises(UsageError, match="--update-baseline"):
        b.load_baseline(tmp_path / "none.json")


def test_vllm_results_can_be_baselines(tmp_path: Path) -> None:
    path = tmp_path / "vllm.json"
    path.write_text(json.dumps({"completed": 5, "model_id": "m", "output_throughput": 10.0, "max_concurrency": None}))
    loaded = b.load_baseline(path)
    assert b.repeat_values(loaded, "output_throughput") == [10.0]
