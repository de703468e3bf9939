"""Prometheus series of the engine and its process, put in order when somebody asks.

Gauges and counters arrive as running totals with each step's message; memory and CPU time are read from /proc.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from msgspec import structs
from prometheus_client import ProcessCollector
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from llmctl.engine.llm_engine import EngineStats

LABELS = ("model_name", "engine")
NO_STATS = EngineStats(0, 0, 0.0, 0, 0, 0, 0, 0, 0, 0)

Kind = type[CounterMetricFamily] | type[GaugeMetricFamily]


class EngineSeries(Collector):
    """What the last step's message said of the engine.

    Attributes:
        busy_seconds: the worker's, see ``StepMessage``.
        held: how many requests wait in the API process for a worker; the engine does not know of them.

    Args:
        prefix: of every name. labels: values of LABELS.
    """

    def __init__(self, prefix: str, labels: Sequence[str]) -> None:
        self._prefix, self._labels = prefix, labels
        self.stats = NO_STATS
        self.busy_seconds = 0.0
        self.held: Callable[[], int] = lambda: 0

    def collect(self) -> Iterator[Metric]:
        """Part of prometheus_client's Collector."""
        yield from self._gauges()
        stats = self.stats
        for name, text, value in (
            ("generation_tokens", "Tokens generated.", stats.num_generated_tokens),
            ("generation_tokens_forced", "Tokens of them that a grammar forced.", stats.num_forced_tokens),
            ("num_preemptions", "Preemptions of a running request.", stats.num_preemptions),
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.prefix_cache_queries),
            ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.prefix_cache_hits),
            ("engine_steps", "Steps of the engine.", stats.num_steps),
            ("engine_busy_seconds", "Wall time in which the worker had requests.", self.busy_seconds),
            ("engine_compute_seconds", "Wall time of it in which the model computed.", stats.compute_seconds),
        ):
            yield _family(CounterMetricFamily, self._prefix + name, text, self._labels, value)
        yield self._by_label(
            CounterMetricFamily,
            "prompt_tokens_cached_by_source",
            "Prompt tokens found in a cache, by where it is.",
            "source",
            {"device": stats.prefix_cache_hits},
        )
        yield self._by_label(
            CounterMetricFamily,
            "engine_seconds",
            "Wall time by what it went into: a device that computed (busy: a full step; else what bounded it), "
            "or one that did not, and why.",
            "state",
            structs.asdict(stats.state_seconds),
        )
        yield self._by_label(
            CounterMetricFamily,
            "engine_steps_by_execution",
            "Steps replayed as a CUDA graph, and steps launched kernel by kernel.",
            "execution",
            {"graph": stats.num_graph_steps, "eager": stats.num_eager_steps},
        )

    def _gauges(self) -> Iterator[Metric]:
        stats, held = self.stats, self.held()
        for name, text, value in (
            ("num_requests_running", "Requests in the running batch.", stats.num_running),
            ("num_requests_waiting", "Requests waiting to be scheduled.", stats.num_waiting + held),
            ("kv_cache_usage_perc", "Share of KV-cache blocks in use, 0 to 1.", stats.kv_cache_usage),
        ):
            yield _family(GaugeMetricFamily, self._prefix + name, text, self._labels, value)
        yield self._by_label(
            GaugeMetricFamily,
            "num_requests_waiting_by_reason",
            "Waiting requests: capacity: for a place in a step; deferred: for a worker.",
            "reason",
            {"capacity": stats.num_waiting, "deferred": held},
        )

    def _by_label(self, kind: Kind, name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
        family = kind(self._prefix + name, text, labels=(*LABELS, label))
        for value, total in values.items():
            family.add_metric((*self._labels, value), total)
        return family


def _family(kind: Kind, name: str, text: str, labels: Sequence[str], value: float) -> Metric:
    family = kind(name, text, labels=LABELS)
    family.add_metric(labels, value)
    return family


class WorkerProcessSeries(Collector):
    """Memory, CPU time and open files of the worker, as /proc has them now; what cannot be read is left out.

    Args:
        prefix, labels: as of ``EngineSeries``. pid: the worker's; None while there is none.
    """

    _NAMES = ("process_resident_memory_bytes", "process_cpu_seconds", "process_open_fds")

    def __init__(self, prefix: str, labels: Sequence[str], pid: Callable[[], int | None]) -> None:
        self._prefix, self._labels, self._pid = prefix, labels, pid

    def collect(self) -> Iterator[Metric]:
        """Part of prometheus_client's Collector."""
        if (pid := self._pid()) is None:
            return
        for found in ProcessCollector(pid=lambda: pid, registry=None).collect():
            if found.name in self._NAMES:
                name = self._prefix + found.name.replace("process_", "worker_")
                text = f"Of the worker. {found.documentation}"
                kind = CounterMetricFamily if found.type == "counter" else GaugeMetricFamily
                yield _family(kind, name, text, self._labels, found.samples[0].value)


class AdapterSeries(Collector):
    """Which adapters are in use, as endpoint pickers read it: vLLM's labels, and the time as the value.

    Args:
        prefix: of the name. most: adapters at once. names: of those that requests run with, and only wait for.
    """

    def __init__(self, prefix: str, most: int, names: Callable[[], tuple[set[str], set[str]]]) -> None:
        self._name, self._most, self._names = prefix + "lora_requests_info", most, names

    def collect(self) -> Iterator[Metric]:
        """Part of prometheus_client's Collector."""
        text = "Adapters that requests run with, and wait for; the value is the time, seconds since 1970."
        labels = ("max_lora", "running_lora_adapters", "waiting_lora_adapters")
        family = GaugeMetricFamily(self._name, text, labels=labels)
        running, waiting = (",".join(sorted(names)) for names in self._names())
        family.add_metric((str(self._most), running, waiting), time.time())
        yield family
