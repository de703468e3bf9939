"""Priority preemption: who makes room for whom, when, and that nothing is undone by it."""

from __future__ import annotations

from typing import Any

import pytest
from fake_runtime import FakeRuntime, expected_tokens

from llmctl.engine.deadline import Deadline
from llmctl.engine.llm_engine import LLMEngine
from llmctl.engine.request import Request, RequestStatus
from llmctl.engine.sampling_params import SamplingParams
from llmctl.engine.scheduler_config import SchedulerConfig


def engine_of(blocks: int = 40, depth: int = 1, **config: Any) -> LLMEngine:
    config = {"policy": "priority", **config}
    return LLMEngine(FakeRuntime(blocks, steps_in_flight=depth), SchedulerConfig(**config))


def request(name: str, priority: int, prompt: int = 4, tokens: int = 12, **fields: Any) -> Request:
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    return Request(name, [(ord(name) * 7 + i) % 40 for i in range(prompt)], params, priority=priority, **fields)


def step(engine: LLMEngine, times: int = 1) -> list[str]:
    """Who was in the last step scheduled."""
    for _ in range(times):
        engine.step()
        engine.scheduler.check()
    assert isinstance(engine.runtime, FakeRuntime)
    return [piece.request_id for piece in engine.runtime.plans[-1].slices]


def finish(engine: LLMEngine, *requests: Request) -> None:
    """To the end: everybody yields what it yields alone."""
    while engine.has_unfinished():
        step(engine)
    for each in requests:
        assert each.output_token_ids == expected_tokens(each, each.seed, engine.limits, frozenset())


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("policy", ["priority", "fair"])
def test_a_seat_is_made_by_the_last_in_order_who_comes_back_behind(policy: str, depth: int) -> None:
    engine = engine_of(policy=policy, max_num_seqs=2, depth=depth)
    a, b, c, d = (request(name, priority) for name, priority in (("a", 1), ("b", 2), ("c", 0), ("d", 1)))
    engine.add_requests([a, b])
    step(engine, 3)
    engine.add_requests([c, d])
    assert step(engine) == ["a", "c"]
    assert [r.status for r in (a, b, c, d)] == [
        RequestStatus.RUNNING, RequestStatus.PREEMPTED, RequestStatus.RUNNING, RequestStatus.WAITING
    ]  # fmt: skip
    while not a.status.finished:
        assert "b" not in step(engine)
    finish(engine, a, b, c, d)
    assert engine.stats().num_preemptions == 1
    assert d.times.finished < b.times.finished  # type: ignore[operator]


def test_first_come_first_served_preempts_for_nobody() -> None:
    engine = engine_of(policy="fcfs", max_num_seqs=1)
    engine.add_request(request("a", 1))
    step(engine, 2)
    engine.add_request(request("b", 0))
    assert step(engine) == ["a"]


def test_an_equal_makes_no_room() -> None:
    engine = engine_of(max_num_seqs=1)
    engine.add_request(request("a", 1))
    step(engine, 2)
    engine.add_request(request("b", 1))
    assert step(engine) == ["a"]


def test_as_few_make_room_as_have_the_blocks() -> None:
    engine = engine_of(blocks=9, enable_prefix_caching=False)
    small = [request(name, priority, 6, 2) for name, priority in (("a", 1), ("b", 2), ("c", 3), ("d", 4))]
    engine.add_requests(small)
    step(engine)
    engine.add_request(request("e", 0, 16, 2))  # 4 blocks; 1 is free
    assert step(engine) == ["a", "b", "e"]
    finish(engine, *small)


def test_blocks_that_another_shares_are_not_counted_twice() -> None:
    """b and "c" hold one block of their own each, and a common prefix of four that only both together let go."""
    prefix = list(range(16))
    engine = engine_of(blocks=7)
    for name, priority in (("b", 2), ("c", 3)):
        engine.add_request(Request(name, [*prefix, ord(name) % 40], SamplingParams(max_tokens=3), priority=priority))
        step(engine)
    assert engine.scheduler.pool.num_free == 1
    engine.add_request(request("a", 0, 12, 3))  # 3 blocks: one is free, "c" lets one go
    assert step(engine) == ["a"]


