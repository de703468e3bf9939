"""A Prometheus histogram that is cheap enough for every token of every stream."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector


class Buckets:
    """Counts and sum of what was observed under one set of label values; ``bounds`` are ascending, without +Inf."""

    __slots__ = ("_bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value, in the first bucket whose bound is not below it."""
        self.counts[bisect_left(self._bounds, value)] += 1
        self.sum += value


class Histogram(Collector):
    """A family of ``Buckets``. A value costs one bisection; prometheus_client's own histogram takes two locks and a
    walk over the buckets, which is felt when it is once per token of every stream.

    Args:
        bounds: upper bounds, ascending; +Inf is added. labels: names. registry: where it is shown.
    """

    def __init__(
        self, name: str, text: str, bounds: Sequence[float], labels: Sequence[str], registry: CollectorRegistry
    ) -> None:
        self._name, self._text, self._labels = name, text, tuple(labels)
        self._bounds = tuple(float(b) for b in bounds)
        self._children: dict[tuple[str, ...], Buckets] = {}
        registry.register(self)

    def labels(self, *values: str) -> Buckets:
        """The buckets of these label values, made when they are first asked for."""
        if values not in self._children:
            self._children[values] = Buckets(self._bounds)
        return self._children[values]

    def collect(self) -> Iterator[Metric]:
        """Part of prometheus_client's Collector."""
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        bounds = [*(str(b) for b in self._bounds), "+Inf"]
        for values, child in self._children.items():
            family.add_metric(values, list(zip(bounds, accumulate(child.counts), strict=True)), child.sum)
        yield family
