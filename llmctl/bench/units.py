"""Figures as people read them: units by a metric's name, few digits, shares as percentages."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_UNITS = {
    "_ms": "ms",
    "request_throughput": "req/s",
    "requests_per_second": "req/s",
    "request_goodput": "req/s",
    "throughput": "tok/s",
    "tokens_per_s": "tok/s",
    "tokens_per_second": "tok/s",
    "_tokens": "tok",
    "ratio": "",
    "latency": "s",
    "duration": "s",
    "elapsed_time": "s",
    "_seconds": "s",
    "_bytes": "B",
}
_MOST_NOISE = 10.0
"""Beyond it values say nothing, and figures mislead."""


def unit(metric: str) -> str:
    """Unit of a metric by its name."""
    return next((text for ending, text in _UNITS.items() if metric.endswith(ending)), "")


def brief(value: float) -> str:
    """Three digits, or all before the point."""
    if float(value).is_integer() or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}".removesuffix(".0") if abs(value) >= 10 else f"{value:.3g}"


def figure(value: object) -> str:
    """``brief`` of a number, ``-`` of what is none."""
    return brief(value) if isinstance(value, int | float) and math.isfinite(value) else "-"


def interval(row: Mapping[str, Any], digits: int = 3) -> str:
    """``0.98–1.02`` of a ratio in a result; what is beyond ten times as much is not told apart."""
    if row["low"] is None:
        return "-"
    high = row["high"]
    end = f"{high:.{digits}f}" if high is not None and high < 10 else "10 and more"
    return f"{row['low']:.{digits}f}–{end}"


def percent(share: float) -> str:
    """A share as a percentage of two digits, or all before the point."""
    return f"{100 * share:.0f}%" if abs(share) >= 0.0995 else f"{100 * share:.2g}%"


def noise(share: float) -> str:
    """How far an interval reaches, as ``noise ±2%``."""
    return f"noise ±{percent(min(share, _MOST_NOISE))}"


def quantity(metric: str, value: float) -> str:
    """A figure with its unit; ratios as percentages."""
    if metric.endswith("_ratio"):
        return f"{100 * value:.4g}%"
    return f"{brief(value)} {unit(metric)}".strip()


def changed(metric: str, before: float, after: float, change: float, *more: str) -> str:
    """``fell 78% (181 → 40 tok/s; allowed 5%, noise ±2%)``, of which ``more`` is what stands after the semicolon."""
    verb = "fell" if change < 0 else "rose"
    how = "did not change" if abs(change) < 0.0005 else f"{verb} {percent(abs(change))}"
    told = f"{brief(before)} → {quantity(metric, after)}"
    return f"{how} ({'; '.join(filter(None, (told, ', '.join(more))))})"
