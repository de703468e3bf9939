"""What a request's timestamps mean: records of requests -> the figures of a run, under vLLM's key names.

All timestamps are ``time.perf_counter()`` seconds of the client.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from llmctl.bench import stats

LATENCIES = ("ttft", "tpot", "itl", "e2el")
GOODPUT_METRICS = ("ttft", "tpot", "e2el")
SCALARS = (
    "duration",
    "completed",
    "failed",
    "failed_ratio",
    "total_input_tokens",
    "total_output_tokens",
    "request_throughput",
    "request_goodput",
    "goodput_ratio",
    "output_throughput",
    "total_token_throughput",
    "max_output_tokens_per_s",
    "max_concurrent_requests",
)

DEFINITIONS = {
    "ttft": "time to first token: from just before the request is sent (connection set-up included unless "
    "--keep-alive reuses one) to the arrival of the first chunk that bears a token",
    "itl": "inter-token latency: gap between the arrivals of consecutive token-bearing chunks of one request, pooled "
    "over requests; the gap before a chunk of n tokens counts as n gaps of an n-th each (see itl_token_source)",
    "itl_token_source": "how many tokens a chunk carries: one each, as the server's total says (single); its count in "
    "every chunk (usage); the tokenizer of --tokenizer (tokenizer); not known, so that a chunk counts as one token "
    "(unknown); several of these (mixed)",
    "tpot": "time per output token after the first: (last token chunk - first token chunk) / (output tokens - 1), one "
    "value a request; requests of one token have none",
    "e2el": "end-to-end latency: from just before the request is sent to the end of its stream ([DONE] or clean end)",
    "duration": "from the start of the load to the end of the last request, seconds; summed over repeats",
    "output_throughput": "output tokens of completed requests / duration",
    "request_goodput": "completed requests that meet every --goodput limit / duration",
    "goodput_ratio": "requests that meet every --goodput limit / all requests, failed ones included",
    "failed": "requests that did not end in finish_reason or [DONE] with at least one token: HTTP errors, cut or "
    "malformed streams, timeouts, error events, empty outputs",
    "output_tokens": "usage.completion_tokens of the server when given, else counted token-bearing chunks "
    "(see output_token_source)",
    "input_tokens": "usage.prompt_tokens of the server when given, else the length planned by the workload",
    "percentiles": stats.PERCENTILE_METHOD,
    "repeats": "top-level figures pool the requests of all repeats; repeats[] has each one's own, confidence[] the "
    "Student-t interval of their mean",
}

_LATENCY_KEY = re.compile(r"^(?:mean|median|std|p(?P<q>\d{1,3}(?:\.\d+)?))_(?P<metric>ttft|tpot|itl|e2el)_ms$")


def parse_latency_key(key: str) -> tuple[str, float | None] | None:
    """``("ttft", 99.0)`` for ``p99_ttft_ms``, ``("itl", None)`` for ``mean_itl_ms``; None for anything else."""
    match = _LATENCY_KEY.match(key)
    if match is None:
        return None
    quantile = float(match["q"]) if match["q"] else None
    if quantile is not None and quantile > 100:
        return None
    return match["metric"], quantile


def known_metrics() -> list[str]:
    """Names a gate may use; any ``pN`` of a latency is allowed beside those listed."""
    words = ("mean", "median", "std", "p50", "p90", "p95", "p99")
    return [*SCALARS, *(f"{word}_{name}_ms" for name in LATENCIES for word in words)]


def is_known_metric(key: str) -> bool:
    """Whether a run yields this figure."""
    return key in SCALARS or parse_latency_key(key) is not None


def higher_is_better(key: str) -> bool:
    """Throughput-like figures grow when things improve; latencies, durations and failures shrink."""
    return key.endswith(("throughput", "goodput", "goodput_ratio", "tokens_per_s", "per_second")) or key == "completed"


@dataclass(slots=True)
class RequestRecord:
    """One request as the client saw it. ``error`` is None exactly when it completed.

    Attributes:
        planned_input, planned_output: tokens, as the workload meant them.
        scheduled: when the arrival process wanted it sent; ``start``: when it was; ``end``: stream end or failure.
        chunk_times: arrival of each token-bearing chunk.
        chunk_counts: output tokens that the server had counted when each of those was sent, where it says so.
        chunk_texts: their texts, where they are to be counted. counted: tokens of each, by a tokenizer.
        prompt_tokens, completion_tokens: the server's usage, when it gave one.
        error_kind: short class of the failure, such as ``http_500`` or ``cut``.
    """

    index: int
    planned_input: int
    planned_output: int
    scheduled: float = 0.0
    start: float = 0.0
    end: float = 0.0
    chunk_times: list[float] = field(default_factory=list)
    chunk_counts: list[int] = field(default_factory=list)
    chunk_texts: list[str] = field(default_factory=list)
    counted: list[int] | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finish_reason: str | None = None
    error: str | None = None
    error_kind: str | None = None
    text: str = ""

    @property
    def ok(self) -> bool:
        """Whether it completed."""
        return self.error is None

    @property
    def input_tokens(self) -> int:
        """The server's count, else the plan."""
        return self.planned_input if self.prompt_tokens is None else self.prompt_tokens

    @property
    def output_tokens(self) -> int:
        """The server's count, else the token-bearing chunks."""
        return self.completion_tokens or len(self.chunk_times)

    @property
    def ttft(self) -> float:
        """Seconds to the first token; 0 when none came."""
        return self.chunk_times[0] - self.start if self.chunk_times else 0.0

    @property
    def tpot(self) -> float | None:
        """Seconds per output token after the first."""
        if self.output_tokens < 2 or not self.chunk_times:
            return None
        return (self.chunk_times[-1] - self.chunk_times[0]) / (self.output_tokens - 1)

    @property
    def itl_token_source(self) -> str:
        """How the tokens of a chunk are known; see ``DEFINITIONS``."""
        if self.completion_tokens == len(self.chunk_times):
            return "single"
        if len(self.chunk_counts) == len(self.chunk_times):
            return "usage"
        return "unknown" if self.counted is None else "tokenizer"

    @property
    def chunk_tokens(self) -> list[int]:
        """Output tokens of each token-bearing chunk; one each where they are not known."""
        source = self.itl_token_source
        if source == "usage":
            return [b - a for a, b in pairwise([0, *self.chunk_counts])]
        if source == "tokenizer":
            assert self.counted is not None
            return self.counted
        return [1] * len(self.chunk_times)

    @property
    def itls(self) -> list[float]:
        """Seconds between consecutive tokens: the gap before a chunk of n tokens is n gaps of an n-th each.

        As SGLang's ``bench_serving`` counts them. A chunk without a token of its own adds its gap to the next one's.
        """
        gaps: list[float] = []
        waited = 0.0
        for (before, now), tokens in zip(pairwise(self.chunk_times), self.chunk_tokens[1:], strict=True):
            waited += now - before
            if tokens > 0:
                gaps += [waited / tokens] * tokens
                waited = 0.0
        return gaps

    @property
    def e2el(self) -> float:
        """Seconds from send to the end of the stream."""
        return self.end - self.start


