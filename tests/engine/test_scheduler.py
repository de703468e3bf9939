"""Scheduling decisions, seen through the plans handed to the runtime."""

from __future__ import annotations

from typing import Any

import pytest
from fake_runtime import FakeRuntime

from llmctl.config import EngineConfig
from llmctl.engine.llm_engine import LLMEngine
from llmctl.engine.request import Request, RequestStatus
from llmctl.engine.sampling_params import SamplingParams
from llmctl.engine.scheduler import Scheduler
from llmctl.engine.scheduler_config import SchedulerConfig
from llmctl.engine.step import IN_FLIGHT, RuntimeLimits, StepPlan
from llmctl.errors import CapacityError, QueueFullError, RequestError, UsageError


def engine_of(blocks: int = 16, block_size: int = 4, max_model_len: int = 64, **config: Any) -> LLMEngine:
    return LLMEngine(FakeRuntime(blocks, block_size, max_model_len), SchedulerConfig(**config))


def request(name: str, prompt: int | list[int], tokens: int | None = 4, **fields: Any) -> Request:
    """A greedy request; an int prompt is that many tokens that no other name shares."""
    ids = [(ord(name) * 7 + i) % 40 for i in range(prompt)] if isinstance(prompt, int) else prompt
    params = SamplingParams(temperature=0, max_tokens=tokens, **fields.pop("params", {}))
    return Request(name, ids, params, **fields)


def shape(plan: StepPlan) -> list[tuple[str, int, int, bool]]:
    return [(s.request_id, s.start, len(s.token_ids), s.sample) for s in plan.slices]


def plans(engine: LLMEngine) -> list[list[tuple[str, int, int, bool]]]:
    assert isinstance(engine.runtime, FakeRuntime)
    return [shape(p) for p in engine.runtime.plans]


def step(engine: LLMEngine, times: int = 1) -> None:
    for _ in range(times):
        engine.step()
        engine.scheduler.check()


def test_decode_goes_first_and_a_long_prompt_is_cut_into_what_the_budget_leaves() -> None:
    engine = engine_of(max_num_batched_tokens=6)
    engine.add_request(request("a", 3))
    step(engine)
    engine.add_request(request("b", 12))
    step(engine, 3)
    assert plans(engine) == [
        [("a", 0, 3, True)],
        [("a", 3, 1, True), ("b", 0, 5, False)],
        [("a", 4, 1, True), ("b", 5, 5, False)],
        [("a", 5, 1, True), ("b", 10, 2, True)],
    ]


def test_without_chunking_a_prompt_waits_until_it_fits_whole() -> None:
    engine = engine_of(max_num_batched_tokens=6, enable_chunked_prefill=False)
    engine.add_request(request("a", 3, 2))
    step(engine)
    engine.add_request(request("b", 6))
    engine.add_request(request("c", 2))
    step(engine, 2)
    assert plans(engine)[1:] == [[("a", 3, 1, True)], [("b", 0, 6, True)]]


def test_without_chunking_a_prompt_beyond_the_budget_is_refused() -> None:
    engine = engine_of(max_num_batched_tokens=6, enable_chunked_prefill=False)
    with pytest.raises(CapacityError, match=r"7 tokens; .*max_num_batched_tokens = 6 fit"):
        engine.add_request(request("a", 7))


def test_without_chunking_a_preempted_request_beyond_the_budget_is_recomputed() -> None:
    engine = engine_of(blocks=6, max_num_batched_tokens=6, enable_chunked_prefill=False, enable_prefix_caching=False)
    engine.add_request(request("a", 5, 14))
    engine.add_request(request("b", 5, 14))
    for _ in range(60):
        step(engine)
    assert engine.stats().num_preemptions > 0
    assert not engine.has_unfinished()
    assert any(s[0] == "b" and s[1] == 0 and not s[3] for plan in plans(engine) for s in plan)  # cut


