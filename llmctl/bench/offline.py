"""``bench throughput`` and ``bench latency``: the engine in this process, without HTTP."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from llmctl.artifact.builder import engine_target
from llmctl.artifact.request import EngineRequest
from llmctl.bench import gate, metrics, stats
from llmctl.bench.config import BenchLatencyConfig, BenchThroughputConfig, OfflineConfig
from llmctl.bench.environment import describe_environment, load_average
from llmctl.bench.inprocess import (
    BenchedEngine,
    EngineRun,
    cut_short,
    peak_rss_bytes,
    prepare_engine,
    run_batches,
    run_items,
)
from llmctl.bench.outcome import SCHEMA_VERSION, Judge, Outcome, confidence_intervals, timestamp
from llmctl.bench.progress import Progress
from llmctl.bench.ratios import Tails, paired_ratio, ratio_row
from llmctl.bench.workloads import LengthRange, WorkItem, random_items
from llmctl.errors import UsageError
from llmctl.targets.base import StepLimits

EXTRA_METRICS = (
    *("elapsed_time", "requests_per_second", "tokens_per_second", "avg_latency", "median_latency"),
    *("prefill_tokens_per_second", "decode_tokens_per_second", "peak_rss_bytes"),
)
DEFINITIONS = {
    **metrics.DEFINITIONS,
    "ttft": "from the moment all requests are added to the end of the step that sampled the request's first token",
    "itl": "gap between the ends of the steps that sampled consecutive tokens of a request",
    "e2el": "from the moment all requests are added to the end of the request's last step",
    "duration": "from the first request added to the end of the last step, seconds; summed over repeats",
    "prefill_tokens_per_second": "tokens computed by steps that held any part of a prompt / seconds of those steps",
    "decode_tokens_per_second": "tokens sampled by steps without any part of a prompt / seconds of those steps",
    "batching": "static: requests of the same lengths in batches of max_num_seqs in order, the next when the last of a "
    "batch has ended, nothing padded; ratios: continuous / static, of each repeat, together their geometric mean "
    "(of 8 and more an eighth is trimmed off either end) with its interval; all requests count from the start in both",
    "avg_latency": "seconds from a whole batch added to its last token, mean over iterations",
    "peak_rss_bytes": "most memory this process has held resident, engine loading included",
}
_WARMUP_STREAM = 1_000_000
_STATIC_STREAM = 2_000_000
CONTINUOUS, STATIC = BATCHINGS = ("continuous", "static")


def is_known(metric: str) -> bool:
    """Whether an offline bench yields this figure."""
    return metric in EXTRA_METRICS or metrics.is_known_metric(metric)


def _judge(config: OfflineConfig, regression_metrics: str) -> Judge:
    if not config.model:
        raise UsageError("--model: expected an engine, a checkpoint or demo:smollm2-135m", param="model")
    names = [*EXTRA_METRICS, *metrics.known_metrics()]
    judge = Judge.make(config, regression_metrics, is_known, names)
    for slo in judge.slos:
        if "goodput" in slo.metric:
            raise UsageError(f"--slo '{slo}': goodput is a figure of bench serve", param="slo")
    return judge


def _at_least(config: OfflineConfig, **lows: int) -> None:
    for name, low in lows.items():
        if getattr(config, name) < low:
            found = getattr(config, name)
            raise UsageError(f"--{name.replace('_', '-')}: expected at least {low}, found {found}", param=name)


def run_throughput(config: BenchThroughputConfig, progress: Progress) -> Outcome:
    """All requests at once through the engine, once a repeat.

    Raises:
        LlmctlError: options, model or engine that cannot be honoured.
    """
    _at_least(config, num_prompts=1, num_warmups=0, seed=0)
    judge = _judge(config, config.regression_metrics)
    limits = _step_limits(config)
    inputs, outputs = _lengths(config, limits)
    _check_batching(config, limits)
    environment = describe_environment()
    most = max(config.num_prompts, config.num_warmups)
    opened = prepare_engine(config, longest=inputs.high + outputs.high, requests=most)
    head = _head(config, judge, opened, "throughput", num_prompts=config.num_prompts)
    judge.check_same_work(head)

    def items(count: int, stream: int) -> list[WorkItem]:
        return _items(opened, config, count, inputs, outputs, stream)

    _warm_up(opened, items(config.num_warmups, _WARMUP_STREAM), progress)
    runs: list[EngineRun] = []
    static: list[EngineRun] = []

    def play(repeat: int, how: str) -> EngineRun:
        done = lambda r: progress.advance(not r.ok)  # noqa: E731
        if how == STATIC:
            alike = items(config.num_prompts, _STATIC_STREAM + repeat)
            return run_batches(opened.engine, opened.tokenizer, alike, opened.loaded.sizes.max_num_seqs, done)
        return run_items(opened.engine, opened.tokenizer, items(config.num_prompts, repeat), done)

    for repeat in range(config.num_repeats):
        for how in _batchings(config, repeat):
            progress.start(f"requests {repeat + 1}/{config.num_repeats}, {how} batching", config.num_prompts)
            (static if how == STATIC else runs).append(_run(partial(play, repeat, how)))
            if interrupted := _cut_short([*runs[-1:], *static[-1:]]):
                break
        if interrupted:
            break
    progress.stop()
    kept = _kept(runs)
    options = _options(judge, (50.0, 90.0, 99.0))
    # Only whole pairs are held against each other.
    pairs = [(a, b) for a, b in zip(runs, static, strict=False) if not (a.interrupted or b.interrupted)]
    repeats = [{**_throughput_figures([run], options), "interrupted": run.interrupted} for run in kept]
    result = {**head, **_throughput_figures(kept, options), "interrupted": interrupted}
    if pairs:
        batch_size = opened.loaded.sizes.max_num_seqs
        result["batching"] = {"batch_size": batch_size, **_against_static(pairs, options, config.confidence)}
    records = [r for run in (*kept, *static) for r in run.records]
    _complete(result, config, opened, environment, repeats, records)
    if not interrupted:
        opened.engine.close()
    return judge.judge(result, gate.request_gates(result, 0.0))


def run_latency(config: BenchLatencyConfig, progress: Progress) -> Outcome:
    """One batch, ``num_iters`` times after ``num_iters_warmup`` uncounted ones; a repeat is all of that.

    Raises:
        LlmctlError: options, model or engine that cannot be honoured.
    """
    _at_least(config, batch_size=1, num_iters=1, num_iters_warmup=0, seed=0)
    judge = _judge(config, config.regression_metrics)
    percentiles = _percentiles(config.metric_percentiles)
    limits = _step_limits(config)
    inputs, outputs = _lengths(config, limits)
    if config.batch_size > limits.max_num_seqs:
        raise UsageError(
            f"--batch-size {config.batch_size}: more than --max-num-seqs {limits.max_num_seqs} run at once",
            fix=f"add --max-num-seqs {config.batch_size}",
            param="batch_size",
        )
    environment = describe_environment()
    opened = prepare_engine(config, longest=inputs.high + outputs.high, requests=config.batch_size)
    sizes = {"batch_size": config.batch_size, "num_iters": config.num_iters}
    head = _head(config, judge, opened, "latency", **sizes)
    judge.check_same_work(head)
    options = _options(judge, tuple(percentiles))
    batches: list[list[EngineRun]] = []
    for repeat in range(config.num_repeats):
        batches.append(_iterations(opened, config, inputs, outputs, repeat, progress))
        if interrupted := _cut_short(batches[-1]):
            break
    progress.stop()
    # An iteration is measured whole, or not at all.
    whole = [measured for runs in batches if (measured := [run for run in runs if not run.interrupted])]
    flat = _kept([run for runs in whole for run in runs])
    repeats = [
        {**_latency_figures(runs, options, percentiles), "interrupted": len(runs) < config.num_iters} for runs in whole
    ]
    result = {**head, **_latency_figures(flat, options, percentiles), "interrupted": interrupted}
    _complete(result, config, opened, environment, repeats, [r for run in flat for r in run.records])
    return judge.judge(result, gate.request_gates(result, 0.0))


def _check_batching(config: BenchThroughputConfig, limits: StepLimits) -> None:
    if config.batching not in BATCHINGS:
        raise UsageError(f"--batching '{config.batching}': expected {' or '.join(BATCHINGS)}", param="batching")
    if config.batching == STATIC and config.num_prompts <= limits.max_num_seqs:
        raise UsageError(
            f"--batching static: all of --num-prompts {config.num_prompts} are one batch of --max-num-seqs "
            f"{limits.max_num_seqs}, so that there is nothing to compare",
            fix=f"--num-prompts {4 * limits.max_num_seqs}, or a smaller --max-num-seqs",
            param="batching",
        )


def _batchings(config: BenchThroughputConfig, repeat: int) -> tuple[str, ...]:
    """What a repeat runs: with static batching both, the other one first each time."""
    if config.batching != STATIC:
        return (CONTINUOUS,)
    return BATCHINGS if repeat % 2 == 0 else BATCHINGS[::-1]


def _against_static(
    pairs: Sequence[tuple[EngineRun, EngineRun]], options: metrics.MetricOptions, confidence: float
) -> dict[str, Any]:
    """Static batching's figures, and what continuous batching makes of them; intervals are over repeats."""
    names = ("output_throughput", "tokens_per_second", "median_ttft_ms", "median_e2el_ms")
    figures = [tuple(_throughput_figures([run], options) for run in pair) for pair in pairs]
    theirs = _throughput_figures([other for _, other in pairs], options)
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        each = [(now[name], before[name]) for now, before in figures]
        if all(now and before for now, before in each):
            repeats = [now / before for now, before in each]
            ratio = paired_ratio([math.log(value) for value in repeats], Tails.alike(confidence))
            found[name] = {**ratio_row(ratio), "repeats": repeats}
    return {"static": theirs, "ratios": found}


