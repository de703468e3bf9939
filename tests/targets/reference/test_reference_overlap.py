"""The engine with two steps in flight yields the model's own greedy tokens: the reference runtime, delayed."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import pytest
from family_models import VOCAB, family_model
from msgspec import structs
from runtime_stepping import poison

from llmctl.engine.llm_engine import LLMEngine
from llmctl.engine.request import Request
from llmctl.engine.sampling_params import SamplingParams
from llmctl.engine.scheduler_config import SchedulerConfig
from llmctl.engine.step import IN_FLIGHT, SamplingBatch, SequenceSlice, StepPlan, StepResult
from llmctl.targets.reference.runtime import ReferenceRuntime
from llmctl.targets.reference.weights import checkpoint_runtime


class Pending:
    """A step that runs when its result, or that of a later one, is asked for."""

    def __init__(self, runtime: DelayedRuntime, plan: StepPlan, sampling: SamplingBatch) -> None:
        self.runtime, self.plan, self.sampling = runtime, plan, sampling
        self.value: StepResult | None = None

    def result(self) -> StepResult:
        while self.value is None:
            self.runtime.run_oldest()
        return self.value


class DelayedRuntime:
    """Executes steps in order, late, and feeds the tokens of each to the next."""

    steps_in_flight = 2
    kernels = ""

    def __init__(self, inner: ReferenceRuntime) -> None:
        self.inner, self.limits = inner, inner.limits
        self.queue: deque[Pending] = deque()
        self.sampled: dict[str, int] = {}
        self.num_fed = 0

    def execute(self, plan: StepPlan, sampling: SamplingBatch) -> Pending:
        self.queue.append(Pending(self, plan, sampling))
        assert len(self.queue) <= self.steps_in_flight
        return self.queue[-1]

    def run_oldest(self) -> None:
        step = self.queue.popleft()
        plan = StepPlan(tuple(structs.replace(piece, token_ids=self._tokens(piece)) for piece in step.plan.slices))
        step.value = self.inner.execute(plan, step.sampling).result()
        rows = [piece.request_id for piece in plan.slices if piece.sample]
        self.sampled = dict(zip(rows, step.value.token_ids.tolist(), strict=True))

    def _tokens(self, piece: SequenceSlice) -> Sequence[int]:
        if list(piece.token_ids) != [IN_FLIGHT]:
            return piece.token_ids
        self.num_fed += 1
        return [self.sampled[piece.request_id]]

    def close(self) -> None:
        self.inner.close()


def model_tokens(prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(family_model("llama").logits(ids)[-1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize(("blocks", "budget"), [(60, 512), (60, 7), (16, 11)])
def test_greedy_tokens_with_a_step_in_flight_are_the_models(blocks: int, budget: int) -> None:
    inner = checkpoint_runtime(family_model("llama").checkpoint, num_blocks=blocks, block_size=4, max_model_len=60)
    poison(inner)
    runtime = DelayedRuntime(inner)
    engine = LLMEngine(runtime, SchedulerConfig(max_num_batched_tokens=budget))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCAB, length).tolist() for length in (9, 3, 14, 6)]
    prompts.append(prompts[2])  # a shared prefix
    greedy = SamplingParams(temperature=0.0, max_tokens=15)
    engine.add_requests([Request(str(i), prompt, greedy) for i, prompt in enumerate(prompts)])
    got: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    while engine.has_unfinished():
        for output in engine.step():
            got[output.request_id] += output.new_token_ids
        engine.scheduler.check()
    assert got == {str(i): model_tokens(prompt, 15) for i, prompt in enumerate(prompts)}
    assert runtime.num_fed
    assert bool(engine.stats().num_preemptions) is (blocks == 16)


def test_greedy_tokens_of_who_made_room_for_more_important_ones_are_the_models() -> None:
    """Two seats, a step in flight, and requests that come in waves, each more important than those that run."""
    inner = checkpoint_runtime(family_model("llama").checkpoint, num_blocks=30, block_size=4, max_model_len=60)
    poison(inner)
    engine = LLMEngine(DelayedRuntime(inner), SchedulerConfig(max_num_seqs=2, policy="priority"))
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, VOCAB, length).tolist() for length in (9, 3, 14, 6, 5)]
    greedy = SamplingParams(temperature=0.0, max_tokens=9)
    got: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    waiting = [Request(str(i), prompt, greedy, priority=-i) for i, prompt in enumerate(prompts)]
    while waiting or engine.has_unfinished():
        if waiting:
            engine.add_request(waiting.pop(0))
        for output in [output for _ in range(2) for output in engine.step()]:
            got[output.request_id] += output.new_token_ids
        engine.scheduler.check()
    assert got == {str(i): model_tokens(prompt, 9) for i, prompt in enumerate(prompts)}
    assert engine.stats().num_preemptions >= 3