def test_seats_limit_running_requests() -> None:
    engine = engine_of(max_num_seqs=2)
    for name in "abc":
        engine.add_request(request(name, 2))
    step(engine)
    assert (engine.stats().num_running, engine.stats().num_waiting) == (2, 1)


def test_the_latest_arrival_is_preempted_and_comes_back_first() -> None:
    engine = engine_of(blocks=5, enable_prefix_caching=False)
    early, late = request("a", 7, 9, arrival_time=1.0), request("b", 7, 9, arrival_time=2.0)
    engine.add_request(late)
    step(engine)
    engine.add_request(early)
    step(engine)
    while not engine.stats().num_preemptions:
        step(engine)
    assert late.status is RequestStatus.PREEMPTED
    assert early.status is RequestStatus.RUNNING
    assert late.tables == ()
    assert late.num_computed_tokens == 0
    engine.add_request(request("c", 1, 1, arrival_time=3.0))
    step(engine)
    assert engine.scheduler.waiting.peek() is late
    for _ in range(30):
        step(engine)
    assert not engine.has_unfinished()


def test_priority_orders_the_queue_and_the_victims() -> None:
    engine = engine_of(blocks=5, policy="priority", enable_prefix_caching=False)
    low, high = request("a", 7, 9, priority=5), request("b", 7, 9, priority=-1)
    engine.add_requests([low, high])
    step(engine)
    assert [s[0] for s in plans(engine)[0]] == ["b", "a"]
    while not engine.stats().num_preemptions:
        step(engine)
    assert low.status is RequestStatus.PREEMPTED


def test_fcfs_takes_no_notice_of_priority() -> None:
    engine = engine_of()
    engine.add_requests([request("a", 2, priority=5), request("b", 2, priority=-1)])
    step(engine)
    assert [s[0] for s in plans(engine)[0]] == ["a", "b"]


def test_a_prompt_is_admitted_when_all_of_it_fits() -> None:
    """Two prompts that do not fit together run one after the other instead of preempting each other's prefill."""
    engine = engine_of(blocks=5, max_num_batched_tokens=4)
    engine.add_requests([request("a", 13, 2), request("b", 13, 2)])
    for _ in range(12):
        step(engine)
    assert not engine.has_unfinished()
    assert engine.stats().num_preemptions == 0


def test_a_prompt_in_the_middle_of_its_prefill_keeps_others_out_of_the_blocks_it_will_need() -> None:
    """Free blocks suffice for "b" at each step, but they are "a"'s until it is computed."""
    engine = engine_of(blocks=5, max_num_batched_tokens=4, enable_prefix_caching=False)
    engine.add_requests([request("a", 14, 3), request("b", 6, 1)])
    step(engine, 6)
    assert plans(engine) == [
        [("a", 0, 4, False)],
        [("a", 4, 4, False)],
        [("a", 8, 4, False)],
        [("a", 12, 2, True)],
        [("a", 14, 1, True)],
        [("a", 15, 1, True)],
    ]
    step(engine, 2)
    assert not engine.has_unfinished()
    assert engine.stats().num_preemptions == 0


def test_equal_prefixes_are_computed_once_but_never_the_whole_prompt() -> None:
    engine = engine_of()
    prompt = list(range(12))
    for name, salt in (("a", None), ("b", None), ("c", "salt"), ("d", "salt")):
        engine.add_request(request(name, prompt, 1, cache_salt=salt))
        step(engine)
    assert [p[0][1:3] for p in plans(engine)] == [(0, 12), (8, 4), (0, 12), (8, 4)]
    stats = engine.stats()
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (48, 16)


def test_output_blocks_are_cached_for_the_next_turn() -> None:
    engine = engine_of()
    first = request("a", 6, 7)
    engine.add_request(first)
    while engine.has_unfinished():
        step(engine)
    engine.add_request(request("b", [*first.token_ids, 1, 2, 3], 1))
    step(engine)
    assert plans(engine)[-1] == [("b", 12, 4, True)]  # 12 of the 13 tokens known had been computed


