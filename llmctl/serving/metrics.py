"""Prometheus series of the server: vLLM's names under the prefix ``llmctl:``, in a registry of their own.

Gauges and counters of the engine arrive as running totals with each step's message and are put in order when somebody
asks; request latencies are observed by the API process, from the times at which things happened.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

from msgspec import structs
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from llmctl.engine.llm_engine import EngineStats
from llmctl.engine.output import TextOutput
from llmctl.engine.request import RequestTimes

PREFIX = "llmctl:"
LABELS = ("model_name", "engine")

_TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
_TOKEN_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5,
    10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_REQUEST_BUCKETS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
)  # fmt: skip
_LENGTH_BUCKETS = tuple(m * 10**e for e in range(6) for m in (1, 2, 5))
_ITERATION_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)

FINISH_REASONS = ("stop", "length", "abort", "error")
REJECTION_REASONS = ("queue_full", "context_length_exceeded", "not_ready", "invalid_request")
NO_STATS = EngineStats(0, 0, 0.0, 0, 0, 0, 0, 0, 0, 0)


class Histogram(Collector):
    """One series of bucket counts. A value costs one bisection; prometheus_client's own histogram takes two locks and a
    walk over the buckets, which is felt when it is once per token of every stream.

    Args:
        bounds: upper bounds, ascending; +Inf is added. labels: the values of LABELS.
    """

    def __init__(self, name: str, text: str, bounds: Sequence[float], labels: Sequence[str]) -> None:
        self._name, self._text, self._labels = name, text, labels
        self._bounds = tuple(float(b) for b in bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value, in the first bucket whose bound is not below it."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def collect(self) -> Iterator[Metric]:
        """Part of prometheus_client's Collector."""
        family = HistogramMetricFamily(self._name, self._text, labels=LABELS)
        bounds = [*(str(b) for b in self._bounds), "+Inf"]
        buckets = list(zip(bounds, accumulate(self._counts), strict=True))
        family.add_metric(self._labels, buckets, self._sum)
        yield family


class EngineSeries(Collector):
    """What the last step's message said of the engine; ``busy_seconds`` is the worker's, see ``StepMessage``."""

    def __init__(self, labels: Sequence[str]) -> None:
        self._labels = labels
        self.stats = NO_STATS
        self.busy_seconds = 0.0

    def collect(self) -> Iterator[Metric]:
        """Part of prometheus_client's Collector."""
        stats = self.stats
        yield self._gauge("num_requests_running", "Requests in the running batch.", stats.num_running)
        yield self._gauge("num_requests_waiting", "Requests waiting to be scheduled.", stats.num_waiting)
        yield self._gauge("kv_cache_usage_perc", "Share of KV-cache blocks in use, 0 to 1.", stats.kv_cache_usage)
        for name, text, value in (
            ("generation_tokens", "Tokens generated.", stats.num_generated_tokens),
            ("num_preemptions", "Preemptions of a running request.", stats.num_preemptions),
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.prefix_cache_queries),
            ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.prefix_cache_hits),
            ("engine_steps", "Steps of the engine.", stats.num_steps),
            ("engine_busy_seconds", "Wall time in which the worker had requests.", self.busy_seconds),
            ("engine_compute_seconds", "Wall time of it in which the model computed.", stats.compute_seconds),
        ):
            family = CounterMetricFamily(PREFIX + name, text, labels=LABELS)
            family.add_metric(self._labels, value)
            yield family
        yield self._by_label(
            "engine_seconds",
            "Wall time by what it went into: a device that computed (busy: a full step; else what bounded it), "
            "or one that did not, and why.",
            "state",
            structs.asdict(stats.state_seconds),
        )
        yield self._by_label(
            "engine_steps_by_execution",
            "Steps replayed as a CUDA graph, and steps launched kernel by kernel.",
            "execution",
            {"graph": stats.num_graph_steps, "eager": stats.num_eager_steps},
        )

    def _by_label(self, name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
        family = CounterMetricFamily(PREFIX + name, text, labels=(*LABELS, label))
        for value, total in values.items():
            family.add_metric((*self._labels, value), total)
        return family

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, text, labels=LABELS)
        family.add_metric(self._labels, value)
        return family


