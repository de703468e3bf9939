"""Which of several models nobody would pass over: none is smaller, nearer to the original and faster at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from llmctl.evaluate import svg

_WIDTH, _HEIGHT = 760, 460
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 200, 48, 56
_LEAST_KL = 1e-6  # where a model that is the original is drawn


@dataclass(frozen=True)
class Point:
    """A model: its size in bytes, its KL from the original in nats a token, tokens a second (None: not measured)."""

    label: str
    size: int
    kl: float
    speed: float | None

    def beats(self, other: Point) -> bool:
        """Whether it is no worse in anything and better in something; a speed that is not known is no argument."""
        mine, others = (p.speed if None not in (self.speed, other.speed) else 0.0 for p in (self, other))
        assert mine is not None
        assert others is not None
        no_worse = self.size <= other.size and self.kl <= other.kl and mine >= others
        return no_worse and (self.size < other.size or self.kl < other.kl or mine > others)


def front(points: Sequence[Point]) -> list[bool]:
    """For each point, whether no other beats it: the Pareto front of size, KL and speed."""
    return [not any(other.beats(point) for other in points) for point in points]


def chart(points: Sequence[Point], title: str) -> str:
    """An SVG of size (across) and KL (up, logarithmic); areas are speeds, filled points are the front's."""
    size_range = _widened(min(p.size for p in points), max(p.size for p in points))
    kls = [max(p.kl, _LEAST_KL) for p in points]
    low, high = math.floor(math.log10(min(kls))), math.ceil(math.log10(max(kls)) + 1e-9)
    high = max(high, low + 1)

    def x(size: float) -> float:
        return _LEFT + (size - size_range[0]) / (size_range[1] - size_range[0]) * (_WIDTH - _LEFT - _RIGHT)

    def y(kl: float) -> float:
        return _TOP + (high - math.log10(max(kl, _LEAST_KL))) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [svg.text(_LEFT, 24, title, size=15)]
    for power in range(low, high + 1):
        parts += [svg.grid_line(_LEFT, y(10**power), _WIDTH - _RIGHT, y(10**power))]
        parts += [svg.text(_LEFT - 8, y(10**power) + 4, f"{10.0**power:g}", anchor="end")]
    for step in range(5):
        size = size_range[0] + step / 4 * (size_range[1] - size_range[0])
        parts += [svg.text(x(size), _HEIGHT - _BOTTOM + 20, f"{size / 2**20:.4g}", anchor="middle")]
    parts += [svg.text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 12, "size, MiB", anchor="middle")]
    parts += [svg.text(_LEFT - 60, _TOP - 14, "KL from the original, nats a token")]
    on_front = front(points)
    line = sorted((x(p.size), y(p.kl)) for p, is_on in zip(points, on_front, strict=True) if is_on)
    steps = " ".join(f"{a:.1f},{b:.1f}" for a, b in line)
    parts += [f'<polyline points="{steps}" fill="none" stroke="#0a7" stroke-dasharray="4 3"/>']
    fastest = max((p.speed or 0.0 for p in points), default=0.0)
    for point, is_on in zip(points, on_front, strict=True):
        radius = 4 + 8 * math.sqrt((point.speed or 0.0) / fastest) if fastest else 6
        fill = "#0a7" if is_on else "#fff"
        at = f'cx="{x(point.size):.1f}" cy="{y(point.kl):.1f}" r="{radius:.1f}"'
        said = point.label + ("" if point.speed is None else f", {point.speed:.0f} tok/s")
        parts += [f'<circle {at} fill="{fill}" fill-opacity="0.7" stroke="#0a7"><title>{escape(said)}</title></circle>']
        parts += [svg.text(x(point.size) + radius + 4, y(point.kl) + 4, said)]
    return svg.document(_WIDTH, _HEIGHT, parts)


def _widened(low: float, high: float) -> tuple[float, float]:
    """A range with some room at its ends, and never empty."""
    room = (high - low) * 0.05 or max(high * 0.05, 1.0)
    return low - room, high + room
