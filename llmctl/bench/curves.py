"""Charts of curves as SVG: a few series of points on two axes, with ticks at round numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from llmctl.evaluate import svg

WIDTH, HEIGHT = 760, 394
_LEFT, _RIGHT, _TOP, _BOTTOM = 84, 24, 78, 52
_COLOURS = ("#00897b", "#c2410c", "#1d4ed8", "#7e22ce", "#a16207", "#be123c", "#374151")
_MOST_DECADES = 8
_LOG_FROM = 30.0
"""Ratio of the largest to the least value from which an axis is logarithmic."""


@dataclass(frozen=True)
class Spot:
    """A point: where, what its tooltip says, the word beside it, whether it is ringed, whether it is filled."""

    x: float
    y: float
    tip: str
    word: str = ""
    ringed: bool = False
    filled: bool = True


@dataclass(frozen=True)
class Series:
    """Points joined in order; ``label``: of the legend, "" for none."""

    label: str
    spots: tuple[Spot, ...]


@dataclass(frozen=True)
class Line:
    """A level across the chart, such as a limit."""

    y: float
    label: str


@dataclass(frozen=True)
class Scale:
    """Where a value stands, and the values with a tick."""

    place: Callable[[float], float]
    ticks: tuple[float, ...]


def scale(values: Sequence[float], start: float, end: float) -> Scale:
    """An axis from pixel ``start`` to ``end``: from 0, or logarithmic where values above 0 differ very much."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    if low > 0 and high / low >= _LOG_FROM:
        first, decades = math.floor(math.log10(low)), math.ceil(math.log10(high)) - math.floor(math.log10(low))
        stride = math.ceil(decades / _MOST_DECADES)
        last = first + math.ceil(decades / stride) * stride
        ticks = [10.0**power for power in range(first, last + 1, stride)]
        return Scale(lambda v: start + (math.log10(v) - first) / (last - first) * (end - start), tuple(ticks))
    top = max(high, 1e-9)
    step = _round_step(top / 5)
    count = max(1, math.ceil(top / step - 1e-9))
    return Scale(lambda v: start + v / (count * step) * (end - start), tuple(step * i for i in range(count + 1)))


def _round_step(size: float) -> float:
    """The least of 1, 2, 2.5, 5 times a power of ten that is not below ``size``."""
    power = 10.0 ** math.floor(math.log10(size))
    return next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= size * (1 - 1e-9))


def curves(
    title: str, across: str, up: str, series: Sequence[Series], lines: Sequence[Line] = (), *, top: float = 0.0
) -> list[str]:
    """The parts of a chart of ``WIDTH`` by ``HEIGHT``; ``top``: pixels above it."""
    spots = [spot for one in series for spot in one.spots]
    left, right = _LEFT, WIDTH - _RIGHT
    high, low = top + _TOP, top + HEIGHT - _BOTTOM
    x = scale([spot.x for spot in spots], left, right)
    y = scale([*(spot.y for spot in spots), *(line.y for line in lines)], low, high)
    parts = [svg.text(left, top + 24, title, size=15)]
    for tick in y.ticks:
        parts += [svg.grid_line(left, y.place(tick), right, y.place(tick))]
        parts += [svg.text(left - 8, y.place(tick) + 4, f"{tick:,.4g}", anchor="end")]
    for tick in x.ticks:
        parts += [svg.grid_line(x.place(tick), high, x.place(tick), low)]
        parts += [svg.text(x.place(tick), low + 18, f"{tick:,.4g}", anchor="middle")]
    parts += [svg.text((left + right) / 2, low + 38, across, anchor="middle"), svg.text(left - 70, high - 10, up)]
    for line in lines:
        at = y.place(line.y)
        parts += [
            f'<line x1="{left}" y1="{at:.1f}" x2="{right}" y2="{at:.1f}" stroke="#b91c1c" stroke-dasharray="6 4"/>'
        ]
        parts += [svg.text(right, at - 5, line.label, anchor="end")]
    for i, one in enumerate(series):
        parts += _drawn(one, _COLOURS[i % len(_COLOURS)], x, y)
    return parts + _legend(series, top + 44)


def _drawn(one: Series, colour: str, x: Scale, y: Scale) -> list[str]:
    path = " ".join(f"{x.place(spot.x):.1f},{y.place(spot.y):.1f}" for spot in one.spots)
    parts = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>']
    for spot in one.spots:
        at = f'cx="{x.place(spot.x):.1f}" cy="{y.place(spot.y):.1f}"'
        if spot.ringed:
            parts += [f'<circle {at} r="10" fill="none" stroke="{colour}" stroke-width="2"/>']
        fill = colour if spot.filled else "white"
        parts += [f'<circle {at} r="4.5" fill="{fill}" stroke="{colour}"><title>{escape(spot.tip)}</title></circle>']
        if spot.word:
            far = x.place(spot.x) > WIDTH - _RIGHT - 7 * len(spot.word)  # it would be cut off
            beside, anchor = (-8, "end") if far else (8, "start")
            parts += [svg.text(x.place(spot.x) + beside, y.place(spot.y) - 8, spot.word, anchor=anchor)]
    return parts


def _legend(series: Sequence[Series], at: float) -> list[str]:
    parts, left = [], float(_LEFT)
    for i, one in enumerate(series):
        if one.label:
            parts += [f'<circle cx="{left:.1f}" cy="{at - 4:.1f}" r="4.5" fill="{_COLOURS[i % len(_COLOURS)]}"/>']
            parts += [svg.text(left + 10, at, one.label)]
            left += 24 + 7 * len(one.label)
    return parts
