"""A sweep while it runs, and its table: live on a terminal, a line for every point otherwise; on stderr."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmctl.bench.progress import Progress
from llmctl.bench.sweep_plan import Level, Variant
from llmctl.bench.units import figure

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live
    from rich.table import Table

_MARKS = {True: "yes", False: "no"}


class SweepView(Progress):
    """Progress of the load under way, and the points so far."""

    def __init__(self) -> None:
        super().__init__()
        self._live: Live | None = None
        self._points: dict[tuple[Variant, Level], Mapping[str, Any]] = {}

    def log(self, line: str) -> None:
        """One line of information, above the table."""
        if self._live is not None:
            self._live.console.print(line, highlight=False, markup=False)
        else:
            super().log(line)

    def start(self, label: str, total: int) -> None:
        """Begin a load of ``total`` requests."""
        if not sys.stderr.isatty():
            super().start(label, total)
            return
        self._reset(label, total)
        if self._live is None:
            from rich.console import Console
            from rich.live import Live

            # Drawn by a thread, now and then: a table for every request would keep the load from its turn.
            console = Console(stderr=True)
            self._live = Live(console=console, get_renderable=self._shown, refresh_per_second=4, transient=True)
            self._live.start()

    def advance(self, failed: bool = False) -> None:
        """One request is done."""
        if self._live is None:
            super().advance(failed)
            return
        self._done += 1
        self._failed += failed

    def stop(self) -> None:
        """End the load; the table stays."""
        if self._live is None:
            super().stop()

    def close(self) -> None:
        """End the table."""
        super().stop()
        if self._live is not None:
            self._live.stop()
            self._live = None

    def point(self, variant: Variant, level: Level, figures: Mapping[str, Any]) -> None:
        """A point's figures so far."""
        self._points[variant, level] = figures
        if self._live is None:
            self.log(sentence(variant, level, figures))

    def _shown(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        under_way = Text(f"{self._label}: {self._done} of {self._total} requests{self._state}")
        return Group(*tables(list(self._points.values())), under_way)


def level_of(point: Mapping[str, Any]) -> Level:
    """The load of a point of the result."""
    rate = point["request_rate"]
    return Level(math.inf if rate == "inf" else float(rate), point["max_concurrency"])


def variant_of(point: Mapping[str, Any]) -> Variant:
    """The variant of a point of the result."""
    return Variant(tuple(point["variant"].items()))


def sentence(variant: Variant, level: Level, point: Mapping[str, Any]) -> str:
    """A point in one line."""
    parts = [f"{figure(point['output_throughput'])} tok/s"]
    for name, words in (("ttft", "TTFT"), ("tpot", "TPOT"), ("e2el", "E2E")):
        if point.get(f"median_{name}_ms") is not None:
            parts.append(f"{words} median {figure(point[f'median_{name}_ms'])} ms")
    failed = f", {point['failed']} failed" if point["failed"] else ""
    parts.append(f"{point['completed']} requests{failed}")
    if point["missed"]:
        parts.append("misses " + ", ".join(point["missed"]))
    return f"{', '.join(filter(None, (variant.label, level.label)))}: {', '.join(parts)}"


NOTE = "TTFT, TPOT, E2E: medians in ms; p99: of TTFT in ms; * the knee; ? chance is not ruled out at 5%."
KNEE = " *"
"""Beside the load of a knee."""
COLUMNS = ("load", "tok/s", "req/s", "good", "TTFT", "p99", "TPOT", "E2E", "meets", "$/Mtok")


def rows(points: Sequence[Mapping[str, Any]]) -> dict[str, list[list[str]]]:
    """Cells of ``COLUMNS`` by variant, in the order of the points; milliseconds are medians, p99 is TTFT's."""
    found: dict[str, list[list[str]]] = {}
    for point in points:
        cost = (point["cost_per_million_tokens"] or {}).get("output")
        good = point.get("goodput_ratio")
        figures = [point.get(key) for key in ("output_throughput", "request_throughput")]
        latencies = [point.get(f"{word}_ms") for word in ("median_ttft", "p99_ttft", "median_tpot", "median_e2el")]
        found.setdefault(variant_of(point).label, []).append(
            [
                level_of(point).label + (KNEE if point["knee"] else ""),
                *map(figure, figures),
                "-" if good is None else f"{good:.0%}",
                *map(figure, latencies),
                _MARKS[point["meets"]] + ("" if point["settled"] else "?"),
                figure(cost),
            ]
        )
    return found


def tables(points: Sequence[Mapping[str, Any]]) -> list[Table]:
    """A table for each variant; columns in which nothing stands are left out."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    made = []
    for label, cells in rows(points).items():
        table = Table(
            title=label or None, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
        )
        used = [i for i in range(len(COLUMNS)) if any(row[i] != "-" for row in cells)]
        for i in used:
            table.add_column(COLUMNS[i], justify="left" if i == 0 else "right", no_wrap=i > 0)
        for row in cells:
            table.add_row(*(row[i] for i in used))
        made.append(table)
    return made
