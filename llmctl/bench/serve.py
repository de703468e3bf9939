"""``bench serve``: send a planned workload once a repeat, and make the result document."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmctl.bench import gate, metrics
from llmctl.bench.arrivals import arrival_times
from llmctl.bench.client import LoadRun, Target, run_load
from llmctl.bench.config import BenchServeConfig
from llmctl.bench.endpoint import server_counter
from llmctl.bench.environment import describe_environment, load_average
from llmctl.bench.local_tokenizer import chunk_lengths, load_tokenizer, local_counter
from llmctl.bench.outcome import SCHEMA_VERSION, Outcome, confidence_intervals, timestamp
from llmctl.bench.progress import Progress
from llmctl.bench.readiness import Patience, ServerFacts, await_answer, await_server, choose_model, unknown_model
from llmctl.bench.serve_plan import Plan, make_items, make_plan
from llmctl.bench.workloads import LengthRange, TokenCounter, WorkItem, random_items
from llmctl.errors import LlmctlError

_WARMUP_STREAM = 1_000_000
_WARMUP_OUTPUT = 8
_UNKNOWN = ("http_400", "http_404")
"""How servers refuse a model that they do not have."""


def run_serve(config: BenchServeConfig, progress: Progress) -> tuple[Outcome, Plan]:
    """Run the whole bench.

    Raises:
        UsageError: options that cannot be honoured, or a baseline of other work.
        LlmctlError: no server is ready in time.
    """
    plan = make_plan(config)
    server, target = connect(plan, progress)
    counter, counted_by = find_counter(plan, target.model, progress)
    environment = describe_environment()
    head = make_head(plan, target.model, server, counted_by)
    plan.judge.check_same_work(head)
    items = make_items(plan, 0, counter)
    if counter is not None and not all(item.exact or item.messages for item in items):
        progress.log("note: some prompts could not be made of exactly the wanted length; true lengths are reported")
    target = warm_up(plan, target, counter, progress)
    runs = _run_all(plan, target, items, counter, progress)
    progress.stop()
    result = make_result(plan, head, runs, environment)
    note_chunks(runs, progress)
    first = gate.request_gates(result, config.max_failed_ratio)
    return plan.judge.judge(result, first), plan


def connect(plan: Plan, progress: Progress) -> tuple[ServerFacts, Target]:
    """Wait until the server is ready and has answered a request; what it says of itself, and where requests are sent.

    Raises:
        LlmctlError: neither within ``--ready-timeout``.
        UsageError: nobody names a model, or one that the server neither lists nor knows.
    """
    url = plan.endpoint.base_url
    patience = Patience(url, plan.config.ready_timeout, progress.log)
    server = await_server(plan.endpoint, patience)
    target = make_target(plan, choose_model(plan.config.model, server, url, progress.log))
    # Before it is asked to count tokens: some load after they answer.
    first = await_answer(target, patience, progress.log)
    if first.error_kind in _UNKNOWN and server.models and target.model not in server.models:
        raise unknown_model(target.model, server, url)
    return server, target


def _run_all(
    plan: Plan, target: Target, items: Sequence[WorkItem], counter: TokenCounter | None, progress: Progress
) -> list[RepeatRun]:
    """Every repeat; after a Ctrl-C those so far, the last of which may be cut short.

    Raises:
        KeyboardInterrupt: before a request had ended.
        LlmctlError: none was sent before the time was up.
    """
    runs: list[RepeatRun] = []
    interrupted = False
    try:
        for repeat in range(plan.config.num_repeats):
            items = make_items(plan, repeat, counter) if repeat else items
            runs.append(_run_once(plan, target, items, repeat, progress))
            interrupted = runs[-1].load.interrupted
            if interrupted:
                break
    except KeyboardInterrupt:
        interrupted = True  # between two repeats: there are fewer than were asked for, which the result says
    kept = [run for run in runs if run.load.records]
    if not kept:
        raise KeyboardInterrupt if interrupted else nothing_sent(plan.config)
    return kept


def nothing_sent(config: BenchServeConfig) -> LlmctlError:
    """The error to raise of a load whose time was up before its first request."""
    return LlmctlError(
        f"no request was sent within the {config.load_seconds:g} s of a load", fix="a longer --load-seconds"
    )


def find_counter(plan: Plan, model: str, progress: Progress) -> tuple[TokenCounter | None, str]:
    """How prompt lengths are counted: a tokenizer given, the server's /tokenize, or not at all."""
    if plan.config.tokenizer:
        return local_counter(plan.config.tokenizer, special=not plan.endpoint.chat), "tokenizer"
    counter = server_counter(plan.endpoint, model)
    if counter is not None:
        return counter, "server"
    progress.log("note: prompt lengths are approximate (a word taken for a token): no --tokenizer and no /tokenize")
    return None, "approximate"


def make_target(plan: Plan, model: str) -> Target:
    """Where and how the plan's requests are sent."""
    config = plan.config
    body: dict[str, Any] = {"temperature": config.temperature}
    if plan.ignore_eos:
        body["ignore_eos"] = True
    return Target(
        url=plan.endpoint.url,
        model=model,
        chat=plan.endpoint.chat,
        headers=plan.endpoint.headers,
        body={**body, **plan.extra_body},
        keep_alive=config.keep_alive,
        timeout=config.request_timeout,
        verify_tls=plan.endpoint.verify_tls,
        keep_text=config.save_detailed,
        keep_chunks=config.tokenizer is not None,
    )


def warm_up(plan: Plan, target: Target, counter: TokenCounter | None, progress: Progress) -> Target:
    """Requests that are not counted: other words, few tokens out.

    Returns:
        The target; one that asks for the count of tokens with every chunk, where a chunk was seen to carry several and
        the server gives that count.
    """
    config = plan.config
    if not config.num_warmups:
        return target
    items = random_items(
        config.num_warmups,
        plan.inputs,
        LengthRange(_WARMUP_OUTPUT, _WARMUP_OUTPUT),
        seed=config.seed,
        stream=_WARMUP_STREAM,
        counter=counter,
    )
    progress.start("warming up", len(items))
    records = _uncounted(target, items, config.max_concurrency, progress)
    failed = [r for r in records if not r.ok]
    if failed:
        progress.log(f"warning: {len(failed)} of {len(items)} warm-up requests failed: {failed[0].error}")
    if all(r.itl_token_source == "single" or r.completion_tokens is None for r in records if r.ok):
        return target
    counting = replace(target, count_chunks=True)
    (again,) = _uncounted(counting, items[:1], None, progress)
    return counting if again.ok and again.itl_token_source == "usage" else target


def _uncounted(
    target: Target, items: Sequence[WorkItem], max_concurrency: int | None, progress: Progress
) -> list[metrics.RequestRecord]:
    loading = run_load(target, items, [0.0] * len(items), max_concurrency, _counted(progress), on_sent=progress.sent)
    run = asyncio.run(loading)
    if run.interrupted:
        raise KeyboardInterrupt
    return run.records


@dataclass(frozen=True)
class RepeatRun:
    """One repeat: its load, when it began, and how busy the machine was after it."""

    load: LoadRun
    date: str
    load_average_after: list[float] | None


def _run_once(plan: Plan, target: Target, items: Sequence[WorkItem], repeat: int, progress: Progress) -> RepeatRun:
    suffix = f" {repeat + 1}/{plan.config.num_repeats}" if plan.config.num_repeats > 1 else ""
    progress.start(f"requests{suffix}", len(items))
    return run_once(plan, target, items, repeat, progress)


def _counted(progress: Progress) -> Callable[[metrics.RequestRecord], None]:
    """Counts each request that has ended."""
    return lambda record: progress.advance(failed=not record.ok)


def run_once(plan: Plan, target: Target, items: Sequence[WorkItem], repeat: int, progress: Progress) -> RepeatRun:
    """One load, of which ``repeat`` chooses the arrivals; ``progress`` has been started."""
    config = plan.config
    arrivals = arrival_times(len(items), config.request_rate, config.burstiness, config.seed + repeat)
    date = timestamp()
    loading = run_load(
        target,
        items,
        arrivals,
        config.max_concurrency,
        _counted(progress),
        on_sent=progress.sent,
        max_seconds=config.load_seconds,
    )
    load = asyncio.run(loading)
    if config.tokenizer:
        _count_chunks(config.tokenizer, load.records)
    return RepeatRun(load, date, load_average())


def _count_chunks(tokenizer: str, records: Sequence[metrics.RequestRecord]) -> None:
    """Count the tokens of the chunks of which nothing else says how many they carry."""
    open_ones = [r for r in records if r.ok and r.itl_token_source == "unknown"]
    if not open_ones:
        return
    loaded = load_tokenizer(tokenizer)
    for record in open_ones:
        record.counted = chunk_lengths(loaded, record.chunk_texts)


def note_chunks(runs: Sequence[RepeatRun], progress: Progress) -> None:
    """Say so where ITL counts chunks as tokens that they are not."""
    records = (r for run in runs for r in run.load.records if r.ok)
    if any(r.itl_token_source == "unknown" and r.completion_tokens is not None for r in records):
        progress.log(
            "note: some chunks carry several tokens and nothing says how many: in ITL each counts as one token "
            "(--tokenizer MODEL counts them)"
        )


def make_head(plan: Plan, model: str, server: ServerFacts, counted_by: str) -> dict[str, Any]:
    """What identifies a run: vLLM's leading keys, and the workload that a baseline must share."""
    config = plan.config
    return {
        "date": timestamp(),
        "endpoint_type": plan.backend,
        "backend": plan.backend,
        "label": config.label,
        "model_id": model,
        "tokenizer_id": config.tokenizer or model,
        "num_prompts": config.num_prompts,
        **plan.judge.metadata,
        "request_rate": _number(config.request_rate),
        "burstiness": _number(config.burstiness),
        "max_concurrency": config.max_concurrency,
        "workload": workload_of(plan, counted_by),
        "server": {"url": plan.endpoint.url, "version": server.version, "ready_wait_seconds": server.ready_wait},
    }


def workload_of(plan: Plan, counted_by: str) -> dict[str, Any]:
    """What is asked: runs of different workloads are not compared."""
    config = plan.config
    return {
        "endpoint": plan.endpoint.path,
        "dataset_name": config.dataset_name,
        "dataset_path": config.dataset_path and Path(config.dataset_path).name,
        "input_len": str(plan.inputs) if config.dataset_name == "random" else None,
        "prefix_len": config.prefix_len,
        "num_prefixes": config.num_prefixes if config.prefix_len else None,
        "output_len": None if plan.outputs is None else str(plan.outputs),
        "ignore_eos": plan.ignore_eos,
        "temperature": config.temperature,
        "seed": config.seed,
        "keep_alive": config.keep_alive,
        "load_seconds": config.load_seconds,
        "prompt_length_source": counted_by,
    }


def _number(value: float) -> float | str:
    """JSON has no infinity; vLLM writes it as text."""
    return "inf" if math.isinf(value) else value


def make_result(
    plan: Plan, head: dict[str, Any], runs: Sequence[RepeatRun], environment: dict[str, object]
) -> dict[str, Any]:
    """The result document, without gates: pooled figures first, then one entry a repeat."""
    pooled = [record for run in runs for record in run.load.records]
    duration = sum(run.load.duration for run in runs)
    figures = metrics.run_metrics(pooled, duration, plan.options)
    repeats = [_repeat(plan, run) for run in runs]
    whole = [repeat for repeat in repeats if not repeat["interrupted"]]
    tail = {key: head[key] for key in ("workload", "server")}
    front = {key: value for key, value in head.items() if key not in tail}
    cpu = sum(run.load.cpu_seconds for run in runs)
    result = {
        **front,
        **figures,
        "schema_version": SCHEMA_VERSION,
        "kind": "serve",
        "num_repeats": len(runs),
        "interrupted": any(run.load.interrupted for run in runs) or len(runs) < plan.config.num_repeats,
        "short_outputs": sum(r.ok and r.output_tokens < r.planned_output for r in pooled),
        "output_token_source": metrics.output_token_source(pooled),
        "itl_token_source": metrics.itl_token_source(pooled),
        "not_sent": sum(run.load.not_sent for run in runs),
        "failures": metrics.failure_summary(pooled),
        **tail,
        "client": {
            "cpu_seconds": cpu,
            "cpu_share_of_one_core": cpu / duration if duration else 0.0,
            "max_send_lag_ms": max(run.load.max_send_lag for run in runs) * 1000,
        },
        "environment": {**environment, "load_average_after": runs[-1].load_average_after},
        "definitions": metrics.DEFINITIONS,
        "repeats": repeats,
        "confidence": confidence_intervals(whole, plan.config.confidence),
    }
    if plan.config.save_detailed:
        result |= metrics.detailed_lists(pooled)
    return result


def _repeat(plan: Plan, run: RepeatRun) -> dict[str, Any]:
    return {
        "date": run.date,
        **metrics.run_metrics(run.load.records, run.load.duration, plan.options),
        "interrupted": run.load.interrupted,
        "client_cpu_seconds": run.load.cpu_seconds,
        "load_average_after": run.load_average_after,
    }
