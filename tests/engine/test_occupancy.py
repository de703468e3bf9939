"""Where the time goes: every second in one state, by hand-made clocks and by the scheduler's own steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from fake_runtime import FakeRuntime
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from llmctl.engine.llm_engine import LLMEngine
from llmctl.engine.occupancy import Occupancy, StateSeconds
from llmctl.engine.request import Request
from llmctl.engine.sampling_params import SamplingParams
from llmctl.engine.scheduler import Scheduler
from llmctl.engine.scheduler_config import SchedulerConfig
from llmctl.engine.step import DoneStep, RuntimeLimits, SamplingBatch, StepPlan


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


def shown(occupancy: Occupancy) -> dict[str, float]:
    return {state: total for state, total in structs.asdict(occupancy.seconds()).items() if total}


def test_what_the_device_did_not_compute_is_the_hosts_or_the_channels() -> None:
    clock = Clock()
    occupancy = Occupancy(clock)
    clock.now += 10
    occupancy.step_done("few_requests", 6)
    occupancy.sent(1)
    clock.now += 10
    occupancy.step_done("busy", 7)
    assert shown(occupancy) == {"few_requests": 6, "busy": 7, "host": 4 + 2, "api_process": 1}


def test_a_wait_without_requests_is_nobodys_fault() -> None:
    clock = Clock()
    occupancy = Occupancy(clock)
    clock.now += 30
    occupancy.waited(29)
    assert shown(occupancy) == {"no_requests": 29}
    clock.now += 2
    occupancy.step_done("kv_full", 2)
    assert shown(occupancy) == {"no_requests": 29, "kv_full": 2, "host": 1}


def test_sending_while_the_device_computes_costs_nothing() -> None:
    clock = Clock()
    occupancy = Occupancy(clock)
    occupancy.sent(4)
    clock.now += 5
    occupancy.step_done("busy", 5)
    clock.now += 5
    occupancy.step_done("busy", 2)  # what was sent then is past
    assert shown(occupancy) == {"busy": 7, "host": 3}


def test_a_step_that_ran_before_the_last_cut_is_carried_over() -> None:
    """Two steps in flight and a late host: the second had been computed when the first was taken in."""
    clock = Clock()
    occupancy = Occupancy(clock)
    clock.now += 10
    occupancy.step_done("few_requests", 4)
    clock.now += 1
    occupancy.step_done("busy", 4)
    clock.now += 5
    occupancy.step_done("max_num_seqs", 1)
    assert shown(occupancy) == {"few_requests": 4, "busy": 1, "max_num_seqs": 4, "host": 7}
    clock.now += 1
    occupancy.step_done("busy", 9)
    clock.now += 5
    occupancy.waited(5)  # the rest of it is not taken from what comes after
    clock.now += 3
    occupancy.step_done("busy", 1)
    assert shown(occupancy)["host"] == 7 + 2


EVENTS = st.lists(
    st.tuples(st.sampled_from(["step", "wait", "send"]), st.floats(0, 4), st.floats(0, 4), st.floats(0, 1)), max_size=30
)


@given(EVENTS)
def test_all_states_together_are_the_time_since_the_start(events: list[tuple[str, float, float, float]]) -> None:
    clock = Clock(0.0)
    occupancy, pending = Occupancy(clock), 0.0
    for kind, seconds, compute, sent in events:
        clock.now += seconds
        if kind == "step":
            occupancy.step_done("busy", compute)
            pending = 0.0
        elif kind == "wait":
            occupancy.waited(seconds)
        else:
            occupancy.sent(sent * seconds)
            pending += seconds
    totals = structs.astuple(occupancy.seconds())
    assert sum(totals) == pytest.approx(clock.now - pending)
    assert min(totals) >= -1e-9


def scheduler(blocks: int = 16, **config: Any) -> Scheduler:
    return Scheduler(SchedulerConfig(**config), RuntimeLimits(blocks, 4, 64, 40))


def add(made: Scheduler, *lengths: int) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=4)
    taken = len(made.requests)
    made.add([Request(str(taken + i), [taken + i] * n, params) for i, n in enumerate(lengths)], 0.0)


@pytest.mark.parametrize(
    ("config", "lengths", "fill"),
    [
        ({}, [3, 3], "few_requests"),
        ({"max_num_seqs": 2}, [3, 3], "busy"),
        ({"max_num_seqs": 2}, [3, 3, 3], "max_num_seqs"),
        ({"max_num_batched_tokens": 6}, [3, 3], "busy"),
        ({"max_num_batched_tokens": 6}, [3, 4], "token_budget"),  # a prompt is cut
        ({"max_num_batched_tokens": 6}, [3, 3, 3], "token_budget"),  # one is kept out
        ({"max_num_batched_tokens": 6, "max_num_seqs": 2}, [3, 3, 3], "token_budget"),
        ({"max_num_batched_tokens": 6, "enable_chunked_prefill": False}, [3, 4], "token_budget"),
        ({"blocks": 2}, [3, 3, 2], "kv_full"),
    ],
)
def test_a_step_says_what_bounded_it(config: dict[str, Any], lengths: list[int], fill: str) -> None:
    made = scheduler(**config)
    add(made, *lengths)
    assert made.schedule().fill == fill


def test_running_requests_that_the_budget_leaves_out_are_kept_out_by_it() -> None:
    made = scheduler(max_num_batched_tokens=4)
    add(made, 2, 2)
    made.schedule()
    for request in made.running:
        request.append(1)
    made.config = SchedulerConfig(max_num_batched_tokens=1)
    assert made.schedule().fill == "token_budget"


def test_a_preemption_says_that_the_cache_is_full_whatever_else_is() -> None:
    made = scheduler(blocks=2, max_num_seqs=2)
    add(made, 4, 4)
    assert made.schedule().fill == "busy"
    made.config = SchedulerConfig(max_num_batched_tokens=1)
    assert made.schedule().fill == "kv_full"
    assert made.counters.preemptions == 1


class TimedRuntime(FakeRuntime):
    """Each step computes a second of the clock, whose other seconds are the host's."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def execute(self, plan: StepPlan, sampling: SamplingBatch) -> Any:
        result = super().execute(plan, sampling).result()
        self.clock.now += 1
        execution = "graph" if all(len(piece.token_ids) == 1 for piece in plan.slices) else "eager"
        return DoneStep(structs.replace(result, compute_seconds=1.0, execution=execution))


def test_the_engine_keeps_them_by_step() -> None:
    clock = Clock()
    engine = LLMEngine(TimedRuntime(clock), SchedulerConfig(max_num_seqs=1))
    engine.occupancy = Occupancy(clock)
    params = SamplingParams(temperature=0.0, max_tokens=3)
    engine.add_requests([Request(name, [1, 2, 3], params) for name in "ab"])
    while engine.has_unfinished():
        clock.now += 0.25
        engine.step()
    stats = engine.stats()
    assert stats.state_seconds == StateSeconds(max_num_seqs=3.0, busy=3.0, host=1.5)
    assert (stats.num_graph_steps, stats.num_eager_steps) == (4, 2)


def test_a_settled_engine_has_nothing_in_flight() -> None:
    runtime = FakeRuntime(steps_in_flight=2)
    engine = LLMEngine(runtime, SchedulerConfig())
    engine.add_request(Request("a", [1, 2, 3], SamplingParams(temperature=0.0)))
    engine.step()
    engine.settle()
    assert len(runtime.queue) == 1  # it is wanted
    engine.abort(["a"])
    engine.settle()
    assert not runtime.queue
