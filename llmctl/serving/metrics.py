"""Prometheus series of the server: vLLM's names under a prefix of choice, in a registry of their own.

Names, types and labels are those of vLLM 0.33 (``vllm/v1/metrics/loggers.py``), so that what is made for it works here;
what it has not, is under the same prefix. Request latencies are observed by the API process, from the times at which
things happened; for the engine's totals see ``engine_series``, for HTTP's ``http_metrics``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from llmctl.config import ServeConfig
from llmctl.engine.llm_engine import EngineStats
from llmctl.engine.output import TextOutput
from llmctl.engine.request import RequestTimes
from llmctl.serving.engine_series import LABELS, NO_STATS, AdapterSeries, EngineSeries, WorkerProcessSeries
from llmctl.serving.goodput import Goodput
from llmctl.serving.histogram import Buckets, Histogram
from llmctl.serving.http_metrics import HttpSeries

disable_created_metrics()  # in the text format each would be a gauge of its own beside its counter

_TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
_TOKEN_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5,
    10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_REQUEST_BUCKETS = (
    0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
_LENGTH_BUCKETS = tuple(m * 10**e for e in range(6) for m in (1, 2, 5))
_N_BUCKETS = (1, 2, 5, 10, 20)
_PREEMPTION_BUCKETS = (1, 2, 3, 4, 5, 10, 20)
_ITERATION_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)

FINISH_REASONS = ("stop", "length", "abort", "error")
PROMPT_SOURCES = ("local_compute", "local_cache_hit")
REJECTION_REASONS = (
    "max_num_queued_reqs", "context_length_exceeded", "not_ready", "invalid_request",
    "deadline_unreachable", "deadline_missed", "adapter_unavailable",
)  # fmt: skip
RESTART_REASONS = ("failed", "exit", "not_ready", "SIGKILL", "SIGSEGV", "SIGABRT")
PAGE_REST = 4.0
"""Times as long as a page of metrics took to render that passes before the next."""
_VLLM_REASONS = {"queue_full": "max_num_queued_reqs"}


class ServerMetrics:
    """All series of one server. ``render`` gives the exposition text.

    Attributes:
        restarts: deaths of the worker that it was restarted after. http: what the HTTP middleware counts.
        goodput: what became of deadlines.

    Args:
        prefix: of every series but those of HTTP and of this process; a colon follows it.
    """

    def __init__(self, model_name: str, engine: str = "0", prefix: str = ServeConfig.metrics_prefix) -> None:
        self.registry = CollectorRegistry()
        self._prefix = prefix + ":"
        self._label_values = (model_name, engine)
        self._engine = EngineSeries(self._prefix, self._label_values)
        self.registry.register(self._engine)
        self.restarts = 0
        self._page: asyncio.Future[tuple[bytes, str]] | None = None
        self._page_due = 0.0
        self._make_counters()
        self._make_latencies()
        self._make_sizes()
        self.http = HttpSeries(self.registry)
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)

    def _make_counters(self) -> None:
        """Label values that are known are shown from the beginning: a rate over one that appears misses its first."""
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of requests that began to answer.")
        self._prompt_tokens_cached = self._counter("prompt_tokens_cached", "Prompt tokens that needed no computation.")
        self._by_source = self._counter("prompt_tokens_by_source", "Prompt tokens by where they came from.", "source")
        self._success = self._counter("request_success", "Finished requests.", "finished_reason")
        self._restarts = self._counter("worker_restarts", "Deaths of the worker that it was restarted after.", "reason")
        # vLLM counts these before it chooses an engine.
        self._rejections = Counter(
            self._prefix + "admission_rejections",
            "Requests refused.",
            ("model_name", "reason"),
            registry=self.registry,
        )
        deadlines = self._counter("request_deadlines", "Requests with a deadline, by what became of it.", "outcome")
        self.goodput = Goodput(deadlines, self._label_values)
        for counter in (self._prompt_tokens, self._prompt_tokens_cached):
            counter.labels(*self._label_values)
        for source in PROMPT_SOURCES:
            self._by_source.labels(*self._label_values, source)
        for reason in FINISH_REASONS:
            self._success.labels(*self._label_values, reason)
        for reason in RESTART_REASONS:
            self._restarts.labels(*self._label_values, reason)
        for reason in REJECTION_REASONS:
            self._rejections.labels(self._label_values[0], reason)

    def _make_latencies(self) -> None:
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

    def _make_sizes(self) -> None:
        self.prompt_lengths = self._histogram("request_prompt_tokens", "Prompt length.", _LENGTH_BUCKETS)
        self.computed_lengths = self._histogram(
            "request_prefill_kv_computed_tokens", "Prompt tokens not found in the prefix cache.", _LENGTH_BUCKETS
        )
        self.output_lengths = self._histogram("request_generation_tokens", "Output length.", _LENGTH_BUCKETS)
        self.longest_outputs = self._histogram(
            "request_max_num_generation_tokens", "Longest output of the samples of a prompt.", _LENGTH_BUCKETS
        )
        self.samples = self._histogram("request_params_n", "Samples asked for of a prompt.", _N_BUCKETS)
        self.max_tokens = self._histogram("request_params_max_tokens", "Output length allowed.", _LENGTH_BUCKETS)
        self.preemptions = self._histogram("request_num_preemptions", "Preemptions of a request.", _PREEMPTION_BUCKETS)
        self.iteration_tokens = self._histogram(
            "iteration_tokens_total", "Tokens computed per step.", _ITERATION_BUCKETS
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(self._prefix + name, text, (*LABELS, *labels), registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Buckets:
        return Histogram(self._prefix + name, text, buckets, LABELS, self.registry).labels(*self._label_values)

    def watch(self, held: Callable[[], int], worker_pid: Callable[[], int | None]) -> None:
        """Say where to look when somebody asks: how many requests wait for a worker, and the worker's process."""
        self._engine.held = held
        self.registry.register(WorkerProcessSeries(self._prefix, self._label_values, worker_pid))

    def watch_adapters(self, most: int, names: Callable[[], tuple[set[str], set[str]]]) -> None:
        """Say where to look for adapters in use: at most ``most`` at once; names of those that run, and that wait."""
        self.registry.register(AdapterSeries(self._prefix, most, names))

    def set_cache_config(self, **fields: object) -> None:
        """Export ``cache_config_info``: constant 1, the settings as labels."""
        names = ("engine", *fields)
        values = (self._label_values[1], *(str(value) for value in fields.values()))
        info = Gauge(self._prefix + "cache_config_info", "KV-cache settings.", names, registry=self.registry)
        info.labels(*values).set(1)

    def set_engine(self, **fields: str) -> None:
        """Export ``engine_info``: constant 1, what runs as labels."""
        info = Gauge(self._prefix + "engine_info", "What runs.", (*LABELS, *fields), registry=self.registry)
        info.labels(*self._label_values, *fields.values()).set(1)

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
        self._prompt_tokens.labels(*self._label_values).inc(prompt_tokens)
        self._prompt_tokens_cached.labels(*self._label_values).inc(cached_tokens)
        for source, tokens in zip(PROMPT_SOURCES, (prompt_tokens - cached_tokens, cached_tokens), strict=True):
            self._by_source.labels(*self._label_values, source).inc(tokens)
        self.ttft.observe(seconds)

    def restarted(self, reason: str) -> None:
        """Count one death of the worker; the next one's totals begin at zero."""
        self._restarts.labels(*self._label_values, reason).inc()
        self.restarts += 1
        self._engine.stats, self._engine.busy_seconds = NO_STATS, 0.0

    def rejected(self, reason: str) -> None:
        """Count one request refused at the door, by its error's code."""
        self._rejections.labels(self._label_values[0], _VLLM_REASONS.get(reason, reason)).inc()

    def ended(self, reason: str) -> None:
        """Count one request that ended without an answer: ``abort`` or ``error``."""
        self._success.labels(*self._label_values, reason).inc()

    def samples_finished(self, n: int, longest_output: int) -> None:
        """Record that all ``n`` samples of one prompt were answered."""
        self.samples.observe(n)
        self.longest_outputs.observe(longest_output)

    def finished(self, output: TextOutput, prompt_tokens: int, max_tokens: int | None, times: RequestTimes) -> None:
        """Record one request that was answered; ``output`` is its last, ``times`` the engine's."""
        self._success.labels(*self._label_values, str(output.finish_reason)).inc()
        self.prompt_lengths.observe(prompt_tokens)
        self.computed_lengths.observe(prompt_tokens - output.num_cached_tokens)
        self.output_lengths.observe(output.num_output_tokens)
        if max_tokens is not None:
            self.max_tokens.observe(max_tokens)
        if times.first_scheduled is None or times.finished is None:
            return
        self.preemptions.observe(times.num_preemptions)
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

    async def page(self) -> tuple[bytes, str]:
        """As ``render``, after the call: one for all who wait for it. After each ``PAGE_REST`` times as long as it took
        (some 15 ms) passes before the next, so that no number of readers takes more than a fifth of the event loop."""
        if self._page is None:
            self._page = asyncio.ensure_future(self._next_page())
        return await asyncio.shield(self._page)

    async def _next_page(self) -> tuple[bytes, str]:
        await asyncio.sleep(max(0.0, self._page_due - time.monotonic()))
        self._page = None  # who comes from now on wants to see more than this one
        began = time.monotonic()
        page = self.render()
        rendered = time.monotonic()
        self._page_due = rendered + PAGE_REST * (rendered - began)
        return page
