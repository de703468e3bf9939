"""A sweep's result for people: charts, one HTML page that needs nothing else, Markdown, CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from llmctl.bench import report, verdict
from llmctl.bench.curves import HEIGHT, WIDTH, Line, Series, Spot, curves
from llmctl.bench.gate import parse_slos
from llmctl.bench.sweep_plan import RATE
from llmctl.bench.sweep_view import COLUMNS, NOTE, level_of, rows, sentence, variant_of
from llmctl.bench.units import figure
from llmctl.evaluate import svg

_LATENCIES = (
    ("median_ttft_ms", "Time to first token, median"),
    ("p99_ttft_ms", "Time to first token, p99"),
    ("median_tpot_ms", "Time per output token, median"),
    ("p99_itl_ms", "Inter-token latency, p99"),
    ("median_e2el_ms", "End-to-end latency, median"),
)
_LEGEND = "Ring: the knee. Hollow: misses an objective. Dashed: the objective."
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#111}"
    "table{border-collapse:collapse;margin:1rem 0}td,th{padding:.25rem .75rem;text-align:right;border-bottom:1px solid "
    "#ddd}td:first-child,th:first-child{text-align:left}svg{width:100%;height:auto}.bad{color:#b91c1c}"
    "pre{white-space:pre-wrap;background:#f5f5f5;padding:1rem}"
)


def charts(result: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """(title, parts) of every chart: each latency over output throughput, then goodput over load."""
    points = [point for point in result["points"] if point["completed"]]
    limits = {slo.metric: slo.limit for slo in parse_slos(result["workload"]["slo"]) if slo.op in ("<=", "<")}
    made = []
    for key, title in _LATENCIES:
        shown = [point for point in points if point.get(key) is not None]
        if shown:
            lines = [Line(limits[key], f"objective {limits[key]:g} ms")] if key in limits else []
            series = _series(shown, lambda p, key=key: (p["output_throughput"], p[key]))
            made.append((title, curves(title, "output throughput, tokens a second", "ms", series, lines)))
    if any(point.get("request_goodput") is not None for point in points):
        title = "Goodput: requests a second within every limit of --goodput"
        across = "requests a second offered" if result["axis"] == RATE else "requests at once"
        finite = [point for point in points if _load(result, point) is not None]
        series = _series(finite, lambda p: (_load(result, p) or 0.0, p["request_goodput"]))
        made.append((title, curves(title, across, "good requests a second", series)))
    return made


def _load(result: Mapping[str, Any], point: Mapping[str, Any]) -> float | None:
    """A point's place on the axis; None: an infinite rate."""
    value = point[result["axis"]]
    return None if value in (None, "inf") else float(value)


def _series(points: Sequence[Mapping[str, Any]], place: Any) -> list[Series]:
    groups: dict[str, list[Spot]] = {}
    for point in points:
        x, y = place(point)
        said = sentence(variant_of(point), level_of(point), point)
        word = level_of(point).label + (" (knee)" if point["knee"] else "")
        spot = Spot(x, y, said, word, ringed=point["knee"], filled=point["meets"])
        groups.setdefault(variant_of(point).label, []).append(spot)
    return [Series(label, tuple(spots)) for label, spots in groups.items()]


def to_svg(result: Mapping[str, Any]) -> str:
    """All charts in one file, one below the other."""
    parts = []
    made = charts(result)
    for i, (_, chart) in enumerate(made):
        parts += [f'<g transform="translate(0 {i * HEIGHT})">', *chart, "</g>"]
    return svg.document(WIDTH, max(1, len(made)) * HEIGHT, parts)


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


def to_html(result: Mapping[str, Any], title: str) -> str:
    """One page with everything: charts, tables, gates, the machine, the definitions. It loads nothing."""
    body = [f"<h1>{escape(title)}</h1>", f"<p>{escape(_subject(result))}</p>"]
    body += [f"<p>{escape(line)}</p>" for line in found_lines(result)]
    made = charts(result)
    body += [svg.document(WIDTH, HEIGHT, chart) for _, chart in made]
    body += [f"<p>{escape(_LEGEND)}</p>"] if made else []
    for label, cells in rows(result["points"]).items():
        body += [f"<h2>{escape(label)}</h2>"] if label else []
        body += [_html_table(COLUMNS, cells)]
    body += [f"<p>{escape(NOTE)}</p>"]
    if result["price_per_hour"] is not None:
        body += ["<h2>Cost of a million tokens</h2>", _costs(result)]
    body += ["<h2>Gates</h2>", _html_table(["", "gate"], _verdict(result))]
    body += ["<h2>Where</h2>", f"<p>{escape(report.where(result))}</p>"]
    body += ["<h2>Definitions</h2><dl>"]
    body += [f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in result["definitions"].items()]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en">{head}\n' + "\n".join([*body, "</dl></html>"]) + "\n"


def _subject(result: Mapping[str, Any]) -> str:
    work = result["workload"]
    parts = [f"{result['model_id']}, {work['dataset_name']} prompts"]
    parts += [f"input {work['input_len']}"] if work["input_len"] else []
    parts += [f"prefix {work['prefix_len']} shared by {work['num_prefixes']} kinds"] if work["prefix_len"] else []
    parts += [f"output {work['output_len']} tokens"] if work["output_len"] else []
    parts += ["objectives " + ", ".join(work["slo"])] if work["slo"] else []
    return "; ".join([*parts, result["date"]])


def _costs(result: Mapping[str, Any]) -> str:
    header = ("load", "input", "output", "all")
    cells = []
    for point in result["points"]:
        cost = point["cost_per_million_tokens"]
        label = ", ".join(filter(None, (variant_of(point).label, level_of(point).label)))
        cells.append([label, *(figure(cost[kind]) for kind in ("input", "output", "total"))])
    price = f"<p>At {result['price_per_hour']:g} an hour; the whole price is laid on each kind of token in turn.</p>"
    return price + _html_table(header, cells)


def _verdict(result: Mapping[str, Any]) -> list[list[str]]:
    return [list(line) for line in verdict.lines(result)]


def _html_table(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    lines = ["<table><tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in header) + "</tr>"]
    for row in cells:
        bad = ' class="bad"' if any(cell in ("FAIL", "no") for cell in row) else ""
        lines.append(f"<tr{bad}>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>")
    return "".join([*lines, "</table>"])


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
