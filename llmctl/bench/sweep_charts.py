"""A sweep's charts: each latency over throughput, goodput over load; the parts of an SVG, and all in one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmctl.bench.curves import HEIGHT, WIDTH, Line, Series, Spot, curves
from llmctl.bench.gate import parse_slos
from llmctl.bench.sweep_plan import RATE
from llmctl.bench.sweep_view import level_of, sentence, variant_of
from llmctl.evaluate import svg

_LATENCIES = (
    ("median_ttft_ms", "Time to first token, median"),
    ("p99_ttft_ms", "Time to first token, p99"),
    ("median_tpot_ms", "Time per output token, median"),
    ("p99_itl_ms", "Inter-token latency, p99"),
    ("median_e2el_ms", "End-to-end latency, median"),
)
LEGEND = "Ring: the knee. Hollow: misses an objective. Dashed: the objective."
"""Of every chart."""


def charts(result: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """(title, parts) of every chart: each latency over output throughput, then goodput over load."""
    points = [point for point in result["points"] if point["completed"]]
    limits = {slo.metric: slo.limit for slo in parse_slos(result["workload"]["slo"]) if slo.op in ("<=", "<")}
    made = []
    for key, title in _LATENCIES:
        shown = [point for point in points if point.get(key) is not None]
        if shown:
            lines = [Line(limits[key], f"objective {limits[key]:g} ms")] if key in limits else []
            series = _series(shown, lambda p, key=key: (p["output_throughput"], p[key]))
            made.append((title, curves(title, "output throughput, tokens a second", "ms", series, lines)))
    if any(point.get("request_goodput") is not None for point in points):
        title = "Goodput: requests a second within every limit of --goodput"
        across = "requests a second offered" if result["axis"] == RATE else "requests at once"
        finite = [point for point in points if _load(result, point) is not None]
        series = _series(finite, lambda p: (_load(result, p) or 0.0, p["request_goodput"]))
        made.append((title, curves(title, across, "good requests a second", series)))
    return made


def _load(result: Mapping[str, Any], point: Mapping[str, Any]) -> float | None:
    """A point's place on the axis; None: an infinite rate."""
    value = point[result["axis"]]
    return None if value in (None, "inf") else float(value)


def _series(points: Sequence[Mapping[str, Any]], place: Any) -> list[Series]:
    groups: dict[str, list[Spot]] = {}
    for point in points:
        x, y = place(point)
        said = sentence(variant_of(point), level_of(point), point)
        word = level_of(point).label + (" (knee)" if point["knee"] else "")
        spot = Spot(x, y, said, word, ringed=point["knee"], filled=point["meets"])
        groups.setdefault(variant_of(point).label, []).append(spot)
    return [Series(label, tuple(spots)) for label, spots in groups.items()]


def to_svg(result: Mapping[str, Any]) -> str:
    """All charts in one file, one below the other."""
    parts = []
    made = charts(result)
    for i, (_, chart) in enumerate(made):
        parts += [f'<g transform="translate(0 {i * HEIGHT})">', *chart, "</g>"]
    return svg.document(WIDTH, max(1, len(made)) * HEIGHT, parts)
