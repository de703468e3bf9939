"""Charts of a run as SVG text: decode rates by batch against what the memory's read rate allows, and prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

from engine_check.goals import Results, get
from engine_check.models import SHAPES, model

_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 620, 360, 70, 40, 170, 50
_COLOURS = ("#1b6ca8", "#c4572e", "#3c8d40", "#7a4fa3", "#8a8a8a", "#b58900")


@dataclass(frozen=True)
class Line:
    """A named series of (x, y) points; ``dashed``: a bound, not a measurement."""

    name: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


def svg(title: str, x_name: str, y_name: str, lines: Sequence[Line]) -> str:
    """One chart, both axes logarithmic, with a tick at every x that a line has."""
    xs = sorted({x for line in lines for x, _ in line.points})
    ys = [y for line in lines for _, y in line.points]
    low, high = 10 ** math.floor(math.log10(min(ys))), 10 ** math.ceil(math.log10(max(ys)))
    across, up = _Axis(xs[0], xs[-1], _LEFT, _WIDTH - _RIGHT), _Axis(low, high, _HEIGHT - _BOTTOM, _TOP)
    middle = (_LEFT + _WIDTH - _RIGHT) / 2, (_TOP + _HEIGHT - _BOTTOM) / 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif" '
        f'font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="22" font-size="14" font-weight="bold">{escape(title)}</text>',
        f'<text x="{middle[0]:.0f}" y="{_HEIGHT - 12}" text-anchor="middle">{escape(x_name)}</text>',
        f'<text x="16" y="{middle[1]:.0f}" text-anchor="middle" '
        f'transform="rotate(-90 16 {middle[1]:.0f})">{escape(y_name)}</text>',
    ]
    for x in xs:
        parts.append(_tick(across(x), _HEIGHT - _BOTTOM + 16, f"{x:g}", "middle"))
    value = low
    while value <= high:
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{up(value):.1f}" y2="{up(value):.1f}" stroke="#ddd"/>'
        )
        parts.append(_tick(_LEFT - 6, up(value) + 4, f"{value:,g}" if value < 1e4 else f"{value:,.0f}", "end"))
        value *= 10
    for i, line in enumerate(lines):
        parts += _drawn(line, i, across, up)
    return "\n".join([*parts, "</svg>"]) + "\n"


class _Axis:
    """Logarithmic, from one pixel to another."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self._low, self._span = math.log(low), math.log(high) - math.log(low) or 1.0
        self._start, self._length = start, end - start

    def __call__(self, value: float) -> float:
        return self._start + (math.log(value) - self._low) / self._span * self._length


def _tick(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#444">{text}</text>'


def _drawn(line: Line, number: int, across: _Axis, up: _Axis) -> list[str]:
    colour = _COLOURS[number % len(_COLOURS)]
    places = [(across(x), up(y)) for x, y in sorted(line.points)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dash = ' stroke-dasharray="5 4"' if line.dashed else ""
    parts = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>']
    if not line.dashed:
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
    y = _TOP + 14 + 18 * number
    x = _WIDTH - _RIGHT + 12
    parts.append(f'<line x1="{x}" x2="{x + 20}" y1="{y - 4}" y2="{y - 4}" stroke="{colour}" stroke-width="2"{dash}/>')
    parts.append(f'<text x="{x + 26}" y="{y}">{escape(line.name)}</text>')
    return parts


def decode_chart(results: Results, shape: str = "Llama-3-8B", context: int = 512) -> str | None:
    """Tokens a second by batch, with the bound that reading weights and cache once sets; None: nothing measured."""
    read = get(results, "rates", "read GB/s")
    lines = []
    for name, found in (get(results, "models") or {}).items():
        own, _, kind = name.rpartition(" ")
        cases = [c for c in found.get("decode", {}).values() if c["context"] == context]
        if own != shape or not cases:
            continue
        lines.append(Line(kind, [(c["batch"], c["tok/s"]) for c in cases]))
        if read and own in SHAPES:
            paper = model(own, kind)
            bound = [(c["batch"], c["batch"] * read * 1e9 / paper.decode_bytes(c["batch"], context)) for c in cases]
            lines.append(Line(f"{kind}, read bound", bound, dashed=True))
    if not lines:
        return None
    return svg(f"{shape}: decode at {context} positions", "sequences", "tokens a second", lines)


def prefill_chart(results: Results) -> str | None:
    """Operations a second by tokens of a prompt, with the device's matmul rate; None: nothing measured."""
    lines = []
    for name, found in (get(results, "models") or {}).items():
        points = [(c["tokens"], c["TFLOP/s"]) for c in found.get("prefill", {}).values()]
        if points:
            lines.append(Line(name, points))
    matmul = get(results, "rates", "matmul TFLOP/s")
    if not lines:
        return None
    if matmul:
        xs = [x for line in lines for x, _ in line.points]
        lines.append(Line("matmul", [(min(xs), matmul), (max(xs), matmul)], dashed=True))
    return svg("Prompts in one step", "tokens", "TFLOP/s", lines)


def charts(results: Mapping[str, Any]) -> dict[str, str]:
    """SVG by file name, of what was measured."""
    found = {"gpu_engine.svg": decode_chart(results), "gpu_engine_prefill.svg": prefill_chart(results)}
    return {name: text for name, text in found.items() if text is not None}
