"""Deadlines in the engine: prompts cut and requests kept out for ITL; what missed its TTFT goes behind, or is shed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fake_runtime import FakeRuntime
from timed_runtime import TimedRuntime, cpu

from llmctl.engine.deadline import Deadline
from llmctl.engine.itl_guard import DecodeOutlook
from llmctl.engine.llm_engine import LLMEngine
from llmctl.engine.pooling import Pooling
from llmctl.engine.request import Request, RequestStatus
from llmctl.engine.sampling_params import SamplingParams
from llmctl.engine.scheduler_config import SchedulerConfig
from llmctl.engine.step_cost import StepCost, StepLoad
from llmctl.errors import RequestError


def request(
    name: str, prompt: int = 4, tokens: int = 4, ttft: float | None = None, itl: float | None = None
) -> Request:
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    return Request(name, [1] * prompt, params, deadline=Deadline(ttft, itl))


def timed(**config: Any) -> LLMEngine:
    config = {"policy": "fair", "enable_prefix_caching": False, **config}
    return LLMEngine(TimedRuntime(cpu), SchedulerConfig(**config))


def loads(engine: LLMEngine) -> list[StepLoad]:
    assert isinstance(engine.runtime, TimedRuntime)
    return engine.runtime.loads


# -- ITL ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("itl_target", [0.0, None, 0.5])
def test_prompts_are_cut_to_the_tightest_deadline_of_those_that_decode(itl_target: float | None) -> None:
    engine = timed(itl_target=itl_target)
    engine.add_requests([request(f"chat{i}", 64, 6000, itl=itl) for i, itl in enumerate((0.2, 0.03, None))])
    for _ in range(100):
        engine.step()
    engine.add_request(request("long", 8000, 1))
    began = len(loads(engine))
    while "long" in engine.scheduler.requests:
        engine.step()
    seconds = [cpu(load) for load in loads(engine)[began:]]
    assert np.percentile(seconds, 99) <= 0.031
    if itl_target is not None:  # else the automatic target is tighter at times
        assert np.median(seconds) >= 0.025  # and is made use of


def test_when_the_tightest_is_gone_the_next_one_counts() -> None:
    engine = timed(itl_target=0.0)
    engine.add_requests([request("loose", 64, 6000, itl=0.09), request("tight", 64, 6000, itl=0.03)])
    for _ in range(100):
        engine.step()
    engine.abort(["tight"])
    engine.add_request(request("long", 8000, 1))
    began = len(loads(engine))
    while "long" in engine.scheduler.requests:
        engine.step()
    assert 0.07 <= np.percentile([cpu(load) for load in loads(engine)[began:]], 90) <= 0.092


def test_a_prompt_is_not_cut_for_its_own_deadline() -> None:
    engine = timed(itl_target=0.0)
    engine.add_request(request("chat", 64, 2000, itl=1.0))
    for _ in range(50):
        engine.step()
    engine.add_request(request("long", 4000, 1, itl=0.03))
    began = len(loads(engine))
    while "long" in engine.scheduler.requests:
        engine.step()
    assert len(loads(engine)) - began <= 20


def test_a_target_that_is_tighter_holds() -> None:
    engine = timed(itl_target=0.01)
    engine.add_request(request("chat", 64, 2000, itl=0.2))
    for _ in range(100):
        engine.step()
    engine.add_request(request("long", 4000, 1))
    began = len(loads(engine))
    while "long" in engine.scheduler.requests:
        engine.step()
    assert np.percentile([cpu(load) for load in loads(engine)[began:]], 99) <= 0.0105


def test_a_prompt_that_may_not_be_cut_is_not() -> None:
    engine = timed(enable_chunked_prefill=False)
    engine.add_request(request("chat", 64, 2000, itl=0.01))
    for _ in range(50):
        engine.step()
    engine.add_request(request("long", 500, 1))
    engine.step()
    assert loads(engine)[-1].prefill_rows == 500


def running_at_most(*requests: Request) -> tuple[LLMEngine, int]:
    """An engine that knows its steps, and the most of these that ran at once."""
    engine = timed()
    engine.add_request(request("warm", 64, 60, itl=1.0))
    while engine.has_unfinished():
        engine.step()
    engine.add_requests(requests)
    most = 0
    while engine.has_unfinished():
        engine.step()
        most = max(most, len(engine.scheduler.running))
    return engine, most


def test_a_request_is_kept_out_while_its_row_would_break_a_deadline() -> None:
    """2 ms and 0.35 ms a row: eight rows take 4.8 ms, nine 5.15."""
    engine, most = running_at_most(*(request(f"r{i}", 4, 40, itl=0.005) for i in range(20)))
    assert 6 <= most <= 8
    assert engine.occupancy.seconds().deadline > 0
    assert all(cpu(load) <= 0.0052 for load in loads(engine)[-100:] if not load.prefill_rows)


def test_also_for_a_request_that_has_none() -> None:
    tight = [request(f"t{i}", 4, 400, itl=0.005) for i in range(4)]
    _, most = running_at_most(*tight, *(request(f"n{i}", 4, 40) for i in range(20)))
    assert 6 <= most <= 8


def test_a_deadline_that_cannot_be_kept_alone_holds_nobody_up() -> None:
    _, most = running_at_most(*(request(f"r{i}", 4, 40, itl=0.001) for i in range(20)))
    assert most == 20


def test_whoever_is_kept_out_enters_when_nobody_runs() -> None:
    engine = timed()
    engine.add_requests([request(f"r{i}", 4, 200) for i in range(10)])
    for _ in range(50):
        engine.step()
    single = request("single", 4, 4, itl=0.003)
    engine.add_request(single)
    behind = request("behind", 4, 4)
    engine.add_request(behind)
    while engine.has_unfinished():
        engine.step()
        assert not (behind.times.first_scheduled and not single.times.first_scheduled)
    assert single.num_output_tokens == behind.num_output_tokens == 4


def test_until_anything_is_known_nobody_is_kept_out() -> None:
    outlook = DecodeOutlook(StepCost(), [request("a", itl=1e-6)])
    assert outlook.admits(request("b", itl=1e-6))


def test_the_outlook_is_the_cost_of_the_step() -> None:
    cost = StepCost()
    for rows in (1, 2, 4, 8, 16):
        for context in (100, 1000, 4000):
            cost.observe(StepLoad(rows, rows * context), cpu(StepLoad(rows, rows * context)))
    made = [request(f"r{i}", 100 * i + 1, itl=1.0) for i in range(6)]
    seconds = cost.seconds(StepLoad(6, sum(r.num_tokens + 1 for r in made)))
    for margin in (-1e-6, 1e-6):
        last = request("last", 501, itl=seconds + margin)
        made[5] = last
        assert DecodeOutlook(cost, made[:5]).admits(last) is (margin > 0)
    assert DecodeOutlook(cost, made).tightest == last.deadline.itl
    embedding = Request("e", [1] * 4000, SamplingParams(max_tokens=0), pooling=Pooling.MEAN)  # it never decodes
    assert DecodeOutlook(cost, [*made[:5], embedding]).admits(last)


# -- TTFT ---------------------------------------------------------------------------------------------------------


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def engine_of(shed: bool, depth: int = 1, **config: Any) -> tuple[LLMEngine, Clock, list[str]]:
    """An engine with one seat, its clock, and where the names of what was shed go."""
    clock, gone = Clock(), list[str]()
    config = {"max_num_seqs": 1, "policy": "fair", "shed": shed, **config}
    engine = LLMEngine(FakeRuntime(steps_in_flight=depth), SchedulerConfig(**config), clock=clock)
    engine.on_shed = lambda requests: gone.extend(r.request_id for r in requests)
    return engine, clock, gone


@pytest.mark.parametrize("depth", [1, 2])
def test_what_missed_its_deadline_in_the_queue_is_shed(depth: int) -> None:
    engine, clock, gone = engine_of(True, depth)
    engine.add_requests([request("runs", tokens=6, ttft=1.0)])
    engine.step()
    late, fine, none = request("late", ttft=1.0), request("fine", ttft=5.0), request("none")
    for each in (late, fine, none):
        engine.add_request(each)
    clock.now += 1.5
    outputs = engine.step()
    assert gone == ["late"]
    assert late.status is RequestStatus.FINISHED_ABORTED
    assert "late" not in {o.request_id for o in outputs}
    engine.scheduler.check()
    while engine.has_unfinished():
        engine.step()
    assert gone == ["late"]
    assert fine.num_output_tokens == none.num_output_tokens == 4


def test_without_shedding_it_waits_behind_those_that_can_be_saved() -> None:
    engine, clock, gone = engine_of(False)
    engine.add_request(request("runs"))
    engine.step()
    late = request("late", ttft=1.0)
    engine.add_request(late)
    clock.now += 1.5
    fine = request("fine", ttft=1.0)
    engine.add_request(fine)
    while engine.has_unfinished():
        engine.step()
    assert gone == []
    assert fine.times.finished is not None
    assert late.times.first_scheduled is not None
    assert fine.times.finished <= late.times.first_scheduled
    assert late.num_output_tokens == 4


def test_one_that_was_scheduled_is_never_shed() -> None:
    """Neither when it was preempted, nor when it waits beside a sample that runs."""
    engine, clock, gone = engine_of(True)
    first, second = (request(name, ttft=1.0) for name in ("one#0", "one#1"))
    engine.add_requests([first, second])
    engine.step()
    clock.now += 5
    engine.step()
    important = request("now")
    important.priority = -1
    engine.add_request(important)
    engine.step()
    assert first.status is RequestStatus.PREEMPTED
    clock.now += 500
    while engine.has_unfinished():
        engine.step()
    assert gone == []
    assert first.num_output_tokens == second.num_output_tokens == 4


def test_samples_that_none_was_scheduled_of_are_shed_together() -> None:
    engine, clock, gone = engine_of(True)
    engine.add_request(request("runs", tokens=6))
    engine.step()
    engine.add_requests([request(f"late#{i}", ttft=1.0) for i in range(2)])
    clock.now += 1.5
    engine.step()
    assert gone == ["late#0", "late#1"]


def test_first_come_first_served_knows_no_deadlines() -> None:
    engine = LLMEngine(FakeRuntime(), SchedulerConfig())
    for made in (request("a", ttft=1.0), request("b", itl=1.0)):
        with pytest.raises(RequestError, match="deadline: the policy fcfs knows none"):
            engine.add_request(made)
