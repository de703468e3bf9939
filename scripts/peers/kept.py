"""What is kept in the repository of a run of ``bench_peers.py``: medians, spreads and ratios, without the visits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peers.measure import WORKLOADS, Workload
from peers.report import SERVER_FIGURES, Metric, Spread

KEYS = ("header", "note", "versions", "titles", "own", "summary", "llmctl_over_peer", "best_peer", "servers")
"""What is kept of a run's JSON; ``note`` and ``versions`` if they are there."""


class Kept:
    """Such a document, as ``report.Measured``.

    Attributes:
        header: machine and method, in a line. titles: by contestant's name. own: names of llmctl's contestants.
        versions: of what was installed for each peer, if that was kept.
        workloads: those that were measured.

    Raises:
        ValueError: a document that is not of a run, or of one without a workload.
    """

    def __init__(self, document: Mapping[str, Any]) -> None:
        missing = [key for key in KEYS if key not in ("note", "versions") and key not in document]
        if missing:
            raise ValueError(f"not a report of bench_peers.py: no {', '.join(missing)}")
        self._document = document
        self.header: str = document["header"]
        self.titles: dict[str, str] = document["titles"]
        self.own: list[str] = document["own"]
        self.versions: dict[str, dict[str, str]] = document.get("versions", {})
        self.workloads: list[Workload] = [work for name, work in WORKLOADS.items() if name in document["summary"]]
        if not self.workloads:
            raise ValueError(f"expected figures of some of {', '.join(WORKLOADS)}, found {list(document['summary'])}")
        self.names: list[str] = list(document["servers"])

    def spread(self, name: str, work: str, metric: Metric) -> Spread:
        """A figure of a contestant over the repeats."""
        return Spread(**self._document["summary"][work][name][metric.name])

    def ratio(self, ours: str, other: str, work: str, metric: Metric) -> Spread | None:
        """``ours / other``, which is kept of the first of ours alone."""
        assert ours == self.own[0]
        found = self._document["llmctl_over_peer"][work].get(other, {}).get(metric.name)
        return Spread(**found) if found else None

    def best_peer(self, own: Sequence[str], work: str, metric: Metric) -> str | None:
        """As the run found it."""
        assert list(own) == self.own
        name: str | None = self._document["best_peer"][work][metric.name]
        return name

    def server(self, name: str) -> Mapping[str, Spread]:
        """Start, memory, and what else the machine did."""
        return {key: Spread(**self._document["servers"][name][key]) for key in SERVER_FIGURES}


def kept(document: Mapping[str, Any]) -> dict[str, Any]:
    """Of a run's JSON, what the repository keeps: neither the visits nor places of the machine."""
    return {key: document[key] for key in KEYS if key in document}
