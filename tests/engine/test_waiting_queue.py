"""Whose turn it is: arrival, priority, tenants; and that nobody waits for more than a bound of others' tokens."""

from __future__ import annotations

from typing import Any

import pytest
from bytecodes import Bytecodes
from fake_runtime import FakeRuntime
from hypothesis import given, settings
from hypothesis import strategies as st
from timed_runtime import load_of

from llmctl.engine.llm_engine import LLMEngine
from llmctl.engine.pooling import Pooling
from llmctl.engine.request import Request, RequestStatus, fan_out
from llmctl.engine.sampling_params import SamplingParams
from llmctl.engine.scheduler_config import SchedulerConfig
from llmctl.engine.tenants import MAX_IDLE_ACCOUNTS, OUTPUT_WEIGHT, Accounts
from llmctl.engine.waiting_queue import WaitingQueue


def request(name: str, tenant: str = "", prompt: int = 4, tokens: int = 4, **fields: Any) -> Request:
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    return Request(name, [1 + i % 30 for i in range(prompt)], params, tenant=tenant, **fields)


def queue_of(*requests: Request, policy: str = "fair") -> WaitingQueue:
    queue = WaitingQueue(policy)
    for made in requests:
        queue.add(made, 0.0)
    return queue


def drained(queue: WaitingQueue, *, charge: int = 0) -> list[str]:
    """Names in the order in which they are next; each is charged so much when it is taken."""
    names = []
    while queue:
        first, taken = queue.peek(), queue.pop()
        assert first is taken
        taken.account.charge_prompt(charge or taken.num_prompt_tokens)
        names.append(taken.request_id)
    return names


def test_tenants_take_turns() -> None:
    queue = queue_of(*(request(f"a{i}", "a") for i in range(4)), request("b0", "b"), request("b1", "b"))
    assert drained(queue) == ["a0", "b0", "a1", "b1", "a2", "a3"]


def test_turns_are_weighed_by_tokens() -> None:
    long = [request(f"a{i}", "a", prompt=30) for i in range(2)]
    queue = queue_of(*long, *(request(f"b{i}", "b", prompt=10) for i in range(5)))
    assert drained(queue) == ["a0", "b0", "b1", "b2", "a1", "b3", "b4"]


def test_generated_tokens_count_too() -> None:
    queue = queue_of(request("a0", "a"), request("b0", "b"), request("a1", "a"), request("b1", "b"))
    first = queue.pop()
    assert queue.pop().request_id == "b0"
    first.account.charge_output()
    assert first.account.served == OUTPUT_WEIGHT
    assert drained(queue) == ["b1", "a1"]


def test_nobody_saves_up_turns_by_being_idle() -> None:
    queue = queue_of(*(request(f"a{i}", "a") for i in range(6)))
    queue.pop().account.charge_prompt(1000)
    for i in range(4):
        queue.add(request(f"b{i}", "b"), 1.0)
    assert drained(queue)[:4] == ["a1", "b0", "a2", "b1"]


def test_who_comes_to_an_empty_queue_is_raised_to_who_left_it_last() -> None:
    queue = queue_of(request("a0", "a"))
    queue.pop().account.charge_prompt(1000)
    for name in ("b0", "b1", "a1", "b2"):
        queue.add(request(name, name[0]), 1.0)
    assert drained(queue) == ["b0", "a1", "b1", "b2"]


def test_priority_comes_before_turns() -> None:
    queue = queue_of(
        request("a0", "a", priority=1), request("b0", "b", priority=1), request("a1", "a"), request("a2", "a")
    )
    assert drained(queue) == ["a1", "a2", "b0", "a0"]


def test_the_other_policies_know_one_tenant() -> None:
    def made() -> list[Request]:
        return [request("a0", "a", priority=1), request("a1", "a"), request("b0", "b", priority=-1)]

    assert drained(queue_of(*made(), policy="fcfs")) == ["a0", "a1", "b0"]
    assert drained(queue_of(*made(), policy="priority")) == ["b0", "a1", "a0"]


def test_who_was_preempted_is_next_but_for_an_earlier_arrival_of_its_own_tenant() -> None:
    queue = queue_of(request("a0", "a"), request("a1", "a"), request("b0", "b"))
    taken = [queue.pop() for _ in range(2)]
    assert [r.request_id for r in taken] == ["a0", "a1"]  # nothing was charged
    queue.add(request("c0", "c"), -1.0)
    queue.add(request("a2", "a"), -1.0)
    for each in reversed(taken):
        each.status = RequestStatus.PREEMPTED
        queue.put_back(each)
    assert [r.request_id for r in sorted(queue, key=lambda r: r.request_id)] == ["a0", "a1", "a2", "b0", "c0"]
    assert drained(queue)[:2] == ["a0", "a1"]
    alone = queue_of(request("a0", "a"))
    old = alone.pop()
    old.status = RequestStatus.PREEMPTED
    alone.put_back(old)
    alone.add(request("a1", "a"), -1.0)
    assert drained(alone) == ["a1", "a0"]  # as first come, first served says