def test_without_prefix_caching_nothing_is_looked_up() -> None:
    engine = engine_of(enable_prefix_caching=False)
    for name in "ab":
        engine.add_request(request(name, list(range(12)), 1))
        step(engine)
    assert plans(engine)[1] == [("b", 0, 12, True)]
    assert engine.stats().prefix_cache_queries == 0


def test_concurrent_equal_prompts_share_only_computed_blocks() -> None:
    engine = engine_of(max_num_batched_tokens=8)
    engine.add_requests([request("a", list(range(16)), 1), request("b", list(range(16)), 1)])
    step(engine, 3)
    assert plans(engine) == [
        [("a", 0, 8, False)],
        [("a", 8, 8, True)],
        [("b", 12, 4, True)],
    ]


@pytest.mark.parametrize(
    ("blocks", "prompt", "tokens", "words"),
    [
        (16, 60, 5, "60 tokens and 5 to generate need a context of 65 tokens; max_model_len is 64"),
        (16, 64, None, "64 tokens and 1 to generate need a context of 65"),
        (4, 14, 3, r"need a context of 17 tokens; the KV cache holds 16 tokens in all \(max_model_len is 64\)"),
        (16, 65, 0, "context of 65"),
    ],
)
def test_what_can_never_fit_is_refused_with_the_numbers(
    blocks: int, prompt: int, tokens: int | None, words: str
) -> None:
    engine = engine_of(blocks=blocks)
    with pytest.raises(CapacityError, match=words) as caught:
        engine.add_request(request("a", prompt, tokens))
    assert caught.value.code == "context_length_exceeded"
    assert not engine.has_unfinished()


@pytest.mark.parametrize(("blocks", "prompt", "tokens"), [(16, 60, 4), (16, 63, None), (4, 14, 2), (16, 64, 0)])
def test_what_just_fits_runs_to_its_end(blocks: int, prompt: int, tokens: int | None) -> None:
    engine = engine_of(blocks=blocks)
    made = request("a", prompt, tokens)
    engine.add_request(made)
    for _ in range(10):
        step(engine)
    assert made.status is RequestStatus.FINISHED_LENGTH
    assert made.num_tokens == (prompt + tokens if tokens is not None else 64)


def test_other_refusals_at_the_door() -> None:
    engine = engine_of(max_num_queued_reqs=2)
    with pytest.raises(RequestError, match="at least one token"):
        engine.add_request(request("a", []))
    with pytest.raises(RequestError, match=r"token id 40 is outside the vocabulary \(0 to 39\)"):
        engine.add_request(request("a", [1, 40]))
    with pytest.raises(RequestError, match="logit_bias: token id 99"):
        engine.add_request(request("a", 3, params={"logit_bias": {99: 1.0}}))
    with pytest.raises(RequestError, match="fan it out"):
        engine.add_request(Request("a", [1], SamplingParams(n=2)))
    with pytest.raises(QueueFullError, match="0 requests are waiting and at most 2 may"):
        engine.add_requests([request(name, 2) for name in "abc"])
    assert not engine.has_unfinished()
    first = request("a", 2)
    engine.add_request(first)
    with pytest.raises(RequestError, match="already in use"):
        engine.add_request(request("a", 2))
    engine.abort(["a"])
    with pytest.raises(RequestError, match="added before"):
        engine.add_request(first)


def test_config_refuses_nonsense_and_follows_the_commands_settings() -> None:
    with pytest.raises(UsageError, match="max_num_seqs: expected at least 1, found 0"):
        SchedulerConfig(max_num_seqs=0)
    with pytest.raises(UsageError, match="expected fcfs, priority, fair, found 'lifo'"):
        SchedulerConfig(policy="lifo")
    made = SchedulerConfig.from_engine_config(EngineConfig(scheduling_policy="priority", max_num_seqs=3))
    assert (made.policy, made.max_num_seqs, made.max_num_batched_tokens) == ("priority", 3, 512)


