"""The parts that charts are made of, as SVG that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from xml.sax.saxutils import escape


def document(width: int, height: int, parts: Iterable[str]) -> str:
    """A whole file: the parts on white."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">'
    return "\n".join([head, f'<rect width="{width}" height="{height}" fill="white"/>', *parts, "</svg>"]) + "\n"


def text(x: float, y: float, said: str, *, size: int = 12, anchor: str = "start") -> str:
    """A text; ``anchor``: start, middle or end is at ``x``."""
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}">{escape(said)}</text>'


def grid_line(x1: float, y1: float, x2: float, y2: float) -> str:
    """A line of the grid behind what is drawn."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#dddddd"/>'
