"""A runtime that computes nothing and says how long it would have taken: machines to size chunks of prompts for, and
engines on them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np

from llmctl.engine.llm_engine import LLMEngine
from llmctl.engine.request import Request
from llmctl.engine.sampling_params import SamplingParams
from llmctl.engine.scheduler_config import SchedulerConfig
from llmctl.engine.step import DoneStep, RuntimeLimits, SamplingBatch, StepPlan, StepResult, TokenScores
from llmctl.engine.step_cost import StepLoad, chunk_context

Machine = Callable[[StepLoad], float]


def cpu(load: StepLoad) -> float:
    """Two cores and a model of 135M parameters: bound by arithmetic from the first rows on."""
    rows = 2.0e-3 + 0.35e-3 * load.decode_rows + 0.265e-3 * load.prefill_rows
    return rows + 1.2e-7 * load.decode_context + 0.9e-7 * load.prefill_context


def gpu(load: StepLoad) -> float:
    """A model of 8B parameters: reading weights hides the first rows; steps with prompts are not replayed graphs."""
    rows = load.decode_rows + load.prefill_rows
    launched = 2.5e-3 if load.prefill_rows else 0.0
    return max(3.0e-3, 3.0e-5 * rows) + launched + 1e-8 * load.decode_context + 1.5e-9 * load.prefill_context


def tiled(load: StepLoad) -> float:
    """Two cores whose attention computes five rows of a prompt at the price of one, and reads all keys for them. No
    linear model of rows and context fits that; one such tile takes four times as long as decodes at 8,000 positions."""
    rows = 2.4e-3 + 0.6e-3 * load.decode_rows + 0.2e-3 * load.prefill_rows + 0.47e-6 * load.decode_context
    if not load.prefill_rows:
        return rows
    last = load.prefill_context / load.prefill_rows + (load.prefill_rows - 1) / 2
    return rows + 2.4e-6 * last * math.ceil(load.prefill_rows / 5)


def wide(load: StepLoad) -> float:
    """The first with a vocabulary as large as its layers: a row of logits takes as long as all else of a row. What
    decodes take is theirs included."""
    return cpu(load) + 0.265e-3 * load.prefill_logits


def load_of(plan: StepPlan) -> StepLoad:
    """The load of a plan, counted apart from the scheduler."""
    decodes = [piece for piece in plan.slices if len(piece.token_ids) == 1]
    prompts = [piece for piece in plan.slices if len(piece.token_ids) > 1]
    return StepLoad(
        len(decodes),
        sum(piece.start + 1 for piece in decodes),
        sum(len(piece.token_ids) for piece in prompts),
        sum(chunk_context(piece.start, len(piece.token_ids)) for piece in prompts),
        sum(len(piece.score_targets or ()) + piece.sample for piece in prompts),
    )


class TimedRuntime:
    """Samples zeros. ``loads``, ``seconds``: of the steps so far. ``disturb``: what becomes of the time of a step."""

    def __init__(
        self,
        machine: Machine,
        *,
        steps_in_flight: int = 1,
        disturb: Callable[[int, float], float] = lambda _, seconds: seconds,
    ) -> None:
        self.limits = RuntimeLimits(4096, 16, 16384, 40)
        self.steps_in_flight, self.kernels = steps_in_flight, ""
        self.machine, self.disturb = machine, disturb
        self.loads: list[StepLoad] = []
        self.seconds: list[float] = []

    def execute(self, plan: StepPlan, sampling: SamplingBatch) -> DoneStep:
        load = load_of(plan)
        seconds = self.disturb(len(self.loads), self.machine(load))
        self.loads.append(load)
        self.seconds.append(seconds)
        scored = [piece for piece in plan.slices if piece.score_targets is not None]
        scores = {piece.request_id: TokenScores.zeros(len(piece.score_targets or ())) for piece in scored}
        tokens = np.zeros(len(sampling.temperature), np.int32)
        return DoneStep(StepResult(tokens, scores=scores, compute_seconds=seconds))

    def close(self) -> None:
        pass


def noise(seed: int = 3, outliers: float = 0.02) -> Callable[[int, float], float]:
    """5% of noise, and now and then a step that something else delayed."""
    draws = random.Random(seed)
    return lambda _, s: s * (1 + draws.gauss(0, 0.05)) * (4 if draws.random() < outliers else 1)


def engine_of(runtime: TimedRuntime, budget: int = 512, **config: Any) -> LLMEngine:
    config = {"itl_target": None, "enable_prefix_caching": False, **config}
    return LLMEngine(runtime, SchedulerConfig(max_num_batched_tokens=budget, **config))


def request(name: str, prompt: int, tokens: int, *, scored: bool = False) -> Request:
    scores = 0 if scored else None
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, prompt_logprobs=scores)
    return Request(name, [1] * prompt, params)


def load(decodes: int, context: int, rows: int = 0, start: int = 0, logits: int = 0) -> StepLoad:
    return StepLoad(decodes, decodes * context, rows, chunk_context(start, rows), logits)
