"""Medians, spreads and ratios of the visits, as JSON data and as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from peers.measure import Figures, Visit, Workload


@dataclass(frozen=True)
class Spread:
    """Median, lowest and highest of repeats."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))

    def show(self, decimals: int = 0) -> str:
        """``481 (471–483)``; the median alone when there is no spread."""
        middle, low, high = (f"{x:,.{decimals}f}" for x in (self.median, self.low, self.high))
        return middle if low == high else f"{middle} ({low}–{high})"

    def to_json(self) -> dict[str, float]:
        """As JSON data."""
        return {"median": self.median, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Metric:
    """A figure of the table. ``more``: whether a higher one is better."""

    name: str
    heading: str
    more: bool
    decimals: int
    value: Callable[[Figures], float]


RATE = Metric("output_rate", "output tok/s", True, 0, lambda f: f.output_rate)
DECODE = Metric("decode_rate", "decode tok/s", True, 0, lambda f: f.decode_rate)
TTFT = Metric("ttft", "TTFT p50, ms", False, 0, lambda f: f.ttft)
ITL = Metric("itl", "ITL p50, ms", False, 1, lambda f: f.itl)
METRICS = (RATE, DECODE, TTFT, ITL)


SERVER_FIGURES = {
    "start_seconds": ("start to ready, s", 1),
    "peak_memory_mib": ("peak memory, MiB", 0),
    "idle_busy_percent": ("busy before, %", 0),
    "others_percent": ("others meanwhile, %", 0),
    "stolen_percent": ("stolen, %", 0),
}
"""What is said of a server beside its workloads: heading and decimals of each figure."""


class Measured(Protocol):
    """What tables and charts are made of: the visits of a run (``Results``), or what is kept of one (``kept.Kept``)."""

    @property
    def names(self) -> Sequence[str]:
        """Contestants."""
        ...

    def spread(self, name: str, work: str, metric: Metric) -> Spread:
        """A figure of a contestant over the repeats."""
        ...

    def ratio(self, ours: str, other: str, work: str, metric: Metric) -> Spread | None:
        """``ours / other``, taken within each repeat."""
        ...

    def best_peer(self, own: Sequence[str], work: str, metric: Metric) -> str | None:
        """The contestant that is not ours with the best median."""
        ...

    def server(self, name: str) -> Mapping[str, Spread]:
        """By the names of ``SERVER_FIGURES``."""
        ...


class Results:
    """The visits of a run, by contestant and repeat."""

    def __init__(self, visits: Sequence[Visit]) -> None:
        self.visits = list(visits)
        self.names = list(dict.fromkeys(v.contestant for v in sorted(visits, key=lambda v: v.repeat)))

    def of(self, name: str) -> list[Visit]:
        """One contestant's visits, by repeat."""
        return sorted((v for v in self.visits if v.contestant == name), key=lambda v: v.repeat)

    def spread(self, name: str, work: str, metric: Metric) -> Spread:
        """A figure of a contestant over the repeats."""
        return Spread.of([metric.value(v.figures[work]) for v in self.of(name)])

    def ratio(self, ours: str, other: str, work: str, metric: Metric) -> Spread | None:
        """``ours / other`` of each repeat that both have, but for a peer's 0 (tokens in one burst); None without one.

        Both sides of a ratio come from the same repeat, minutes apart: what slows the machine for longer cancels.
        """
        there = {v.repeat: metric.value(v.figures[work]) for v in self.of(other)}
        pairs = [(metric.value(v.figures[work]), there[v.repeat]) for v in self.of(ours) if there.get(v.repeat)]
        return Spread.of([a / b for a, b in pairs]) if pairs else None

    def best_peer(self, own: Sequence[str], work: str, metric: Metric) -> str | None:
        """The contestant that is not ours with the best median; None without peers."""
        peers = [name for name in self.names if name not in own]
        if not peers:
            return None
        choose = max if metric.more else min
        return choose(peers, key=lambda name: self.spread(name, work, metric).median)

    def server(self, name: str) -> dict[str, Spread]:
        """Start, memory, and what else the machine did."""
        visits = self.of(name)
        figures = [f for v in visits for f in v.figures.values()]
        found = (
            [v.start_seconds for v in visits],
            [v.peak_memory / 2**20 for v in visits],
            [100 * f.idle_busy for f in figures],
            [100 * f.others for f in figures],
            [100 * f.stolen for f in figures],
        )
        return {key: Spread.of(values) for key, values in zip(SERVER_FIGURES, found, strict=True)}


def to_markdown(
    results: Measured,
    workloads: Sequence[Workload],
    titles: Mapping[str, str],
    own: Sequence[str],
    header: Sequence[str],
    missing: Mapping[str, str],
) -> str:
    """The whole report.

    Args:
        titles: by contestant's name. own: names of llmctl's contestants; ratios are the first's that was measured.
        header: lines about machine and method. missing: why a contestant has no figures, by name.
    """
    lines = [*header, "", *tables(results, workloads, titles, own)]
    lines += [f"* not measured: {titles.get(name, name)}: {reason}" for name, reason in missing.items()]
    return "\n".join(lines).rstrip() + "\n"


def tables(
    results: Measured,
    workloads: Sequence[Workload],
    titles: Mapping[str, str],
    own: Sequence[str],
    heading: str = "###",
) -> list[str]:
    """A table a workload, and one of start and memory, each below its heading."""
    lines: list[str] = []
    for work in workloads:
        lines += [f"{heading} {work.title}", "", *_workload_table(results, work, titles, own), ""]
        lines += [*_best_lines(results, work, titles, own), ""]
    return [*lines, f"{heading} Start and memory", "", *_server_table(results, titles), ""]


def _rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    marks = ["---"] + ["--:"] * (len(header) - 1)
    return ["| " + " | ".join(cells) + " |" for cells in (header, marks, *rows)]


def main_metric(work: Workload) -> Metric:
    """One stream is judged by its decode rate, many by the tokens of all."""
    return DECODE if work.concurrency == 1 else RATE


def _measured_own(results: Measured, own: Sequence[str]) -> str | None:
    return next((name for name in own if name in results.names), None)


def _workload_table(results: Measured, work: Workload, titles: Mapping[str, str], own: Sequence[str]) -> list[str]:
    shown = (DECODE, RATE, TTFT, ITL) if work.concurrency == 1 else (RATE, TTFT, ITL)
    ours = _measured_own(results, own)
    main = main_metric(work)
    head = ["server", *(m.heading for m in shown)]
    if ours:
        head += [f"llmctl ÷ it: {main.heading}", "llmctl ÷ it: TTFT"]
    rows = []
    for name in results.names:
        row = [titles[name], *(results.spread(name, work.name, m).show(m.decimals) for m in shown)]
        if ours:
            row += ["" if name == ours else show_ratio(results.ratio(ours, name, work.name, m)) for m in (main, TTFT)]
        rows.append(row)
    return _rows(head, rows)


def show_ratio(ratio: Spread | None) -> str:
    """``2.94 (2.78–3.41)×``; a dash where there is none."""
    return "–" if ratio is None else f"{ratio.show(2)}×"


def _best_lines(results: Measured, work: Workload, titles: Mapping[str, str], own: Sequence[str]) -> list[str]:
    ours = _measured_own(results, own)
    lines = []
    for metric in (main_metric(work), TTFT):
        best = results.best_peer(own, work.name, metric)
        if ours and best:
            ratio = show_ratio(results.ratio(ours, best, work.name, metric))
            lines.append(f"* {metric.heading} against the best peer ({titles[best]}): {ratio}")
    return lines


def _server_table(results: Measured, titles: Mapping[str, str]) -> list[str]:
    head = ["server", *(heading for heading, _ in SERVER_FIGURES.values())]
    rows = []
    for name in results.names:
        found = results.server(name)
        rows.append([titles[name], *(found[key].show(decimals) for key, (_, decimals) in SERVER_FIGURES.items())])
    return _rows(head, rows)


def to_json(results: Results, workloads: Sequence[Workload], own: Sequence[str]) -> dict[str, object]:
    """Summary by contestant and workload, ratios of llmctl to each peer, servers, and every visit."""
    ours = _measured_own(results, own)
    summary: dict[str, object] = {}
    ratios: dict[str, object] = {}
    best: dict[str, object] = {}
    for work in workloads:
        summary[work.name] = {
            name: {m.name: results.spread(name, work.name, m).to_json() for m in METRICS} for name in results.names
        }
        best[work.name] = {m.name: results.best_peer(own, work.name, m) for m in METRICS}
        if ours is None:
            continue
        found = {
            name: {m.name: results.ratio(ours, name, work.name, m) for m in METRICS}
            for name in results.names
            if name != ours
        }
        ratios[work.name] = {
            name: {key: ratio and ratio.to_json() for key, ratio in row.items()} for name, row in found.items()
        }
    return {
        "summary": summary,
        "llmctl_over_peer": ratios,
        "best_peer": best,
        "servers": {name: {k: v.to_json() for k, v in results.server(name).items()} for name in results.names},
        "visits": [v.to_json() for v in results.visits],
    }
