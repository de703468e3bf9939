"""What rows of logits cost beside what else a step has: learned, and reckoned with where prompts end or are scored."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from timed_runtime import TimedRuntime, cpu, engine_of, gpu, load, load_of, noise, request, wide

from llmctl.engine.prompt_turns import PromptTurns
from llmctl.engine.step_cost import PrefillAllowance, StepCost, StepLoad

CHATS = 4


def learned_logits(each: float, *, rows: int = 8, scored: bool = True, seed: int = 0) -> StepCost:
    """Of a machine on which a row of logits takes ``each`` seconds, from a burst of prompts of about so many tokens;
    ``scored``: and from some whose tokens are scored."""
    cost, draws = StepCost(), random.Random(seed)
    disturb = noise(seed)
    for number in range(400):
        ends = draws.randint(0, 12)
        count = sum(draws.randint(2, 2 * rows) for _ in range(ends)) or draws.randint(2, 512)
        logits = count if scored and number % 5 == 0 else ends
        seen = load(draws.randint(1, 16), draws.randint(50, 400), count, draws.randint(0, 100), logits)
        for step in (seen, load(seen.decode_rows, 200)):
            cost.observe(step, disturb(number, cpu(step) + each * step.prefill_logits))
    return cost


@given(st.floats(5e-5, 1e-3), st.integers(2, 40), st.integers(0, 100))
@settings(max_examples=20)
def test_what_a_row_of_logits_takes_is_learned(each: float, rows: int, seed: int) -> None:
    cost = learned_logits(each, rows=rows, seed=seed)
    assert cost.coefficients().prefill_logits == pytest.approx(each, rel=0.15, abs=0.1 * 0.265e-3)
    for tried in (load(4, 200, 100, 0, 1), load(4, 200, 100, 0, 100), load(4, 200, 100, 0, 12)):
        assert cost.seconds(tried) == pytest.approx(cpu(tried) + each * tried.prefill_logits, rel=0.1)


def test_ends_of_prompts_alone_tell_what_they_take() -> None:
    cost = learned_logits(1e-3, scored=False)
    assert cost.coefficients().prefill_logits == pytest.approx(1e-3, rel=0.15)


def test_rows_of_logits_that_take_nothing_cost_nothing() -> None:
    assert learned_logits(0.0).coefficients().prefill_logits < 0.05 * 0.265e-3


@pytest.mark.parametrize("times", [1, 2, 40])
def test_prompts_that_come_one_by_one_tell_nothing_of_logits(times: int) -> None:
    """One row of them is in each step with prompts: what such a step takes is not put down to it."""
    cost = StepCost()
    for _ in range(times):
        for rows in (16, 32, 64, 128, 256, 512, 1024):
            for seen in (load(4, 300), load(4, 300, rows, 0, 1)):
                cost.observe(seen, gpu(seen))
    assert cost.coefficients().prefill_logits == 0.0


def test_a_scored_prompt_has_its_own_room_beside_others() -> None:
    allowance = PrefillAllowance(StepCost(), load(4, 200), 512, None, scored=32)
    assert [allowance.take(100, 0), allowance.take(20, 0, scored=True)] == [100, 20]
    assert [allowance.take(100, 0), allowance.take(20, 0, scored=True), allowance.cut] == [100, 12, True]
    allowance = PrefillAllowance(StepCost(), load(4, 200), 110, None, scored=32)
    assert [allowance.take(100, 0), allowance.take(20, 0, scored=True), allowance.cut] == [100, 10, True]


def test_hours_of_prompts_do_not_make_it_forget_scored_ones() -> None:
    cost = StepCost()

    def see(rows: int, logits: int) -> None:
        for seen in (load(4, 200, rows, 0, logits), load(4, 200)):
            cost.observe(seen, cpu(seen) + 2e-4 * seen.prefill_logits)

    sizes = (40, 80, 160, 320)
    for rows in sizes * 4:
        see(rows, rows)
    for _ in range(400):
        for rows in sizes:
            see(rows, 1)
    assert cost.seconds(load(4, 200, 300, 0, 300)) == pytest.approx(cpu(load(4, 200, 300)) + 300 * 2e-4, rel=0.1)


@pytest.mark.parametrize("start", [0, 300])
def test_a_scored_chunk_is_the_largest_that_fits(start: int) -> None:
    cost = learned_logits(2e-4)
    count = PrefillAllowance(cost, load(4, 200), 512, 0.05).take(10_000, start, scored=True)

    def seconds(rows: int) -> float:
        return cost.margin * cost.seconds(load(4, 200, rows, start, rows))

    assert seconds(count) <= 0.05 < seconds(count + 1)
    assert count < 0.7 * PrefillAllowance(cost, load(4, 200), 512, 0.05).take(10_000, start)


def test_what_the_ends_of_prompts_take_the_next_prompt_has_less() -> None:
    cost = learned_logits(1e-3)
    left = {}
    for ends in (False, True):
        allowance = PrefillAllowance(cost, load(4, 200), 512, 0.060)
        assert [allowance.take(8, 0, ends=ends) for _ in range(10)] == [8] * 10
        left[ends] = allowance.take(10_000, 0)
    each = cost.coefficients()
    assert left[False] - left[True] == pytest.approx(10 * each.prefill_logits / each.prefill_row, abs=2)


def test_a_first_scored_prompt_feels_its_way() -> None:
    """As a long one does, although it fits a step: so many rows of logits were never seen. In one step it takes 10."""
    engine = engine_of(TimedRuntime(wide), 512)
    engine.add_requests([request(f"chat{i}", 64, 6000) for i in range(CHATS)])
    for _ in range(50):
        engine.step()
    engine.add_request(request("warm", 500, 1))
    for _ in range(30):
        engine.step()
    engine.add_request(request("scored", 400, 1, scored=True))
    runtime = engine.runtime
    assert isinstance(runtime, TimedRuntime)
    began = len(runtime.loads)
    while "scored" in engine.scheduler.requests:
        engine.step()
    slowdown = [wide(x) / wide(StepLoad(x.decode_rows, x.decode_context)) for x in runtime.loads[began:]]
    assert max(slowdown) <= 6.5


def test_tokens_keep_coming_beside_scored_prompts_and_others() -> None:
    """Held to one price a row, steps with scored ones took twice the target, and those without half of it."""
    runtime = TimedRuntime(wide, disturb=noise(outliers=0.0))
    engine = engine_of(runtime)
    engine.add_requests([request(f"chat{i}", 64, 6000) for i in range(CHATS)])
    for number in range(8):
        for _ in range(20):
            engine.step()
        engine.add_request(request(f"p{number}", 1500, 1, scored=number % 2 == 0))
        while len(engine.scheduler.requests) > CHATS:
            engine.step()
    assert engine.scheduler.pacer is not None
    assert engine.scheduler.pacer.cost.margin <= 1.2
    steps = [x for x in runtime.loads[len(runtime.loads) // 2 :] if x.prefill_rows > 20]
    for scored in (False, True):
        found = [
            wide(x) / wide(StepLoad(x.decode_rows, x.decode_context))
            for x in steps
            if (x.prefill_logits > 20) == scored
        ]
        assert len(found) > 5
        assert 3.5 <= np.median(found) <= 5.0
        assert max(found) <= 5.5


@pytest.mark.parametrize("tokens", [0, 3])
@pytest.mark.parametrize("scored", [False, True])
def test_a_steps_rows_of_logits_are_those_that_the_runtime_computes(tokens: int, scored: bool) -> None:
    engine = engine_of(TimedRuntime(cpu), 16)
    engine.add_requests([request(f"p{i}", 23, tokens, scored=scored or tokens == 0) for i in range(2)])
    rows = 0
    while (step := engine.scheduler.schedule()).plan.slices:
        assert step.load == load_of(step.plan)
        rows += step.load.prefill_logits
        engine._postprocess(step, engine._execute(step).result())
    assert rows == 2 * ((22 if scored or tokens == 0 else 0) + (tokens > 0))


def test_a_burst_whose_ends_are_dear_keeps_a_target() -> None:
    runtime = TimedRuntime(lambda x: cpu(x) + 3e-3 * x.prefill_logits)
    engine = engine_of(runtime, itl_target=0.030)
    engine.add_requests([request(f"chat{i}", 64, 6000) for i in range(CHATS)])
    for burst in range(12):
        for _ in range(5):
            engine.step()
        engine.add_requests([request(f"p{burst}.{i}", 4 + 2 * i, 1) for i in range(20)])
        began = len(runtime.loads)
        while len(engine.scheduler.requests) > CHATS:
            engine.step()
    last = runtime.seconds[began:]
    assert max(last) <= 0.030 + 2 * 3e-3
    assert np.median(last) >= 0.020


def test_a_first_prompts_rows_of_logits_are_its_own() -> None:
    """Not what others cost it: alone in its step, it earns."""
    turns = PromptTurns(learned_logits(1e-3), 300)
    first, step = request("first", 5000, 1, scored=True), load(0, 0, 300, 0, 300)
    turns.charge(first, step, step, pays=True)
    assert turns.due(first)
    turns.charge(first, step, load(16, 400, 300, 0, 300), pays=True)
    turns.charge(first, load(0, 0), load(16, 400, 300, 0, 300), pays=True)
    assert not turns.due(first)
