"""Report files of a bench result: JSON, JUnit, Markdown, CSV, github-action-benchmark. Written beside, then renamed."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmctl.bench import verdict
from llmctl.bench.metrics import higher_is_better, parse_latency_key
from llmctl.bench.units import unit
from llmctl.errors import LlmctlError

_FAILURES_SHOWN = 5


def write_text(path: Path, text: str) -> None:
    """Write beside the final name, fsync, rename; missing folders are made.

    Raises:
        LlmctlError: it cannot be written.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise LlmctlError(f"cannot write {path}: {error.strerror or error}") from error


def to_json(result: Mapping[str, Any]) -> str:
    """Strict JSON (no NaN, no Infinity)."""
    return json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def numeric_metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a result: throughputs, counts and latency statistics, in its order."""
    skip = {
        "num_prompts",
        "burstiness",
        "max_concurrency",
        "request_rate",
        "schema_version",
        "exit_code",
        "num_repeats",
    }
    return {
        key: float(value)
        for key, value in result.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and key not in skip
    }


def to_junit(result: Mapping[str, Any], suite: str) -> str:
    """JUnit XML: one test case a gate."""
    gates = result["gates"]
    failed = [gate for gate in gates if not gate["passed"]]
    seconds = f"{float(result.get('duration') or result.get('elapsed_time') or 0):.3f}"
    counts = {"tests": str(len(gates)), "failures": str(len(failed)), "errors": "0", "time": seconds}
    root = ET.Element("testsuites", counts)
    element = ET.SubElement(root, "testsuite", {"name": suite, "skipped": "0", **counts})
    properties = ET.SubElement(element, "properties")
    for key, value in numeric_metrics(result).items():
        ET.SubElement(properties, "property", {"name": key, "value": repr(value)})
    for gate in gates:
        name = f"{gate['metric']} {gate['op']} {gate['limit']:g}"
        case = ET.SubElement(element, "testcase", {"classname": f"{suite}.{gate['kind']}", "name": name, "time": "0"})
        if not gate["passed"]:
            message = _clean(verdict.sentence(gate, result))
            ET.SubElement(case, "failure", {"type": gate["kind"], "message": message}).text = _failure_text(
                result, gate
            )
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _failure_text(result: Mapping[str, Any], gate: Mapping[str, Any]) -> str:
    if gate["kind"] != "requests":
        return ""
    return _clean("\n".join(failure_lines(result)))


def _clean(text: str) -> str:
    """Drop characters that XML 1.0 cannot hold."""
    return "".join(
        c for c in text if c in "\t\n\r" or (ord(c) >= 0x20 and not 0xD800 <= ord(c) <= 0xDFFF and c not in "￾￿")
    )


def failure_lines(result: Mapping[str, Any]) -> list[str]:
    """``3 x http_500: HTTP 500: …`` for the first distinct failures."""
    lines = [
        f"{row['count']} x {row['kind']}: {message}"
        for row in result.get("failures") or ()
        for message in row["messages"]
    ]
    return lines[:_FAILURES_SHOWN]


def to_markdown(result: Mapping[str, Any], title: str) -> str:
    """A summary for a pull request or a CI job page: the verdict, and every figure folded away."""
    failures = failure_lines(result)
    figures = table(
        ["metric", "value", "95% interval" if not _level(result) else f"{_level(result):.0%} interval"],
        [[k, f"{_show(v)} {unit(k)}".strip(), _interval(result, k)] for k, v in numeric_metrics(result).items()],
    )
    return "\n".join(
        [
            *verdict_markdown(result, title),
            *(["", "Failed requests:", "", *(f"- {cell(line)}" for line in failures)] if failures else []),
            "",
            *folded("Figures", figures),
            "",
            where(result),
            "",
        ]
    )


def verdict_markdown(result: Mapping[str, Any], title: str) -> list[str]:
    """The heading, then a line a gate, those that failed first, then what else is to be known."""
    gates = [f"- {word if word == 'pass' else f'**{word}**'}: {cell(said)}" for word, said in verdict.lines(result)]
    notes = [f"- note: {cell(note)}" for note in result.get("notes") or ()]
    return [f"### {title}: {verdict.headline(result)}", "", *gates, *notes]


def folded(summary: str, lines: Sequence[str]) -> list[str]:
    """Markdown that is shown when it is asked for."""
    return [f"<details><summary>{summary}</summary>", "", *lines, "", "</details>"]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(cell(text) for text in row) + " |" for row in rows]


def cell(text: str) -> str:
    """A text that Markdown neither breaks a table nor makes a tag of."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _level(result: Mapping[str, Any]) -> float | None:
    rows = list((result.get("confidence") or {}).values())
    return float(rows[0]["confidence"]) if rows else None