def _iterations(
    opened: BenchedEngine,
    config: BenchLatencyConfig,
    inputs: LengthRange,
    outputs: LengthRange,
    repeat: int,
    progress: Progress,
) -> list[EngineRun]:
    """The measured iterations of a repeat, up to one that is cut short."""

    def play(stream: int) -> EngineRun:
        batch = _items(opened, config, config.batch_size, inputs, outputs, stream)
        return run_items(opened.engine, opened.tokenizer, batch)

    count = config.num_iters_warmup + config.num_iters
    progress.start(f"iterations {repeat + 1}/{config.num_repeats}", count)
    runs: list[EngineRun] = []
    for i in range(count):
        run = _run(partial(play, repeat * 1000 + i))
        if i >= config.num_iters_warmup or run.interrupted:
            runs.append(run)
        if run.interrupted:
            break
        progress.advance()
    return runs


def _run(play: Callable[[], EngineRun]) -> EngineRun:
    """What is played; where a Ctrl-C comes while its prompts are made, a run that was cut short."""
    try:
        return play()
    except KeyboardInterrupt:
        return cut_short()


def _kept(runs: Sequence[EngineRun]) -> list[EngineRun]:
    """The runs in which a request ended.

    Raises:
        KeyboardInterrupt: none did, as the first was cut short.
    """
    kept = [run for run in runs if run.records]
    if not kept:
        raise KeyboardInterrupt
    return kept