def test_who_is_admitted_later_is_preempted_earlier() -> None:
    """Also when it arrived earlier: else the request whose turn it was would be robbed of it."""
    queue = queue_of(*(request(f"a{i}", "a") for i in range(3)))
    queue.add(request("b0", "b"), 1.0)
    order = []
    while queue:
        order.append(queue.pop())
        order[-1].account.charge_prompt(4)
    assert [r.request_id for r in order] == ["a0", "b0", "a1", "a2"]
    assert [r.sort_key for r in order] == sorted(r.sort_key for r in order)


def test_requests_leave_from_anywhere() -> None:
    made = [request(f"{tenant}{i}", tenant) for i in range(3) for tenant in "ab"]
    queue = queue_of(*made)
    for index in (0, 3, 4):
        queue.remove(made[index])
        queue.ended(made[index])
    assert len(queue) == 3
    assert drained(queue) == ["b0", "a1", "b2"]


def test_short_prompts_that_never_ran_are_counted() -> None:
    queue = WaitingQueue("fair", short=4)
    made = [request(str(i), prompt=prompt) for i, prompt in enumerate((4, 5, 3, 4))]
    for each in made:
        queue.add(each, 0.0)
    assert queue.num_short == 3
    queue.remove(made[2])
    first = queue.pop()
    assert queue.num_short == 1
    first.status = RequestStatus.PREEMPTED
    queue.put_back(first)
    assert queue.num_short == 1
    drained(queue)
    assert queue.num_short == 0
    queue.add(request("embedding", tokens=0, pooling=Pooling.LAST), 0.0)  # it will not be a row of decodes
    assert queue.num_short == 0


def test_idle_accounts_are_forgotten_in_time() -> None:
    accounts = Accounts()
    kept = accounts.open("kept")
    for i in range(MAX_IDLE_ACCOUNTS + 10):
        accounts.close(accounts.open(str(i)))
    assert len(accounts._accounts) == MAX_IDLE_ACCOUNTS + 1
    assert accounts.open("kept") is kept
    assert "0" not in accounts._accounts
    assert str(MAX_IDLE_ACCOUNTS) in accounts._accounts


@pytest.mark.parametrize("tenants", [1, 3, 1000])
def test_next_costs_the_same_however_many_wait(tenants: int) -> None:
    """But for the height of the heap of tenants."""

    def work(count: int) -> int:
        queue = queue_of(*(request(str(i), str(i % tenants)) for i in range(count)))
        queue.pop().account.charge_prompt(4)
        with Bytecodes() as bytecodes:
            for _ in range(5):
                queue.peek().account.charge_output()
        return bytecodes.count

    work(3)
    assert work(1000) <= work(3) + 5 * 100


# -- in the engine ------------------------------------------------------------------------------------------------


def engine_of(policy: str, blocks: int = 40, **config: Any) -> LLMEngine:
    return LLMEngine(FakeRuntime(blocks), SchedulerConfig(policy=policy, **config))


def test_the_samples_of_a_request_are_of_its_tenant() -> None:
    assert {r.tenant for r in fan_out(Request("r", [1], SamplingParams(n=3), tenant="a"))} == {"a"}


WORK = st.lists(
    st.tuples(
        st.integers(0, 2),  # priority
        st.sampled_from([None, None, 0.0, 5.0]),  # arrival
        st.integers(1, 20),  # prompt
        st.integers(1, 12),  # tokens
        st.integers(0, 3),  # steps until the next
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=60, deadline=None)
@given(WORK, st.integers(9, 20), st.integers(1, 4), st.integers(2, 12))
def test_with_one_tenant_fair_is_priority_exactly(work: Any, blocks: int, seats: int, budget: int) -> None:
    """Plan for plan, preemptions and all; and first come, first served where all have one priority."""
    for other, flat in (("priority", False), ("fcfs", True)):
        shapes = []
        for policy in ("fair", other):
            engine = engine_of(policy, blocks, max_num_seqs=seats, max_num_batched_tokens=budget)
            for number, (priority, arrival, prompt, tokens, steps) in enumerate(work):
                priority = 0 if flat else priority
                engine.add_request(request(str(number), "one", prompt, tokens, priority=priority, arrival_time=arrival))
                for _ in range(steps):
                    engine.step()
            while engine.has_unfinished():
                engine.step()
                engine.scheduler.check()
            assert isinstance(engine.runtime, FakeRuntime)
            shapes.append([[(s.request_id, s.start, len(s.token_ids)) for s in p.slices] for p in engine.runtime.plans])
        assert shapes[0] == shapes[1]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 20), st.integers(1, 12)), min_size=5, max_size=40),
    st.integers(1, 4),
    st.integers(4, 16),
    st.integers(9, 30),
    st.integers(0, 8),
)
def test_a_single_request_waits_for_a_bounded_number_of_others_tokens(
    depth: int, flood: list[tuple[int, int, int]], seats: int, budget: int, blocks: int, before: int
) -> None:
    """Ahead of it are those that run, and at most one more of each other tenant, however many of theirs wait."""
    runtime = FakeRuntime(blocks, steps_in_flight=1 + depth % 2)
    engine = LLMEngine(runtime, SchedulerConfig(seats, budget, policy="fair"))
    others = [request(f"o{i}", f"t{t}", prompt, tokens) for i, (t, prompt, tokens) in enumerate(flood)]
    engine.add_requests(others)
    for _ in range(before):
        engine.step()
    ran = {r.request_id for r in others if r.times.first_scheduled is not None}
    single = request("single", "single", 5, 3)
    engine.add_request(single)
    while single.times.first_scheduled is None:
        engine.step()
        engine.scheduler.check()
    passed = [r for r in others if r.times.first_scheduled is not None and r.request_id not in ran]
    after = [r for r in passed if r.sort_key < single.sort_key]
    assert len({r.tenant for r in after}) == len(after)
    while engine.has_unfinished():
        engine.step()
        engine.scheduler.check()
    assert single.num_output_tokens == 3


