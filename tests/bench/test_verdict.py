"""What gates say to people and to CI."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmctl.bench import baseline, report, verdict
from llmctl.bench.gate import Gate, Slo, check, request_gates
from llmctl.bench.units import brief, percent, quantity


def said(gate: Gate, **result: Any) -> str:
    return verdict.sentence(gate.as_dict(), result)


def test_a_regression_in_words() -> None:
    before = {"repeats": [{"output_throughput": v} for v in (181.0, 180.0, 182.0)]}
    after = {"repeats": [{"output_throughput": v} for v in (40.0, 39.0, 41.0)]}
    (delta,) = baseline.compare(before, after, ["output_throughput"], 0.1)
    (gate,) = baseline.regression_gates([delta], 0.1)
    assert said(gate) == "output_throughput fell 78% (181 → 40 tok/s; allowed 10%, noise ±0.93%)"


@pytest.mark.parametrize(
    ("metric", "observed", "sentence"),
    [
        ("points_without_failures", 0, "no loads stayed within the failed requests that are allowed (model=x)"),
        ("points_that_meet", 0, "no loads meet the objectives (model=x)"),
        ("points_that_meet", 1, "1 load meets the objectives (model=x)"),
        ("points_that_meet", 3, "3 loads meet the objectives (model=x)"),
    ],
)
def test_loads_of_a_sweep_in_words(metric: str, observed: int, sentence: str) -> None:
    assert said(Gate("slo", metric, ">=", 1, observed, observed >= 1, "model=x")) == sentence


@pytest.mark.parametrize(
    ("slo", "figures", "sentence"),
    [
        (Slo("p99_ttft_ms", "<=", 200), {"p99_ttft_ms": 350.44}, "p99_ttft_ms is 350 ms; it must be at most 200 ms"),
        (Slo("p99_ttft_ms", "<=", 200), {"p99_ttft_ms": 200.4}, "p99_ttft_ms is 200.4; it must be at most 200 ms"),
        (Slo("p99_ttft_ms", "<=", 200), {}, "p99_ttft_ms has no value; it must be at most 200 ms"),
        (Slo("goodput_ratio", ">=", 0.95), {"goodput_ratio": 0.5}, "goodput_ratio is 50%; it must be at least 95%"),
        (Slo("output_throughput", ">", 1e6), {"output_throughput": 1234.5}, None),
    ],
)
def test_objectives_in_words(slo: Slo, figures: dict[str, object], sentence: str | None) -> None:
    wanted = sentence or "output_throughput is 1,234 tok/s; it must be more than 1,000,000 tok/s"
    assert said(check(slo, figures)) == wanted


def test_requests_in_words() -> None:
    bad = {"completed": 0, "failed": 3, "failed_ratio": 1.0}
    assert [said(gate, **bad) for gate in request_gates(bad, 0.05)] == [
        "no request completed",
        "3 of 3 requests failed (100.0%; allowed 5.0%)",
    ]
    good = {"completed": 12, "failed": 0, "failed_ratio": 0.0}
    assert [said(gate, **good) for gate in request_gates(good, 0.0)] == [
        "12 requests completed",
        "0 of 12 requests failed (0.0%; allowed 0.0%)",
    ]


def result(*passed: bool, kind: str = "slo", **more: Any) -> dict[str, Any]:
    gates = [Gate(kind, f"m{i}", "<=", 1, 0, ok).as_dict() for i, ok in enumerate(passed)]
    return {"gates": gates, "environment": {}, **more}


@given(st.lists(st.booleans(), max_size=8))
def test_failed_gates_come_first_and_keep_their_order(passed: list[bool]) -> None:
    lines = verdict.lines(result(*passed))
    assert [word for word, _ in lines] == ["pass" if ok else "FAIL" for ok in sorted(passed)]
    for wanted in (False, True):
        assert [text.split()[0] for word, text in lines if (word == "pass") is wanted] == [
            f"m{i}" for i, ok in enumerate(passed) if ok is wanted
        ]


def test_headlines() -> None:
    assert verdict.headline(result(True)) == "passed"
    assert verdict.headline(result(True, False)) == "FAILED"
    assert verdict.headline(result(True, False, kind="inconclusive")) == "inconclusive"
    assert verdict.headline(result(False, interrupted=True)) == "interrupted"
    assert verdict.lines(result(True, False, kind="inconclusive"))[0] == ("OPEN", "m1 ")


def test_annotations_of_a_job() -> None:
    document = result(True, False, notes=["no baseline yet: 100%\nreally"])
    document["gates"][1]["note"] = "a: b, 5%"
    assert verdict.job_annotations(document, "x: y") == [
        "::error title=x%3A y::m1 is 0; it must be at most 1 (a: b, 5%25)",
        "::warning title=x%3A y::no baseline yet: 100%25%0Areally",
    ]


def test_markdown_folds_the_figures_and_begins_with_what_failed() -> None:
    document = result(True, False, exit_code=4, notes=["mind"], output_throughput=3.0, date="now", confidence={})
    markdown = report.to_markdown(document, "bench")
    head, _, rest = markdown.partition("<details>")
    assert head.splitlines()[:5] == [
        "### bench: FAILED",
        "",
        "- **FAIL**: m1 is 0; it must be at most 1",
        "- pass: m0 is 0; it must be at most 1",
        "- note: mind",
    ]
    assert "| output_throughput | 3 tok/s |" in rest.partition("</details>")[0]


def test_numbers() -> None:
    assert [brief(x) for x in (1234.5, 181.4, 40.06, 4.0, 3.14159, 0.012345)] == [
        "1,234",
        "181",
        "40.1",
        "4",
        "3.14",
        "0.0123",
    ]
    assert [percent(x) for x in (0.784, 0.1, 0.025, 0.00042, 0.0)] == ["78%", "10%", "2.5%", "0.042%", "0%"]
    assert quantity("goodput_ratio", 0.9512) == "95.12%"