def overlapped(**config: Any) -> LLMEngine:
    return LLMEngine(FakeRuntime(steps_in_flight=2), SchedulerConfig(**config))


def test_a_token_in_flight_is_fed_to_the_next_step_by_name() -> None:
    engine = overlapped(max_num_batched_tokens=4)
    engine.add_requests([request("a", 4, 3), request("b", 8, 1)])
    step(engine)
    runtime = engine.runtime
    assert isinstance(runtime, FakeRuntime)
    assert plans(engine) == [[("a", 0, 4, True)], [("a", 4, 1, True), ("b", 0, 3, False)]]
    assert runtime.plans[1].slices[0].token_ids == (IN_FLIGHT,)
    step(engine, 3)  # "a" has one token more to get, which is in flight: it is not computed in vain
    assert plans(engine)[2:] == [[("a", 5, 1, True), ("b", 3, 3, False)], [("b", 6, 2, True)]]
    assert runtime.plans[2].slices[0].token_ids == (IN_FLIGHT,)
    step(engine)
    assert not engine.has_unfinished()


def test_a_request_preempted_with_a_token_in_flight_gets_it_once() -> None:
    """The recompute that is scheduled meanwhile samples nothing: what it would sample is in flight."""
    scheduler = Scheduler(SchedulerConfig(max_num_batched_tokens=8), RuntimeLimits(2, 4, 64, 40))
    a, b = request("a", 4), request("b", 4)
    scheduler.add([a, b], 0.0)
    scheduler.schedule()
    assert shape(scheduler.schedule().plan) == [("a", 4, 1, True)]  # in a block of b's
    assert (b.status, b.num_in_flight) == (RequestStatus.PREEMPTED, 1)
    scheduler.finish(a, RequestStatus.FINISHED_ABORTED)
    assert shape(scheduler.schedule().plan) == [("b", 0, 4, False)]
    b.append(3)
    assert shape(scheduler.schedule().plan) == [("b", 4, 1, True)]


def test_who_has_no_block_for_a_token_in_flight_does_not_come_straight_back() -> None:
    scheduler = Scheduler(SchedulerConfig(max_num_batched_tokens=8), RuntimeLimits(3, 4, 64, 40))
    a, b = request("a", 4), request("b", 4)
    scheduler.add([a, b], 0.0)
    scheduler.schedule()
    assert shape(scheduler.schedule().plan) == [("a", 4, 1, True)]  # in the last free block
    assert b.status is RequestStatus.PREEMPTED
    assert scheduler.pool.num_free == 1


def test_a_slice_of_before_a_preemption_makes_nothing_findable() -> None:
    """ "b" is preempted while a step in flight computes it, and has other blocks when that step is done."""
    scheduler = Scheduler(SchedulerConfig(max_num_batched_tokens=8), RuntimeLimits(2, 4, 64, 40))
    a, b = request("a", 4), request("b", 4)
    scheduler.add([a, b], 0.0)
    first, second = scheduler.schedule(), scheduler.schedule()
    assert [shape(s.plan) for s in (first, second)] == [[("a", 0, 4, True), ("b", 0, 4, True)], [("a", 4, 1, True)]]
    assert (b.status, second.plan.slices[0].block_ids) == (RequestStatus.PREEMPTED, (0, 1))
    scheduler.finish(a, RequestStatus.FINISHED_ABORTED)
    third = scheduler.schedule()
    assert (shape(third.plan), b.tables) == ([("b", 0, 4, False)], ((0,),))
    scheduler.computed(b, first.plan.slices[1], first.epochs[1])  # into block 1
    assert scheduler.pool.match(b.block_hashes) == []
    scheduler.computed(b, third.plan.slices[0], third.epochs[0])
    assert scheduler.pool.match(b.block_hashes) == [0]
    scheduler.check()