def _cut_short(runs: Sequence[EngineRun]) -> bool:
    return any(run.interrupted for run in runs)


def _step_limits(config: OfflineConfig) -> StepLimits:
    """The largest step of the engine that will run, known before it is built."""
    return EngineRequest.of(config).step_limits(engine_target(config))


def _lengths(config: OfflineConfig, limits: StepLimits) -> tuple[LengthRange, LengthRange]:
    inputs, outputs = (
        LengthRange.parse(config.input_len, "input_len"),
        LengthRange.parse(config.output_len, "output_len"),
    )
    if not config.enable_chunked_prefill and inputs.high > limits.max_num_batched_tokens:
        raise UsageError(
            f"--input-len {inputs}: without chunked prefill a prompt has at most --max-num-batched-tokens, "
            f"{limits.max_num_batched_tokens}",
            fix=f"--max-num-batched-tokens {inputs.high}, or leave --no-enable-chunked-prefill out",
            param="input_len",
        )
    return inputs, outputs


def _percentiles(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        values = [-1.0]
    if not values or not all(0 <= value <= 100 for value in values):
        raise UsageError(f"--metric-percentiles '{text}': expected numbers from 0 to 100 such as 50,90,99")
    return values


def _options(judge: Judge, percentiles: tuple[float, ...]) -> metrics.MetricOptions:
    needed = gate.slo_percentiles([*judge.slos, *(gate.Slo(m, "<=", 0) for m in judge.metrics)])
    return metrics.MetricOptions(percentiles=tuple(sorted({*percentiles, *(q for s in needed.values() for q in s)})))


def _items(
    opened: BenchedEngine, config: OfflineConfig, count: int, inputs: LengthRange, outputs: LengthRange, stream: int
) -> list[WorkItem]:
    def counter(texts: Sequence[str]) -> list[int]:
        return [len(opened.tokenizer.encode(text)) for text in texts]

    return random_items(count, inputs, outputs, seed=config.seed, stream=stream, counter=counter)


def _warm_up(opened: BenchedEngine, items: list[WorkItem], progress: Progress) -> None:
    if items:
        progress.log("warming up")
        run = run_items(opened.engine, opened.tokenizer, [WorkItem(i.prompt, i.input_tokens, 2) for i in items])
        if run.interrupted:
            raise KeyboardInterrupt


def _head(config: OfflineConfig, judge: Judge, opened: BenchedEngine, kind: str, **sizes: int) -> dict[str, Any]:
    return {
        "date": timestamp(),
        "backend": "llmctl",
        "label": config.label,
        "model_id": config.model,
        "tokenizer_id": config.model,
        **sizes,
        **judge.metadata,
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "num_repeats": config.num_repeats,
        "workload": {
            **sizes,
            "input_len": config.input_len,
            "output_len": config.output_len,
            "seed": config.seed,
            "target": str(opened.loaded.manifest.target),
            "dtype": opened.loaded.manifest.options.dtype,
            "quantization": opened.loaded.manifest.quantization.method,
            "threads": opened.threads,
            "max_num_seqs": opened.loaded.sizes.max_num_seqs,
            "max_num_batched_tokens": opened.loaded.sizes.max_num_batched_tokens,
            "kv_cache_dtype": opened.loaded.options.kv_cache_dtype,
            "enable_prefix_caching": config.enable_prefix_caching,
            "enable_chunked_prefill": config.enable_chunked_prefill,
        },
        "engine": opened.describe(),
        "threads": opened.threads,
    }


def _throughput_figures(runs: Sequence[EngineRun], options: metrics.MetricOptions) -> dict[str, Any]:
    """``vllm bench throughput``'s keys, then those of ``bench serve``, then the split into prefill and decode."""
    records = [record for run in runs for record in run.records]
    duration = sum(run.duration for run in runs)
    figures = metrics.run_metrics(records, duration, options)
    total = sum(r.input_tokens + r.output_tokens for r in records if r.ok)
    return {
        "elapsed_time": duration,
        "num_requests": len(records),
        "total_num_tokens": total,
        "requests_per_second": figures["request_throughput"],
        "tokens_per_second": figures["total_token_throughput"],
        **figures,
        **_rates(runs),
    }


def _latency_figures(
    runs: Sequence[EngineRun], options: metrics.MetricOptions, percentiles: Sequence[float]
) -> dict[str, Any]:
    """``vllm bench latency``'s keys (seconds), then those of ``bench serve``, then prefill and decode."""
    latencies = [run.duration for run in runs]
    records = [record for run in runs for record in run.records]
    return {
        "avg_latency": sum(latencies) / len(latencies),
        "median_latency": stats.percentile(latencies, 50),
        "latencies": latencies,
        "percentiles": {stats.percentile_label(q): stats.percentile(latencies, q) for q in percentiles},
        **metrics.run_metrics(records, sum(latencies), options),
        **_rates(runs),
    }


def _rates(runs: Sequence[EngineRun]) -> dict[str, Any]:
    prompt_seconds = sum(run.steps.prompt_seconds for run in runs)
    decode_seconds = sum(run.steps.decode_seconds for run in runs)
    prompt_tokens = sum(run.steps.prompt_tokens for run in runs)
    decode_tokens = sum(run.steps.decode_tokens for run in runs)
    return {
        "prefill_tokens_per_second": prompt_tokens / prompt_seconds if prompt_seconds else None,
        "decode_tokens_per_second": decode_tokens / decode_seconds if decode_seconds else None,
    }


def _complete(
    result: dict[str, Any],
    config: OfflineConfig,
    opened: BenchedEngine,
    environment: dict[str, object],
    repeats: list[dict[str, Any]],
    records: list[metrics.RequestRecord],
) -> None:
    stats_now = opened.engine.stats()
    result |= {
        "peak_rss_bytes": peak_rss_bytes(),
        "num_preemptions": stats_now.num_preemptions,
        "failures": metrics.failure_summary(records),
        "environment": {**environment, "load_average_after": load_average()},
        "definitions": DEFINITIONS,
        "repeats": repeats,
        "confidence": confidence_intervals([r for r in repeats if not r["interrupted"]], config.confidence),
    }
