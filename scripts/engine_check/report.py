"""gpu_engine.json, gpu_engine.md and the charts, written anew whenever there is something new."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine_check.chart import charts
from engine_check.goals import gap_share, get, judge, of_matmul, of_read
from engine_check.supervise import Report
from engine_check.trial import ratios

VERSION = 1
Results = Mapping[str, Any]


def write(folder: Path, facts: Mapping[str, Any], report: Report) -> None:
    """All files; each is whole at any moment."""
    folder.mkdir(parents=True, exist_ok=True)
    document = as_document(facts, report)
    _replace(folder / "gpu_engine.json", json.dumps(document, indent=1) + "\n")
    _replace(folder / "gpu_engine.md", markdown(document))
    for name, text in charts(report.results).items():
        _replace(folder / name, text)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def as_document(facts: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """What gpu_engine.json holds."""
    return {
        "version": VERSION, "facts": {**facts, **report.results.get("facts", {})},
        "results": {name: value for name, value in report.results.items() if name != "facts"},
        "problems": report.problems, "left out": report.left_out, "seconds": report.seconds,
    }  # fmt: skip


def failed(document: Mapping[str, Any]) -> list[str]:
    """What was wrong, a line each: variants that are not right, and parts that failed."""
    variants = get(document, "results", "right") or {}
    wrong = [f"{name}: {found['wrong'][0]}" for name, found in variants.items() if found["wrong in all"]]
    return [*wrong, *document["problems"]]


def markdown(document: Mapping[str, Any]) -> str:
    """The report."""
    results = document["results"]
    lines = ["# Whole models on the CUDA runtime", ""]
    lines += [f"* {name}: {value}" for name, value in document["facts"].items()]
    lines += [f"* {name}: {value:,.0f}" for name, value in results.get("rates", {}).items()]
    for title, rows in (("Failed", failed(document)), ("Left out", document["left out"])):
        if rows:
            lines += ["", f"## {title}", "", *(f"* {row}" for row in rows)]
    lines += ["", "## Targets", "", *table(("target", "found", ""), goal_rows(document))]
    for title, head, rows in sections(results):
        if rows:
            lines += ["", f"## {title}", "", *table(head, rows)]
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in document["seconds"].items())
    return "\n".join([*lines, "", f"Seconds: {seconds}."]) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table; figures are to the right wherever a column's first cell is one."""
    first = rows[0] if rows else head
    marks = ["--:" if cell[:1].isdigit() and i else "---" for i, cell in enumerate(first)]
    return [_line(head), f"|{'|'.join(marks)}|", *map(_line, rows)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def goal_rows(document: Mapping[str, Any]) -> list[list[str]]:
    """Every target with what was found; a dry run has measured nothing."""
    results = document["results"] if document["facts"]["measured"] else {"right": document["results"].get("right")}
    return [[v.goal.name, v.found, v.word] for v in judge(results)]


Section = tuple[str, tuple[str, ...], list[list[str]]]


def sections(results: Results) -> Iterator[Section]:
    """The tables of what was measured."""
    yield (
        "Right",
        ("model", "largest error", "allowed", "as the reference", "replays", "engine", "wrong"),
        right_rows(results),
    )
    yield "Decode", (
        "model", "sequences", "context", "ms", "±", "tok/s", "GB/s", "of read", "÷ trial"
    ), decode_rows(results)  # fmt: skip
    yield "Prompts", (
        "model", "tokens", "ms", "tok/s", "TFLOP/s", "of matmul", "host ms", "÷ trial"
    ), prefill_rows(results)  # fmt: skip
    yield (
        "Served",
        ("model", "load", "way", "tok/s", "range", "TTFT ms", "range", "between tokens ms"),
        served_rows(results),
    )
    yield "Start", ("model", "start", "seconds"), start_rows(results)
    yield "Idle", (
        "model", "sequences", "kernels a step", "in a step", "between steps", "idle in all", "µs by kernel"
    ), gap_rows(results)  # fmt: skip
    yield "Launches", (
        "model", "launches a decode step", "of an eager step", "host µs a launch"
    ), launch_rows(results)  # fmt: skip


def _models(results: Results) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield from (get(results, "models") or {}).items()


def right_rows(results: Results) -> list[list[str]]:
    """A line a small model."""
    rows = []
    for name, found in (get(results, "right") or {}).items():
        wrong = f"{found['wrong in all']}: {found['wrong'][0]}" if found["wrong in all"] else "nothing"
        rows.append([
            name, _figure(found.get("largest error"), 4), _figure(found.get("limit"), 4),
            str(found.get("tokens as the reference's", "")), str(found.get("replays", "")),
            str(found.get("requests alike at depth 1 and 2", "")), wrong,
        ])  # fmt: skip
    return rows


def _figure(value: Any, digits: int = 0) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def decode_rows(results: Results) -> list[list[str]]:
    """A line a case."""
    against, rows = ratios(results), []
    for name, found in _models(results):
        for case, c in sorted(found.get("decode", {}).items(), key=lambda item: (item[1]["context"], item[1]["batch"])):
            ratio = against.get(f"{name.rpartition(' ')[2]} {case}") if name.startswith("Llama-3-8B ") else None
            rows.append([
                name, str(c["batch"]), f"{c['context']:,}", f"{c['ms']:.3f}", f"{c['spread']:.1%}", _figure(c["tok/s"]),
                _figure(c["GB/s"]), _share(of_read(results, name, case)), _figure(ratio, 2),
            ])  # fmt: skip
    return rows


def prefill_rows(results: Results) -> list[list[str]]:
    """A line a length."""
    against, rows = ratios(results), []
    for name, found in _models(results):
        for tokens, c in sorted(found.get("prefill", {}).items(), key=lambda item: int(item[0])):
            kind = name.rpartition(" ")[2]
            ratio = against.get(f"{kind} prefill {tokens}") if name.startswith("Llama-3-8B ") else None
            rows.append([
                name, f"{c['tokens']:,}", f"{c['ms']:.1f}", _figure(c["tok/s"]), _figure(c["TFLOP/s"]),
                _share(of_matmul(results, name, c["tokens"])), f"{c['host ms']:.1f}", _figure(ratio, 2),
            ])  # fmt: skip
    return rows


def served_rows(results: Results) -> list[list[str]]:
    """A line a load and way."""
    rows = []
    for name, found in _models(results):
        for part in ("served", "http"):
            for c in (found.get(part, {}).get(at_once) for at_once in ("1", "64")):
                if c is not None:
                    rows.append([
                        name, c["load"], c["way"], _figure(c["tok/s"]), _range(c["tok/s range"], 0),
                        f"{c['TTFT ms']:.1f}", _range(c["TTFT ms range"], 1), f"{c['between tokens ms']:.2f}",
                    ])  # fmt: skip
    return rows


def _range(pair: Sequence[float], digits: int) -> str:
    return f"{pair[0]:,.{digits}f}–{pair[1]:,.{digits}f}"


def start_rows(results: Results) -> list[list[str]]:
    """Starts of the server, and their stages."""
    rows = []
    for name, found in _models(results):
        http = found.get("http", {})
        for label, key in (
            ("llmctl serve to ready, the first", "first start to ready s"),
            ("llmctl serve to ready, files read before", "start to ready s"),
            ("the folder of random weights, written", "folder written in s"),
        ):
            if key in http:
                rows.append([name, label, f"{http[key]:.1f}"])
        for stage, seconds in http.get("stages of a start s", {}).items():
            rows.append([name, f"of it, in a process of its own: {stage}", f"{seconds:.2f}"])
        if "opened" in found:
            seconds = found["opened"]["runtime opened in s"]
            rows.append([name, "the runtime over weights on the device (buffers, graphs)", f"{seconds:.1f}"])
    return rows


def gap_rows(results: Results) -> list[list[str]]:
    """A line a batch."""
    rows = []
    for name, found in _models(results):
        for batch, c in found.get("gaps", {}).items():
            step, engine = c["in a step"], c["engine"]
            inside = gap_share(results, name, batch)
            kernels = ", ".join(f"{kernel} {us:.0f}" for kernel, us in step["us by kernel"].items())
            shares = [f"{engine['between steps']:.1%}", f"{engine['idle share']:.1%}"]
            rows.append([name, batch, str(step["kernels"]), _percent(inside), *shares, kernels])
    return rows


def launch_rows(results: Results) -> list[list[str]]:
    """A line a model."""
    rows = []
    for name, found in _models(results):
        if "launch cost" in found:
            cost = found["launch cost"]
            rows.append([
                name, str(found["launches"]["launches"]), f"{cost['launches']} at {cost['tokens']} tokens",
                f"{cost['host us a launch']:.1f}",
            ])  # fmt: skip
    return rows