@dataclass(frozen=True)
class MetricOptions:
    """Which figures to compute. ``goodput``: limits in ms by metric name."""

    percentile_metrics: tuple[str, ...] = LATENCIES
    percentiles: tuple[float, ...] = (50.0, 90.0, 99.0)
    goodput: Mapping[str, float] = field(default_factory=dict)


def run_metrics(records: Sequence[RequestRecord], duration: float, options: MetricOptions) -> dict[str, object]:
    """Figures of a run, in vLLM's key names and order. Latency figures are None when nothing completed.

    Args:
        records: all requests, failed ones included.
        duration: seconds the load ran.
    """
    done = [r for r in records if r.ok]
    good = sum(meets_goodput(r, options.goodput) for r in done) if options.goodput else None
    tokens_in = sum(r.input_tokens for r in done)
    tokens_out = sum(r.output_tokens for r in done)
    per_second = 1 / duration if duration > 0 else 0.0
    figures: dict[str, object] = {
        "duration": duration,
        "completed": len(done),
        "failed": len(records) - len(done),
        "total_input_tokens": tokens_in,
        "total_output_tokens": tokens_out,
        "request_throughput": len(done) * per_second,
        "request_goodput": None if good is None else good * per_second,
        "output_throughput": tokens_out * per_second,
        "total_token_throughput": (tokens_in + tokens_out) * per_second,
        "max_output_tokens_per_s": _peak_token_rate(done),
        "max_concurrent_requests": _peak_concurrency(done),
    }
    samples = latency_samples(done)
    for name in LATENCIES:
        if name in options.percentile_metrics:
            figures |= stats.summarize(samples[name], options.percentiles, f"{name}_ms", scale=1000.0)
    figures["failed_ratio"] = (len(records) - len(done)) / len(records) if records else 1.0
    figures["goodput_ratio"] = None if good is None or not records else good / len(records)
    return figures


