"""Requests through the engine in this process, its loop overlapped as a server's: what one and many at once get."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from engine_check.steps import prompt
from llmctl.engine.llm_engine import LLMEngine
from llmctl.engine.request import Request
from llmctl.engine.sampling_params import SamplingParams
from llmctl.engine.scheduler_config import SchedulerConfig

STEP_TOKENS = 2048
"""Tokens a step of the engine that serves: what prompts are cut into."""
MOST_SEQS = 64


@dataclass(frozen=True)
class Load:
    """So many requests at once, each of so many tokens in and out, all of it several times over."""

    at_once: int
    tokens_in: int
    tokens_out: int
    repeats: int

    @property
    def name(self) -> str:
        """``64 at once, 512 in, 256 out``."""
        return f"{self.at_once} at once, {self.tokens_in} in, {self.tokens_out} out"


ONE = Load(1, 128, 256, 5)
MANY = Load(64, 512, 256, 2)


def make_engine(runtime: Any, step_tokens: int = STEP_TOKENS) -> LLMEngine:
    """An engine over a runtime that others use after it: that one is to be closed, not the engine."""
    config = SchedulerConfig(max_num_seqs=MOST_SEQS, max_num_batched_tokens=step_tokens, enable_prefix_caching=False)
    return LLMEngine(runtime, config)


def requests(load: Load, vocab: int, seed: int = 0) -> list[Request]:
    """Greedy requests over random prompts, no two alike, that go on to their last token."""
    params = SamplingParams(temperature=0.0, max_tokens=load.tokens_out, ignore_eos=True)
    return [Request(f"{seed}-{i}", prompt(load.tokens_in, vocab, 1000 * seed + i), params) for i in range(load.at_once)]


@dataclass(frozen=True)
class Served:
    """One round of a load: seconds in all, and the moments (seconds from the start) of every request's tokens."""

    seconds: float
    moments: list[list[float]]

    @property
    def rate(self) -> float:
        """Tokens out a second, prompts' time included."""
        return sum(map(len, self.moments)) / self.seconds

    @property
    def first_ms(self) -> float:
        """Median time to a request's first token."""
        return statistics.median(m[0] for m in self.moments) * 1e3

    @property
    def gap_ms(self) -> float:
        """Median time between a request's tokens."""
        gaps = [b - a for moments in self.moments for a, b in pairwise(moments)]
        return statistics.median(gaps) * 1e3 if gaps else 0.0


def serve(engine: LLMEngine, batch: Sequence[Request]) -> Served:
    """All of them at once.

    Raises:
        RuntimeError: a request that ended early.
    """
    moments: dict[str, list[float]] = {request.request_id: [] for request in batch}
    wanted = {request.request_id: request.params.max_tokens for request in batch}
    began = time.perf_counter()
    engine.add_requests(batch)
    while engine.has_unfinished():
        outputs = engine.step()
        now = time.perf_counter() - began
        for output in outputs:
            moments[output.request_id] += [now] * len(output.new_token_ids)
    seconds = time.perf_counter() - began
    short = [name for name, found in moments.items() if len(found) != wanted[name]]
    if short:
        raise RuntimeError(f"{len(short)} of {len(batch)} requests ended early, such as {short[0]}")
    return Served(seconds, list(moments.values()))


def figures(rounds: Sequence[Served], load: Load) -> dict[str, Any]:
    """Medians over rounds, and the rounds' range."""
    rates = [found.rate for found in rounds]
    firsts = [found.first_ms for found in rounds]
    return {
        "load": load.name, "rounds": len(rounds),
        "tok/s": statistics.median(rates), "tok/s range": [min(rates), max(rates)],
        "TTFT ms": statistics.median(firsts), "TTFT ms range": [min(firsts), max(firsts)],
        "between tokens ms": statistics.median(found.gap_ms for found in rounds),
    }  # fmt: skip


def run_load(runtime: Any, load: Load, warm: bool = True) -> dict[str, Any]:
    """A load in this process, after one short round that is not counted."""
    vocab = runtime.limits.vocab_size
    engine = make_engine(runtime)
    if warm:
        serve(engine, requests(Load(load.at_once, load.tokens_in, min(8, load.tokens_out), 1), vocab, 99))
    rounds = [serve(engine, requests(load, vocab, 1 + i)) for i in range(load.repeats)]
    return {"way": "in process, through LLMEngine", **figures(rounds, load)}


def decoding(runtime: Any, load: Load) -> LLMEngine:
    """An engine whose requests have all had their first tokens and go on: every further step only decodes."""
    engine = make_engine(runtime)
    batch = requests(load, runtime.limits.vocab_size, 7)
    engine.add_requests(batch)
    started: set[str] = set()
    while len(started) < load.at_once:
        started |= {output.request_id for output in engine.step() if output.new_token_ids}
    for _ in range(4):
        engine.step()
    return engine


def drop(engine: LLMEngine) -> None:
    """End what still runs, so that the runtime can be used by others."""
    engine.abort(list(engine.scheduler.requests))
    for _ in range(engine.runtime.steps_in_flight):
        engine.step()