@pytest.mark.parametrize("policy", ["fcfs", "fair"])
def test_a_flood_of_one_client_is_not_waited_for_by_another(policy: str) -> None:
    engine = engine_of(policy, 200, max_num_seqs=4)
    engine.add_requests([request(f"a{i}", "a") for i in range(250)])
    engine.step()
    single = request("b", "b")
    engine.add_request(single)
    assert isinstance(engine.runtime, FakeRuntime)
    before = engine.runtime.computed_tokens
    while not single.status.finished:
        engine.step()
    computed = engine.runtime.computed_tokens - before
    assert (computed < 100) is (policy == "fair")
    assert sum(load_of(p).decode_rows for p in engine.runtime.plans) > 0


@pytest.mark.parametrize("first", ["a", "b"])
def test_two_that_keep_waiting_are_served_alike(first: str) -> None:
    """Within the bound of the counters: what the largest request counts for, twice, and what runs."""
    engine = engine_of("fair", 60, max_num_seqs=4, max_num_batched_tokens=16)
    sizes = {"a": (4, 2), "b": (20, 12)}
    made = [request(f"{t}{i}", t, *sizes[t]) for t in sorted(sizes, key=lambda t: t != first) for i in range(60)]
    engine.add_requests(made)
    accounts = {r.tenant: r.account for r in made}
    while all(account.waiting for account in accounts.values()):
        engine.step()
        assert abs(accounts["a"].served - accounts["b"].served) <= 2 * (20 + OUTPUT_WEIGHT * 12 * 4)


@pytest.mark.parametrize("depth", [1, 2])
def test_what_is_served_is_what_had_to_be_computed_and_what_came_out(depth: int) -> None:
    """Not what a prefix hit saved, nor what a preempted request computes again."""
    engine = LLMEngine(FakeRuntime(5, steps_in_flight=depth), SchedulerConfig(policy="fair"))
    made = [request("a", "a", 7, 9), request("b", "b", 7, 9)]
    engine.add_requests(made)
    while engine.has_unfinished():
        engine.step()
    assert engine.stats().num_preemptions
    again = request("c", "a", 7, 2)
    engine.add_request(again)
    while engine.has_unfinished():
        engine.step()
    assert again.num_cached_tokens == 4
    assert made[1].account.served == 7 + 9 * OUTPUT_WEIGHT
    assert again.account.served == (7 + 9 * OUTPUT_WEIGHT) + (3 + 2 * OUTPUT_WEIGHT)


def test_priorities_of_the_past_are_forgotten() -> None:
    queue = WaitingQueue("fair")
    for number in range(300):
        for name, priority in (("a", number), ("b", 0)):  # the least value that waits hides the others
            request = Request(f"{name}{number}", [1], priority=priority)
            queue.add(request, float(number))
            assert queue.pop() is request
            queue.ended(request)
    assert not queue._classes
    assert not queue._priorities


def test_a_line_that_comes_and_goes_behind_others_leaves_nothing() -> None:
    queue = WaitingQueue("fair")
    first = Request("first", [1], priority=-1)
    queue.add(first, 0.0)
    stays = [Request(f"s{i}", [1], tenant=f"t{i}") for i in range(3)]
    for request in stays:
        queue.add(request, 0.0)
    for number in range(300):
        request = Request(str(number), [1])
        queue.add(request, 1.0)
        queue.remove(request)
        queue.ended(request)
    assert len(queue._classes[0]._heap) < 50
    assert [queue.pop() for _ in range(4)] == [first, *stays]
