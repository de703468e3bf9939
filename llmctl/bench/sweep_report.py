"""A sweep's result in text: what was found, a line each; Markdown; CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

from llmctl.bench import report
from llmctl.bench.sweep_plan import RATE
from llmctl.bench.sweep_view import COLUMNS, NOTE, rows, variant_of


def found_lines(result: Mapping[str, Any]) -> list[str]:
    """What a search found, what was refused, and what quality is, a line each."""
    lines = [_highest(found) for found in result["find_max"]]
    measured = [point["variant"] for point in result["points"]]
    for refused in result["refused"]:
        how = "ended before all was measured" if refused["variant"] in measured else "not measured"
        lines.append(f"{_named(refused)}{how}: {refused['reason']}")
    for quality in result["quality"]:
        figures = [f"perplexity {quality['perplexity']:.4f}"]
        if quality.get("kl") is not None:
            figures += [f"KL {quality['kl']:.5f} nats a token from {quality['against']}"]
            figures += [f"top-1 agreement {quality['top1_agreement']:.2%}"]
        lines.append(f"quality of {quality['model']} ({quality['arithmetic']}): {', '.join(figures)}")
    if result["time_up"]:
        lines.append("--max-duration was over: these are the points measured until then")
    if result["interrupted"]:
        lines.append("interrupted: these are the points measured until then")
    return lines


def _named(row: Mapping[str, Any]) -> str:
    label = variant_of(row).label
    return f"{label}: " if label else ""


def _highest(found: Mapping[str, Any]) -> str:
    unit = "requests a second" if found["axis"] == RATE else "requests at once"
    if not found["trials"]:
        return f"{_named(found)}the search ended before a load was decided"
    requests = sum(trial["requests"] for trial in found["trials"])
    tried = f"{len(found['trials'])} loads tried, {requests} requests"
    if found["highest"] is None:
        least = min(trial["load"] for trial in found["trials"])
        return f"{_named(found)}no load met the objectives; the lowest tried is {least:.4g} {unit} ({tried})"
    sure = "each end settled at 5%" if found["settled"] else "not settled at 5%: the figures alone decided an end"
    if found["missed"] is None:
        return f"{_named(found)}{found['highest']:.4g} {unit} still meet the objectives; no load missed them ({tried})"
    return (
        f"{_named(found)}highest load that meets the objectives: {found['highest']:.4g} {unit}; "
        f"{found['missed']:.4g} miss them (resolution {found['resolution']:.1%}; {sure}; {tried})"
    )


def to_markdown(result: Mapping[str, Any], title: str) -> str:
    """A summary for a pull request or a CI job page."""
    lines = [*report.verdict_markdown(result, title), *(f"- {line}" for line in found_lines(result)), ""]
    for label, cells in rows(result["points"]).items():
        lines += [f"**{label}**", ""] if label else []
        lines += [*report.table(COLUMNS, cells), ""]
    return "\n".join([*lines, NOTE, "", report.where(result), ""])


def to_csv(result: Mapping[str, Any]) -> str:
    """A row a point: date, label, model, one column for each option that varies, the load, every figure."""
    points = result["points"]
    options = list(dict.fromkeys(name for point in points for name in point["variant"]))
    keys = list(dict.fromkeys(key for point in points for key in report.numeric_metrics(point)))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["date", "label", "model_id", *options, "request_rate", "max_concurrency", "meets", *keys])
    for point in points:
        varied = [point["variant"].get(name, "") for name in options]
        head = [result["date"], result["label"], result["model_id"], *varied]
        load = [point["request_rate"], point["max_concurrency"], point["meets"]]
        writer.writerow([*head, *load, *(point.get(key, "") for key in keys)])
    return out.getvalue()
