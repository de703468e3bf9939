"""The chart of a kind of processor: output tokens a second of every server, a group of bars a workload."""

from __future__ import annotations

from llmctl.evaluate import svg
from peers.kept import Kept
from peers.report import RATE, Spread

_WIDTH, _LEFT, _RIGHT, _TOP = 760, 190, 150, 46
_BAR, _STEP, _GROUP = 14, 19, 34
_OURS, _THEIRS, _LINE = "#1b6ca8", "#b9bfc6", "#333333"


def chart(kept: Kept, where: str = "") -> str:
    """An SVG document; the whiskers are the lowest and the highest of the repeats. ``where``: ends its title."""
    groups = [(work, [(name, kept.spread(name, work.name, RATE)) for name in kept.names]) for work in kept.workloads]
    most = max(spread.high for _, rows in groups for _, spread in rows)
    scale = (_WIDTH - _LEFT - _RIGHT) / most
    parts = [svg.text(16, 24, f"Output tokens a second, more is better{where}", size=15)]
    y = _TOP
    for work, rows in groups:
        parts.append(svg.text(16, y + 12, work.title, size=12))
        y += 22
        for name, spread in rows:
            parts += _bar(y, kept.titles[name], spread, scale, _OURS if name in kept.own else _THEIRS)
            y += _STEP
        y += _GROUP - 22
    return svg.document(_WIDTH, y + 4, parts)


def _bar(y: float, title: str, spread: Spread, scale: float, colour: str) -> list[str]:
    middle = y + _BAR / 2
    low, high = _LEFT + spread.low * scale, _LEFT + spread.high * scale
    return [
        svg.text(_LEFT - 8, y + 11, title, size=12, anchor="end"),
        f'<rect x="{_LEFT}" y="{y}" width="{spread.median * scale:.1f}" height="{_BAR}" fill="{colour}"/>',
        f'<line x1="{low:.1f}" y1="{middle}" x2="{high:.1f}" y2="{middle}" stroke="{_LINE}"/>',
        svg.text(high + 8, y + 11, spread.show(), size=12),
    ]