class ServerMetrics:
    """All series of one server. ``render`` gives the exposition text.

    Attributes:
        restarts: deaths of the worker that it was restarted after.
    """

    def __init__(self, model_name: str, engine: str = "0") -> None:
        self.registry = CollectorRegistry()
        self._label_values = (model_name, engine)
        self._engine = EngineSeries(self._label_values)
        self.registry.register(self._engine)
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of requests that began to answer.")
        self.prompt_tokens_cached = self._counter("prompt_tokens_cached", "Prompt tokens that needed no computation.")
        self._success = Counter(
            PREFIX + "request_success", "Finished requests.", (*LABELS, "finished_reason"), registry=self.registry
        )
        self._rejections = Counter(
            PREFIX + "admission_rejections", "Requests refused.", (*LABELS, "reason"), registry=self.registry
        )
        self.restarts = 0
        self._restarts = Counter(
            PREFIX + "worker_restarts", "Deaths of the worker that it was restarted after.", (*LABELS, "reason"),
            registry=self.registry,
        )  # fmt: skip
        for reason in FINISH_REASONS:
            self._success.labels(*self._label_values, reason)
        for reason in REJECTION_REASONS:
            self._rejections.labels(*self._label_values, reason)
        self.ttft = self._histogram("time_to_first_token_seconds", "Arrival to first token.", _TTFT_BUCKETS)
        self.itl = self._histogram("inter_token_latency_seconds", "Between tokens of a request.", _TOKEN_BUCKETS)
        self.tpot = self._histogram(
            "request_time_per_output_token_seconds", "Mean time per output token after the first.", _TOKEN_BUCKETS
        )
        self.e2e = self._histogram("e2e_request_latency_seconds", "Arrival to last token.", _REQUEST_BUCKETS)
        self.queue_time = self._histogram("request_queue_time_seconds", "Arrival to scheduled.", _REQUEST_BUCKETS)
        self.inference_time = self._histogram(
            "request_inference_time_seconds", "Scheduled to last token.", _REQUEST_BUCKETS
        )
        self.prefill_time = self._histogram(
            "request_prefill_time_seconds", "Scheduled to first token.", _REQUEST_BUCKETS
        )
        self.decode_time = self._histogram("request_decode_time_seconds", "First to last token.", _REQUEST_BUCKETS)
        self.prompt_lengths = self._histogram("request_prompt_tokens", "Prompt length.", _LENGTH_BUCKETS)
        self.output_lengths = self._histogram("request_generation_tokens", "Output length.", _LENGTH_BUCKETS)
        self.iteration_tokens = self._histogram(
            "iteration_tokens_total", "Tokens computed per step.", _ITERATION_BUCKETS
        )

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(PREFIX + name, text, LABELS, registry=self.registry).labels(*self._label_values)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(PREFIX + name, text, buckets, self._label_values)
        self.registry.register(histogram)
        return histogram

    def set_cache_config(self, **fields: object) -> None:
        """Export ``cache_config_info``: constant 1, the settings as labels."""
        names = ("engine", *fields)
        values = (self._label_values[1], *(str(value) for value in fields.values()))
        info = Gauge(PREFIX + "cache_config_info", "KV-cache settings.", names, registry=self.registry)
        info.labels(*values).set(1)

    def engine(self, stats: EngineStats, busy_seconds: float) -> None:
        """Take in the engine's gauges and running totals."""
        if stats.num_steps > self._engine.stats.num_steps:
            self.iteration_tokens.observe(stats.last_step_tokens)
        self._engine.stats, self._engine.busy_seconds = stats, busy_seconds

    @property
    def engine_stats(self) -> EngineStats:
        """What the engine said last."""
        return self._engine.stats

    def begun(self, prompt_tokens: int, cached_tokens: int, seconds: float) -> None:
        """A request's first output came ``seconds`` after its arrival."""
        self.prompt_tokens.inc(prompt_tokens)
        self.prompt_tokens_cached.inc(cached_tokens)
        self.ttft.observe(seconds)

    def restarted(self, reason: str, waiting: int) -> None:
        """Count one death of the worker; the next one's totals begin at zero, and so many requests wait for it."""
        self._restarts.labels(*self._label_values, reason).inc()
        self.restarts += 1
        self._engine.stats, self._engine.busy_seconds = structs.replace(NO_STATS, num_waiting=waiting), 0.0

    def rejected(self, reason: str) -> None:
        """Count one request refused at the door."""
        self._rejections.labels(*self._label_values, reason).inc()

    def ended(self, reason: str) -> None:
        """Count one request that ended without an answer: ``abort`` or ``error``."""
        self._success.labels(*self._label_values, reason).inc()

    def finished(self, output: TextOutput, prompt_tokens: int, times: RequestTimes) -> None:
        """Record one request that was answered; ``output`` is its last, ``times`` the engine's."""
        self._success.labels(*self._label_values, str(output.finish_reason)).inc()
        self.prompt_lengths.observe(prompt_tokens)
        self.output_lengths.observe(output.num_output_tokens)
        if times.first_scheduled is None or times.finished is None:
            return
        first = times.finished if times.first_token is None else times.first_token
        self.queue_time.observe(max(0.0, times.first_scheduled - times.arrival))
        self.prefill_time.observe(first - times.first_scheduled)
        self.decode_time.observe(times.finished - first)
        self.inference_time.observe(times.finished - times.first_scheduled)
        self.e2e.observe(max(0.0, times.finished - times.arrival))
        if output.num_output_tokens > 1:
            self.tpot.observe((times.finished - first) / (output.num_output_tokens - 1))

    def render(self) -> tuple[bytes, str]:
        """Exposition text and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST
