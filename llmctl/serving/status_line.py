"""The server's status line: every so often, while there is traffic, how fast it is and what keeps it from more."""

from __future__ import annotations

import asyncio
import logging
import time

from msgspec import structs

from llmctl.engine.llm_engine import EngineStats
from llmctl.serving.metrics import ServerMetrics

log = logging.getLogger("llmctl.serving")

STATUS_SECONDS = 10.0
WORTH_SAYING = 0.2
"""Share of the time without a full device from which the line says why."""

ADVICE = {
    "kv_full": "--kv-cache-memory or --kv-cache-dtype int8",
    "token_budget": "a larger --max-num-batched-tokens",
    "itl_target": "a larger --itl-target, or ITL deadline",
    "max_num_seqs": "a larger --max-num-seqs",
    "deadline": "a longer ITL deadline",
    "max_loras": "a larger --max-loras",
    "host": "fewer log-probabilities cost less",
    "api_process": "the API process is behind",
    "few_requests": "there is room for more",
    "no_requests": "there is room for more",
}
"""What to say of each state of ``StateSeconds`` but ``busy``."""


async def log_status(metrics: ServerMetrics) -> None:
    """Log the status line of every ``STATUS_SECONDS`` in which there was a step of one and the same worker, until
    cancelled."""
    before, worker, began = metrics.engine_stats, metrics.restarts, time.monotonic()
    while True:
        await asyncio.sleep(STATUS_SECONDS)
        after, now = metrics.engine_stats, time.monotonic()
        if after.num_steps > before.num_steps and metrics.restarts == worker:
            log.info("%s", status_line(before, after, now - began))
        before, worker, began = after, metrics.restarts, now


def status_line(before: EngineStats, after: EngineStats, seconds: float) -> str:
    """What happened between two reports of an engine that are ``seconds`` apart.

    Tokens per second of prompts are those computed, those of a preempted request again: all that were scheduled, less
    one for each token that was generated.
    """
    output = after.num_generated_tokens - before.num_generated_tokens
    prompt = max(0, after.num_scheduled_tokens - before.num_scheduled_tokens - output)
    line = (
        f"prompt {_rate(prompt / seconds)} tok/s, output {_rate(output / seconds)} tok/s, "
        f"running {after.num_running}, waiting {after.num_waiting}, KV {after.kv_cache_usage:.0%}"
    )
    return line + _bound(before, after)


def _bound(before: EngineStats, after: EngineStats) -> str:
    """The largest state that is not a full device, and what to do about it; empty when there is little of them."""
    old = structs.asdict(before.state_seconds)
    grown = {state: total - old[state] for state, total in structs.asdict(after.state_seconds).items()}
    wall, busy = sum(grown.values()), grown.pop("busy")
    if wall - busy <= WORTH_SAYING * wall:
        return ""
    state = max(grown, key=lambda name: grown[name])
    return f"; {state} {grown[state] / wall:.0%}: {_advice(state, before, after)}"


def _advice(state: str, before: EngineStats, after: EngineStats) -> str:
    eager = after.num_eager_steps - before.num_eager_steps
    if state == "host" and eager > after.num_graph_steps - before.num_graph_steps:
        return "most steps run without a CUDA graph"
    return ADVICE[state]


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"