def latency_samples(done: Sequence[RequestRecord]) -> dict[str, list[float]]:
    """Seconds by metric name: one value a request for ttft, tpot and e2el, one a gap for itl."""
    return {
        "ttft": [r.ttft for r in done],
        "tpot": [r.tpot for r in done if r.tpot is not None],
        "itl": [gap for r in done for gap in r.itls],
        "e2el": [r.e2el for r in done],
    }


def meets_goodput(record: RequestRecord, limits_ms: Mapping[str, float]) -> bool:
    """Whether a completed request is within every limit; a request of one token has TPOT 0 here, as in vLLM."""
    values = {"ttft": record.ttft, "tpot": record.tpot or 0.0, "e2el": record.e2el}
    return all(values[name] * 1000 <= limit for name, limit in limits_ms.items())


def output_token_source(records: Sequence[RequestRecord]) -> str:
    """``usage``, ``chunks`` or ``mixed``: where output token counts came from."""
    sources = {"usage" if r.completion_tokens else "chunks" for r in records if r.ok}
    return sources.pop() if len(sources) == 1 else ("mixed" if sources else "none")


def itl_token_source(records: Sequence[RequestRecord]) -> str:
    """How the tokens of the chunks of completed requests are known; ``none`` without any."""
    sources = {r.itl_token_source for r in records if r.ok}
    return sources.pop() if len(sources) == 1 else ("mixed" if sources else "none")


def failure_summary(records: Sequence[RequestRecord]) -> list[dict[str, object]]:
    """Failures by kind, most frequent first, each with its first distinct messages."""
    kinds: dict[str, list[str]] = {}
    for record in records:
        if record.error is not None:
            kinds.setdefault(record.error_kind or "other", []).append(record.error)
    ordered = sorted(kinds.items(), key=lambda item: -len(item[1]))
    return [{"kind": k, "count": len(texts), "messages": list(dict.fromkeys(texts))[:3]} for k, texts in ordered]


def detailed_lists(records: Sequence[RequestRecord]) -> dict[str, list[object]]:
    """vLLM's per-request lists, in request order, seconds; a failed request has an error text and zeros."""
    return {
        "input_lens": [r.input_tokens for r in records],
        "output_lens": [r.output_tokens if r.ok else 0 for r in records],
        "ttfts": [r.ttft for r in records],
        "itls": [r.itls for r in records],
        "latencies": [r.e2el for r in records],
        "start_times": [r.start for r in records],
        "queue_times": [max(0.0, r.start - r.scheduled) for r in records],
        "generated_texts": [r.text for r in records],
        "errors": [r.error or "" for r in records],
        "finish_reasons": [r.finish_reason or "" for r in records],
    }


def _peak_concurrency(done: Sequence[RequestRecord]) -> int:
    events = sorted([(r.start, 1) for r in done] + [(r.end, -1) for r in done])
    running = peak = 0
    for _, change in events:
        running += change
        peak = max(peak, running)
    return peak


def _peak_token_rate(done: Sequence[RequestRecord]) -> float:
    """Most output tokens in any one-second bucket counted from the first request's start."""
    if not done:
        return 0.0
    origin = min(r.start for r in done)
    buckets: dict[int, float] = {}
    for record in done:
        weight = record.output_tokens / len(record.chunk_times)
        for moment in record.chunk_times:
            second = math.floor(moment - origin)
            buckets[second] = buckets.get(second, 0.0) + weight
    return max(buckets.values())
