"""Who is next among requests with TTFT deadlines: against a naive model of the order; and that nobody starves."""

from __future__ import annotations

from typing import Any

from bytecodes import Bytecodes
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from llmctl.engine.deadline import PATIENCE, Deadline
from llmctl.engine.request import Request
from llmctl.engine.sampling_params import SamplingParams
from llmctl.engine.waiting_queue import LATE, WaitingQueue


def request(name: str, ttft: float | None = None, **fields: Any) -> Request:
    return Request(name, [1], SamplingParams(), deadline=Deadline(ttft), **fields)


def drained(queue: WaitingQueue) -> list[str]:
    names = []
    while queue:
        names.append(queue.pop().request_id)
    return names


def test_the_first_due_is_next() -> None:
    queue = WaitingQueue("priority")
    for arrival, (name, ttft) in enumerate([("slow", 9.0), ("none", None), ("quick", 0.5), ("other", 2.0)]):
        queue.add(request(name, ttft), float(arrival))
    assert queue.next_miss == 2.5
    assert drained(queue) == ["quick", "other", "slow", "none"]


def test_who_cannot_be_saved_lets_those_pass_that_can() -> None:
    queue = WaitingQueue("fair")
    for name in ("a", "b"):
        queue.add(request(name, 1.0), 0.0)
    queue.add(request("c", 1.0), 1.0)
    assert queue.pass_time(1.0) == []
    assert [r.request_id for r in queue.pass_time(1.1)] == ["a", "b"]
    queue.add(request("d", 1.0), 8.5)
    queue.add(request("e", 1.0), 9.5)
    assert queue.pass_time(1.2) == []
    assert drained(queue) == ["c", "d", "a", "b", "e"]  # they are due again at 10


def test_without_deadlines_the_order_is_that_of_arrival_to_the_last_bit() -> None:
    """Also where ``PATIENCE`` added to all moments makes one."""
    queue = WaitingQueue("priority")
    arrivals = [1e-15 * i for i in (3, 1, 2, 0)]
    assert {arrival + PATIENCE for arrival in arrivals} == {PATIENCE}
    for arrival in arrivals:
        queue.add(request(str(arrival)), arrival)
    assert drained(queue) == [str(arrival) for arrival in sorted(arrivals)]


def test_a_deadline_too_small_to_be_told_from_the_arrival() -> None:
    """Both of its due times are its arrival."""
    queue, arrival = WaitingQueue("fair"), 1e5
    assert arrival + LATE * 1e-13 == arrival
    queue.add(request("a", 1e-13), arrival)
    assert [r.request_id for r in queue.pass_time(arrival + 1)] == ["a"]
    queue.add(request("b", 1e-13), arrival + 1)
    assert drained(queue) == ["a", "b"]


def test_a_request_among_tighter_ones_that_never_end_is_served() -> None:
    """Two come for each that is served, all of them due sooner, until the time at which it is due at last."""
    for ttft, settled in ((3.0, LATE * 3.0), (None, PATIENCE)):
        queue, now, passed = WaitingQueue("fair"), ttft or 0.0, 0
        queue.add(request("patient", ttft), 0.0)
        while True:
            now += 1.0
            queue.pass_time(now)
            for side in "ab":
                queue.add(request(f"{now}{side}", 0.5), now)
            if queue.pop().request_id == "patient":
                break
            passed += 1
            assert passed <= 2 * settled, "it starves"
        assert now >= settled


def test_of_tenants_served_alike_the_one_with_the_first_due_is_next() -> None:
    """Also when that came last, behind others of its tenant."""
    queue = WaitingQueue("fair")
    queue.add(request("a0", tenant="a"), 0.0)
    queue.add(request("b0", 2.0, tenant="b"), 0.0)
    assert queue.peek().request_id == "b0"
    queue.add(request("a1", 1.0, tenant="a"), 0.0)
    assert queue.peek().request_id == "a1"


def test_what_is_remembered_of_a_line_does_not_grow_with_those_that_pass() -> None:
    queue = WaitingQueue("fair")
    queue.add(request("patient"), 0.0)
    for number in range(200):
        queue.add(request(str(number), 1.0), 0.0)
        queue.pop().account.charge_prompt(1)
    assert len(queue._classes[0]._heap) <= 3


def test_passing_time_looks_only_at_those_that_missed() -> None:
    def work(count: int) -> int:
        queue = WaitingQueue("fair")
        for i in range(count):
            queue.add(request(str(i), 5.0), float(i))
        with Bytecodes() as bytecodes:
            assert len(queue.pass_time(7.5)) == 3
        return bytecodes.count

    work(8)
    assert work(1000) <= work(8) + 3 * 300


class DueOrder(RuleBasedStateMachine):
    """The queue beside a list of all that waits, which is searched whole."""

    @initialize(policy=st.sampled_from(["fair", "priority"]))
    def start(self, policy: str) -> None:
        self.queue, self.fair = WaitingQueue(policy), policy == "fair"
        self.now, self.count = 100.0, 0
        self.waiting: dict[str, Request] = {}
        self.due: dict[str, float] = {}

    @rule(
        ttft=st.sampled_from([None, 0.5, 1.0, 4.0, 70.0]),
        priority=st.integers(0, 1),
        tenant=st.sampled_from("abc"),
        late=st.sampled_from([0.0, 0.0, 1.0, 3.0]),
    )
    def add(self, ttft: float | None, priority: int, tenant: str, late: float) -> None:
        made = request(str(self.count), ttft, priority=priority, tenant=tenant)
        arrival = self.now - late
        self.queue.add(made, arrival)
        self.waiting[made.request_id] = made
        self.due[made.request_id] = arrival + (PATIENCE if ttft is None else ttft)
        made.arrival_time = arrival
        self.count += 1

    @rule(seconds=st.sampled_from([0.1, 0.5, 2.0, 30.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        missed = {r.request_id for r in self.queue.pass_time(self.now)}
        expected = set()
        for name, made in self.waiting.items():
            ttft, arrival = made.deadline.ttft, made.arrival_time or 0.0
            if ttft is not None and self.due[name] == arrival + ttft < self.now:
                self.due[name] = arrival + LATE * ttft
                expected.add(name)
        assert missed == expected

    def expected(self) -> Request:
        first = min(r.priority for r in self.waiting.values())
        ready = [r for r in self.waiting.values() if r.priority == first]
        ready.sort(key=lambda r: (self.due[r.request_id], r.arrival_time, int(r.request_id)))
        return min(ready, key=lambda r: r.account.served) if self.fair else ready[0]

    @precondition(lambda self: self.waiting)
    @rule(charge=st.integers(1, 3))
    def pop(self, charge: int) -> None:
        expected = self.expected()
        assert self.queue.peek() is expected
        assert self.queue.pop() is expected
        expected.account.charge_prompt(charge)
        self.forget(expected)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        gone = self.waiting[data.draw(st.sampled_from(sorted(self.waiting)))]
        self.queue.remove(gone)
        self.forget(gone)

    def forget(self, request: Request) -> None:
        self.queue.ended(request)
        del self.waiting[request.request_id], self.due[request.request_id]
        assert sorted(r.request_id for r in self.queue) == sorted(self.waiting)
        assert len(self.queue) == len(self.waiting)

    def teardown(self) -> None:
        while hasattr(self, "waiting") and self.waiting:
            self.pop(charge=1)


TestDueOrder = DueOrder.TestCase
TestDueOrder.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
