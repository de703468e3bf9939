"""The SLO grammar, gates, exit codes."""

from __future__ import annotations

import operator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmctl.bench import gate
from llmctl.bench.metrics import LATENCIES, SCALARS, is_known_metric, known_metrics, parse_latency_key
from llmctl.errors import ExitCode, UsageError

OPS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt, "==": operator.eq}
metric_names = st.one_of(
    st.sampled_from(SCALARS),
    st.builds(
        lambda word, name: f"{word}_{name}_ms",
        st.one_of(st.sampled_from(["mean", "median", "std"]), st.integers(0, 100).map(lambda q: f"p{q}")),
        st.sampled_from(LATENCIES),
    ),
)
limits = st.floats(-1e9, 1e9, allow_nan=False)
blanks = st.sampled_from(["", " ", "  "])


@given(metric_names, st.sampled_from(sorted(OPS)), limits, blanks, blanks)
def test_what_is_written_is_what_is_parsed(metric: str, op: str, limit: float, a: str, b: str) -> None:
    (slo,) = gate.parse_slos([f"{a}{metric}{b}{op}{a}{limit!r}{b}"])
    assert slo == gate.Slo(metric, op, limit)


@given(metric_names, st.sampled_from(sorted(OPS)), limits, limits)
def test_a_gate_is_the_comparison(metric: str, op: str, limit: float, observed: float) -> None:
    found = gate.check(gate.Slo(metric, op, limit), {metric: observed})
    assert found.passed == OPS[op](observed, limit)
    assert found.observed == observed


@pytest.mark.parametrize("value", [None, float("nan"), "12", float("inf")])
@pytest.mark.parametrize("op", sorted(OPS))
def test_no_figure_never_passes(value: Any, op: str) -> None:
    assert not gate.check(gate.Slo("p99_ttft_ms", op, 1), {"p99_ttft_ms": value}).passed
    assert not gate.check(gate.Slo("p99_ttft_ms", op, 1), {}).passed


@given(st.text(max_size=30))
def test_any_text_is_parsed_or_refused_in_words(text: str) -> None:
    try:
        slos = gate.parse_slos([text])
    except UsageError:
        return
    assert all(is_known_metric(slo.metric) for slo in slos)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("p99_tfft_ms<=200", "did you mean 'p99_ttft_ms'"),
        ("P99_TTFT_MS<=200", "did you mean 'p99_ttft_ms'"),
        ("p101_ttft_ms<=200", "unknown metric"),
        ("output_thoughput>=3", "did you mean 'output_throughput'"),
        ("zzz<=1", "known: duration"),
        ("p99_ttft_ms", "expected METRIC OP NUMBER"),
        ("p99_ttft_ms<=", "expected METRIC OP NUMBER"),
        ("p99_ttft_ms=<200", "expected METRIC OP NUMBER"),
        ("p99_ttft_ms<=fast", "finite number"),
        ("p99_ttft_ms<=nan", "finite number"),
        ("p99_ttft_ms<=inf", "finite number"),
        ("output_throughput>=5ms", "does not fit"),
        ("output_throughput>=5%", "does not fit"),
    ],
)
def test_bad_objectives(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said.replace("(", r"\(")) as caught:
        gate.parse_slos([text])
    assert caught.value.exit_code == ExitCode.USAGE


def test_units_and_commas() -> None:
    found = gate.parse_slos(["p99_ttft_ms<=0.2s, p50_itl_ms < 30ms", "duration<=500ms", "failed_ratio<=5%"])
    assert [str(s) for s in found] == ["p99_ttft_ms<=200", "p50_itl_ms<30", "duration<=0.5", "failed_ratio<=0.05"]


def test_percentiles_that_objectives_need_are_found() -> None:
    slos = gate.parse_slos(["p99.9_ttft_ms<=200", "p75_itl_ms<=1", "mean_tpot_ms<=1", "completed>=1"])
    assert gate.slo_percentiles(slos) == {"ttft": {99.9}, "itl": {75.0}, "tpot": set()}


@pytest.mark.parametrize("name", known_metrics())
def test_known_metrics_are_known(name: str) -> None:
    assert is_known_metric(name)


def test_latency_keys() -> None:
    assert parse_latency_key("p99.9_e2el_ms") == ("e2el", 99.9)
    assert parse_latency_key("median_itl_ms") == ("itl", None)
    assert parse_latency_key("p99_itl") is None


@pytest.mark.parametrize("texts", [["ttft:200 tpot:50"], ["ttft:200,tpot:50"], ["ttft:200", "tpot:50"]])
def test_goodput(texts: list[str]) -> None:
    assert gate.parse_goodput(texts) == {"ttft": 200, "tpot": 50}


@pytest.mark.parametrize("text", ["ttft", "ttft:", "ttft:x", "ttft:-1", "ttft:inf", "itl:5", "ttfft:5", ":5"])
def test_bad_goodput(text: str) -> None:
    with pytest.raises(UsageError, match="--goodput"):
        gate.parse_goodput([text])


def test_min_goodput_and_shares() -> None:
    assert gate.parse_min_goodput("2.5") == gate.Slo("request_goodput", ">=", 2.5)
    assert gate.parse_min_goodput("95%") == gate.Slo("goodput_ratio", ">=", 0.95)
    assert gate.parse_share("5%", "max_regression") == gate.parse_share("0.05", "max_regression") == 0.05
    for text in ("x", "-1", "nan", ""):
        with pytest.raises(UsageError, match="--min-goodput"):
            gate.parse_min_goodput(text)
        with pytest.raises(UsageError, match="--max-regression"):
            gate.parse_share(text, "max_regression")


def make(kind: str, passed: bool) -> gate.Gate:
    return gate.Gate(kind, "m", "<=", 1, 0, passed)


@given(st.lists(st.tuples(st.sampled_from(["requests", "slo", "goodput", "regression"]), st.booleans())))
def test_the_gravest_failure_decides(kinds: list[tuple[str, bool]]) -> None:
    failed = {kind for kind, passed in kinds if not passed}
    code = gate.exit_code(make(*k) for k in kinds)
    assert (code == 0) == (not failed)
    if "requests" in failed:
        assert code == 3
    elif failed & {"slo", "goodput"}:
        assert code == 4
    elif failed:
        assert code == 5


def test_zero_completed_never_passes() -> None:
    figures = {"completed": 0, "failed_ratio": 1.0}
    assert gate.exit_code(gate.request_gates(figures, max_failed_ratio=1.0)) == ExitCode.FAILED_REQUESTS
    assert gate.exit_code(gate.request_gates({"completed": 9, "failed_ratio": 0.1}, 0.0)) == ExitCode.FAILED_REQUESTS
    assert gate.exit_code(gate.request_gates({"completed": 9, "failed_ratio": 0.1}, 0.1)) == ExitCode.OK