def test_blocks_that_it_shares_itself_are_not_counted_twice() -> None:
    """It needs two beyond the prefix that "b" holds and would let go, and "b" has one of its own."""
    prefix = list(range(16))
    engine = engine_of(blocks=6)
    params = SamplingParams(max_tokens=2)
    engine.add_requests([request("a", 0, 1, 3), Request("b", [*prefix, 20], params, priority=2)])
    step(engine)
    assert engine.scheduler.pool.num_free == 0
    engine.add_request(Request("c", [*prefix, *range(20, 26)], params, priority=1))
    assert step(engine) == ["a", "b"]
    assert engine.stats().num_preemptions == 0


def test_nobody_makes_room_in_vain() -> None:
    """More blocks are needed than all that may be sent away hold."""
    engine = engine_of(blocks=8, enable_prefix_caching=False)
    engine.add_requests([request("a", 0, 15, 9), request("b", 1, 8, 9)])
    step(engine)
    engine.add_request(request("c", 0, 23, 2))
    assert step(engine) == ["a", "b"]
    assert engine.stats().num_preemptions == 0


def test_the_growth_of_those_that_stay_comes_first() -> None:
    """One block is free, which "a" takes in the next step: "c" needs that of "b" then."""
    engine = engine_of(blocks=3, enable_prefix_caching=False)
    engine.add_requests([request("a", 0, 3, 6), request("b", 1, 2, 6)])
    step(engine, 2)
    engine.add_request(request("c", 0, 2, 2))
    assert step(engine) == ["a", "c"]


def test_while_one_that_stays_computes_its_prompt_nobody_makes_room() -> None:
    """It would take the budget, and the seat would stay empty."""
    engine = engine_of(max_num_seqs=2, max_num_batched_tokens=8)
    engine.add_request(request("b", 1))
    step(engine)
    engine.add_request(request("a", 0, 20))
    step(engine)
    engine.add_request(request("c", 0))
    seen = [step(engine) for _ in range(4)]
    assert seen == [["a"], ["a", "b"], ["a", "c"], ["a", "c"]]


def test_a_prompt_that_may_not_be_cut_finds_its_budget_or_nobody_makes_room() -> None:
    engine = engine_of(max_num_seqs=4, max_num_batched_tokens=8, enable_chunked_prefill=False)
    engine.add_requests([request("a", 0, 1), *(request(name, 1, 1) for name in "bcd")])
    step(engine)
    engine.add_request(request("e", 0, 8))  # beside "a" it has 7 tokens
    assert step(engine) == ["a", "b", "c", "d"]
    engine.add_request(request("f", -1, 7))
    assert step(engine) == ["a", "f"]


def test_leave_by_an_itl_deadline_is_made_too() -> None:
    """Steps take 1 ms a token: three rows fit, "d" would be the fourth."""
    runtime = FakeRuntime(40, seconds_a_token=0.001)
    engine = LLMEngine(runtime, SchedulerConfig(policy="priority"))
    engine.add_requests([request(name, 1, deadline=Deadline(itl=0.0035)) for name in "abc"])
    step(engine, 4)
    engine.add_request(request("e", 1, deadline=Deadline(itl=0.0035)))
    assert step(engine) == ["a", "b", "c"]
    engine.add_request(request("d", 0, deadline=Deadline(itl=0.0035)))
    assert step(engine) == ["a", "b", "d"]


@pytest.mark.parametrize("depth", [1, 2])
def test_waves_of_more_important_ones_change_no_tokens(depth: int) -> None:
    engine = engine_of(blocks=14, depth=depth, policy="fair", max_num_seqs=3, max_num_batched_tokens=11)
    assert isinstance(engine.runtime, FakeRuntime)
    engine.runtime.wipe_allocated(engine.scheduler.pool)
    made = [request(chr(97 + i), 3 - i % 4, 3 + i % 7, 6 + i % 5, tenant="xy"[i % 2]) for i in range(16)]
    for each in made:
        engine.add_request(each)
        step(engine, 2)
    finish(engine, *made)
    assert engine.stats().num_preemptions > 2
