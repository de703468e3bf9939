"""The result of ``bench compare`` for people: tables, Markdown, CSV, and an SVG of the intervals."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from llmctl.bench import report
from llmctl.bench.metrics import higher_is_better
from llmctl.bench.table import print_verdict
from llmctl.bench.units import figure, interval, quantity, unit
from llmctl.bench.verdict import headline
from llmctl.evaluate import svg

_SHOWN = ("median_", "p99_")
_WIDTH, _LEFT, _RIGHT, _TOP, _ROW = 760, 220, 40, 64, 26
_COLOURS = {"regression": "#c33", "pass": "#0a7", "undecided": "#c80", None: "#888"}


def shown_ratios(result: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The ratios that a person is shown: those compared, then speeds, medians and 99th percentiles."""
    rows = result["ratios"].items()
    return [
        (name, row) for name, row in rows if row["decision"] or name.startswith(_SHOWN) or name.endswith("throughput")
    ]


def print_comparison(result: Mapping[str, Any], title: str, console: Console) -> None:
    """The verdict first, then the ratios."""
    console.print(f"[bold]{title}: {headline(result)}[/]", highlight=False)
    print_verdict(result, console)
    for letter in ("a", "b"):
        console.print(f"{letter.upper()}: {_served(result[letter])}", markup=False, highlight=False)
    if not result["ratios"]:
        return
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("metric", no_wrap=True)
    for column in ("A", "B", "B/A", "interval"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, row in shown_ratios(result):
        table.add_row(_with_unit(name), figure(row["a"]), figure(row["b"]), f"{row['ratio']:.3f}", interval(row))
    console.print(table)
    console.print(_level(result), highlight=False)


def _served(side: Mapping[str, Any]) -> str:
    version = f", version {side['version']}" if side["version"] else ""
    return f"{side['served']} (model {side['model_id']}{version})"


def _with_unit(metric: str) -> str:
    return f"{metric.removesuffix('_ms')}, {unit(metric)}" if unit(metric) else metric


def _level(result: Mapping[str, Any]) -> str:
    row = next(iter(result["ratios"].values()))
    return f"{result['num_rounds']} of at most {result['max_rounds']} rounds; {row['method']}, {row['confidence']:.2%}"


def to_markdown(result: Mapping[str, Any], title: str) -> str:
    """The verdict, and the ratios and the set-up folded away."""
    sides = [f"- {letter.upper()}: {report.cell(_served(result[letter]))}" for letter in ("a", "b")]
    rows = [
        [
            name,
            *(quantity(name, row[letter]) for letter in ("a", "b")),
            f"{row['ratio']:.3f}",
            interval(row),
            row["decision"] or "",
        ]
        for name, row in result["ratios"].items()
    ]
    table = report.table(["metric", "A", "B", "B/A", "interval", ""], rows)
    ratios = [*table, "", f"{_level(result)}."] if rows else ["no whole round"]
    return "\n".join(
        [
            *report.verdict_markdown(result, title),
            *sides,
            "",
            *report.folded("Ratios", ratios),
            "",
            report.where(result),
            "",
        ]
    )


def to_csv(result: Mapping[str, Any]) -> str:
    """A header, and a row a visit."""
    visits = [
        {"round": number, "order": played["order"], "place": place, **visit}
        for number, played in enumerate(result["rounds"], start=1)
        for place, visit in enumerate(played["visits"], start=1)
    ]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(visits[0]) if visits else ["round"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(visits)
    return out.getvalue()


def to_svg(result: Mapping[str, Any], title: str) -> str:
    """A row a metric: its ratio and interval on one logarithmic axis, with what is allowed to become worse shaded."""
    rows = shown_ratios(result)
    height = _TOP + _ROW * max(1, len(rows)) + 48
    allowed = next((gate["limit"] for gate in result["gates"] if gate["kind"] != "requests"), 0.0)
    reach = _reach([row for _, row in rows], allowed)

    def x(ratio: float) -> float:
        inside = min(max(math.log(ratio), -reach), reach) if ratio > 0 else -reach
        return _LEFT + (inside + reach) / (2 * reach) * (_WIDTH - _LEFT - _RIGHT)

    parts = [svg.text(12, 24, f"{title}: {headline(result)}", size=15)]
    parts += [svg.text(12, 44, f"B/A, {_level(result)}" if rows else "no whole round", size=11)]
    for step in range(-2, 3):
        at = math.exp(reach * step / 2)
        parts += [svg.grid_line(x(at), _TOP - 8, x(at), height - 36)]
        parts += [svg.text(x(at), height - 20, f"{at:.3f}", size=11, anchor="middle")]
    for number, (name, row) in enumerate(rows):
        parts += _row_parts(name, row, _TOP + _ROW * number + _ROW / 2, x, allowed)
    return svg.document(_WIDTH, height, parts)


def _reach(rows: Sequence[Mapping[str, Any]], allowed: float) -> float:
    """How far the axis goes to either side of 1, as a logarithm: to every ratio, and to intervals within reason."""
    ratios = max([abs(math.log(row["ratio"])) for row in rows] + [math.log1p(2 * allowed), 0.01])
    ends = [abs(math.log(end)) for row in rows for end in (row["low"], row["high"]) if _drawable(end) and end > 0]
    return 1.1 * max(ratios, min(max(ends, default=0.0), 3 * ratios))


def _row_parts(name: str, row: Mapping[str, Any], y: float, x: Any, allowed: float) -> Sequence[str]:
    colour = _COLOURS[row["decision"]]
    parts = [svg.text(_LEFT - 10, y + 4, name, anchor="end")]
    if row["decision"]:
        worse = (max(1 - allowed, 0.0), 1.0) if higher_is_better(name) else (1.0, 1 + allowed)
        left, right = (x(end) for end in worse)
        parts.append(
            f'<rect x="{left:.1f}" y="{y - 9:.1f}" width="{right - left:.1f}" height="18" fill="#eee">'
            f"<title>allowed</title></rect>"
        )
    said = f"{name}: {row['ratio']:.3f} ({interval(row)}){', ' + row['decision'] if row['decision'] else ''}"
    if _drawable(row["low"]) and _drawable(row["high"]):
        parts.append(
            f'<line x1="{x(row["low"]):.1f}" y1="{y:.1f}" x2="{x(row["high"]):.1f}" y2="{y:.1f}" '
            f'stroke="{colour}" stroke-width="2"/>'
        )
    parts.append(
        f'<circle cx="{x(row["ratio"]):.1f}" cy="{y:.1f}" r="4" fill="{colour}"><title>{escape(said)}</title></circle>'
    )
    return parts


def _drawable(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
