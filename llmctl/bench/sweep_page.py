"""A sweep's result as one HTML page that needs nothing else: charts, tables, gates, the machine, the definitions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from llmctl.bench import report, verdict
from llmctl.bench.curves import HEIGHT, WIDTH
from llmctl.bench.sweep_charts import LEGEND, charts
from llmctl.bench.sweep_report import found_lines
from llmctl.bench.sweep_view import COLUMNS, NOTE, level_of, rows, variant_of
from llmctl.bench.units import figure
from llmctl.evaluate import svg

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#111}"
    "table{border-collapse:collapse;margin:1rem 0}td,th{padding:.25rem .75rem;text-align:right;border-bottom:1px solid "
    "#ddd}td:first-child,th:first-child{text-align:left}svg{width:100%;height:auto}.bad{color:#b91c1c}"
    "pre{white-space:pre-wrap;background:#f5f5f5;padding:1rem}"
)


def to_html(result: Mapping[str, Any], title: str) -> str:
    """One page with everything: charts, tables, gates, the machine, the definitions. It loads nothing."""
    body = [f"<h1>{escape(title)}</h1>", f"<p>{escape(_subject(result))}</p>"]
    body += [f"<p>{escape(line)}</p>" for line in found_lines(result)]
    made = charts(result)
    body += [svg.document(WIDTH, HEIGHT, chart) for _, chart in made]
    body += [f"<p>{escape(LEGEND)}</p>"] if made else []
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