def _interval(result: Mapping[str, Any], metric: str) -> str:
    row = (result.get("confidence") or {}).get(metric)
    return "" if not row or row["half_width"] is None else f"{_show(row['mean'])} ± {_show(row['half_width'])}"


def where(result: Mapping[str, Any]) -> str:
    """The machine, the versions and the time, for people."""
    environment = result.get("environment") or {}
    load = (environment.get("load_average_before") or ["?"])[0]
    return (
        f"{environment.get('cpu_model')}, {environment.get('cpu_cores_usable')} cores, load {load} before; "
        f"llmctl {environment.get('llmctl')}, {environment.get('git_commit') or 'no commit'}; {result.get('date')}"
    )


def _show(value: object) -> str:
    if not isinstance(value, int | float):
        return "none"
    return f"{value:.0f}" if float(value).is_integer() and abs(value) < 1e9 else f"{value:.4g}"


def to_csv(result: Mapping[str, Any]) -> str:
    """A header, one row a repeat, and a last row ``all`` with the pooled figures."""
    columns = list(numeric_metrics(result))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    head = ["date", "label", "model_id", "repeat"]
    writer.writerow([*head, *columns])
    common = [result.get("date"), result.get("label"), result.get("model_id")]
    for number, repeat in enumerate(result.get("repeats") or (), start=1):
        writer.writerow([*common, number, *(repeat.get(c, "") for c in columns)])
    writer.writerow([*common, "all", *(result[c] for c in columns)])
    return out.getvalue()


def to_github_action_benchmark(result: Mapping[str, Any], bigger: bool) -> str:
    """The list that github-action-benchmark reads: throughputs for its ``customBiggerIsBetter`` tool, latencies for
    ``customSmallerIsBetter``.
    """
    rows = []
    for key, value in numeric_metrics(result).items():
        if (not unit(key) or key.startswith("std_")) or higher_is_better(key) != bigger:
            continue
        if not bigger and parse_latency_key(key) is None and not key.endswith(("latency", "elapsed_time")):
            continue
        row: dict[str, object] = {"name": key, "unit": unit(key), "value": value}
        interval = (result.get("confidence") or {}).get(key)
        if interval and interval["half_width"] is not None:
            row["range"] = f"± {interval['half_width']:.4g}"
        row["extra"] = f"{result.get('model_id')} {result.get('label') or ''}".strip()
        rows.append(row)
    return json.dumps(rows, indent=2) + "\n"


def default_filename(result: Mapping[str, Any], backend: str) -> str:
    """``LABEL-RATEqps-concurrencyN-MODEL-DATE.json``, as ``vllm bench serve`` names it."""
    concurrency = result.get("max_concurrency")
    parts = [str(result.get("label") or backend)]
    if "request_rate" in result:
        parts.append(f"{result['request_rate']}qps" + (f"-concurrency{concurrency}" if concurrency is not None else ""))
    parts += [str(result["model_id"]).rstrip("/").rsplit("/", 1)[-1].replace(":", "-"), str(result["date"])]
    return "-".join(parts) + ".json"
