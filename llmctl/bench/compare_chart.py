"""The ratios of ``bench compare`` and their intervals as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

from llmctl.bench.compare_report import level, shown_ratios
from llmctl.bench.metrics import higher_is_better
from llmctl.bench.units import interval
from llmctl.bench.verdict import headline
from llmctl.evaluate import svg

_WIDTH, _LEFT, _RIGHT, _TOP, _ROW = 760, 220, 40, 64, 26
_COLOURS = {"regression": "#c33", "pass": "#0a7", "undecided": "#c80", None: "#888"}


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
    parts += [svg.text(12, 44, f"B/A, {level(result)}" if rows else "no whole round", size=11)]
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
