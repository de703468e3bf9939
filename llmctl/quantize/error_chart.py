"""A chart of each kind of linear's error over the layers, as an SVG file that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from llmctl.evaluate import svg

_WIDTH, _HEIGHT = 760, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 140, 40, 50
# Okabe and Ito (2008): told apart by eyes that do not see all colours.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#8A8A00")


def error_chart(title: str, errors: Mapping[str, Mapping[int, float]]) -> str:
    """The chart: a line for every kind of linear, errors on a logarithmic axis.

    Args:
        errors: kind -> layer -> relative squared error; one of 0 has no place on the axis and is left out.
    """
    lines = {kind: {layer: e for layer, e in of.items() if e > 0} for kind, of in errors.items()}
    values = [e for of in lines.values() for e in of.values()]
    layers = [layer for of in errors.values() for layer in of]
    low, high = _decades(values)
    last = max([1, *layers])

    def x(layer: int) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * layer / last

    def y(error: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * (math.log10(error) - low) / (high - low)

    body = [svg.text(_LEFT, 22, title, size=15)]
    for power in range(low, high + 1):
        at = y(10.0**power)
        body.append(svg.grid_line(_LEFT, at, _WIDTH - _RIGHT, at))
        body.append(svg.text(_LEFT - 8, at + 4, f"1e{power}", anchor="end"))
    for layer in range(0, last + 1, max(1, -(-last // 16))):
        body.append(svg.text(x(layer), _HEIGHT - _BOTTOM + 18, str(layer), anchor="middle"))
    body.append(svg.text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 12, "layer", anchor="middle"))
    for index, (kind, of) in enumerate(lines.items()):
        body += _series(kind, [(x(layer), y(error)) for layer, error in sorted(of.items())], index)
    return svg.document(_WIDTH, _HEIGHT, body)


def _decades(values: Sequence[float]) -> tuple[int, int]:
    """Powers of ten around the values, at least one apart."""
    if not values:
        return -1, 0
    low = math.floor(math.log10(min(values)))
    return low, max(low + 1, math.ceil(math.log10(max(values))))


def _series(kind: str, points: Sequence[tuple[float, float]], index: int) -> list[str]:
    colour = _COLOURS[index % len(_COLOURS)]
    dash = ' stroke-dasharray="6 3"' if index >= len(_COLOURS) else ""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    at = _TOP + 12 + 20 * index
    legend, stroke = _WIDTH - _RIGHT + 14, f'stroke="{colour}" stroke-width="2"{dash}'
    return [
        f'<polyline points="{path}" fill="none" {stroke}/>',
        *(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in points),
        f'<line x1="{legend}" y1="{at - 4}" x2="{legend + 20}" y2="{at - 4}" {stroke}/>',
        svg.text(legend + 26, at, kind),
    ]
