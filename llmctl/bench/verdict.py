"""What the gates of a result say, in sentences for people: failed ones first, and as annotations of a CI job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmctl.bench.units import brief, quantity
from llmctl.errors import ExitCode

_WORST_FIRST = ("FAIL", "OPEN", "pass")
_WORDS = {"<=": "at most", ">=": "at least", "<": "less than", ">": "more than", "==": "exactly"}


_LOADS = {
    "points_without_failures": (
        "load stayed within the failed requests that are allowed",
        "loads stayed within the failed requests that are allowed",
    ),
    "points_that_meet": ("load meets the objectives", "loads meet the objectives"),
}
"""Of a sweep: what a count of loads says, of one and of others."""


def _noted(gate: Mapping[str, Any]) -> str:
    return f" ({gate['note']})" if gate["note"] else ""


def sentence(gate: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """One gate of a result's ``gates``: what was found and what was allowed."""
    kind, metric, observed = gate["kind"], gate["metric"], gate["observed"]
    if kind in ("regression", "inconclusive"):
        return f"{metric} {gate['note']}"
    if kind == "requests" and metric == "failed_ratio" and gate["note"]:
        return str(gate["note"])
    if kind == "requests" and metric == "completed":
        return f"{brief(observed)} requests completed" if observed else "no request completed"
    if kind == "requests" and metric == "failed_ratio" and observed is not None:
        failed, total = result.get("failed", 0), result.get("failed", 0) + result.get("completed", 0)
        return f"{brief(failed)} of {brief(total)} requests failed ({observed:.1%}; allowed {gate['limit']:.1%})"
    if metric in _LOADS:
        return f"{brief(observed) if observed else 'no'} {_LOADS[metric][observed != 1]}{_noted(gate)}"
    limit, note = quantity(metric, gate["limit"]), _noted(gate)
    found = "has no value" if observed is None else f"is {quantity(metric, observed)}"
    if found == f"is {limit}" and observed != gate["limit"]:
        found = f"is {observed:.10g}"  # told apart
    return f"{metric} {found}; it must be {_WORDS[gate['op']]} {limit}{note}"


def lines(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(pass, FAIL or OPEN; sentence) of every gate: those that failed first, then those that nothing decided."""
    said = [(_word(gate), sentence(gate, result)) for gate in result["gates"]]
    return sorted(said, key=lambda line: _WORST_FIRST.index(line[0]))


def _word(gate: Mapping[str, Any]) -> str:
    return "pass" if gate["passed"] else "OPEN" if gate["kind"] == "inconclusive" else "FAIL"


def headline(result: Mapping[str, Any]) -> str:
    """passed, FAILED, or what else became of the run."""
    if result.get("interrupted"):
        return "interrupted"
    failed = {"error"} if result.get("exit_code") in (ExitCode.RUNTIME, ExitCode.USAGE) else set()
    failed |= {gate["kind"] for gate in result["gates"] if not gate["passed"]}
    return "FAILED" if failed - {"inconclusive"} else "inconclusive" if failed else "passed"


def job_annotations(result: Mapping[str, Any], title: str) -> list[str]:
    """GitHub's workflow commands: an error for each gate that failed, a warning for each note."""
    said = [("error", text) for word, text in lines(result) if word != "pass"]
    said += [("warning", text) for text in result.get("notes") or ()]
    return [f"::{level} title={_escape(title, ':,')}::{_escape(text)}" for level, text in said]


def _escape(text: str, more: str = "") -> str:
    for character in "%\r\n" + more:
        text = text.replace(character, f"%{ord(character):02X}")
    return text
