"""The worker's loop: what it reports and when, and the time that it waits and sends."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import cast

import pytest
from engine.fake_runtime import FakeRuntime
from small_tokenizers import byte_level

from llmctl.config import ServeConfig
from llmctl.engine.deadline import Deadline
from llmctl.engine.llm_engine import LLMEngine
from llmctl.engine.request import Request
from llmctl.engine.sampling_params import SamplingParams
from llmctl.engine.scheduler_config import SchedulerConfig
from llmctl.engine.step import SamplingBatch, StepPlan
from llmctl.serving.client import AsyncEngineClient
from llmctl.serving.engine_loop import EngineLoop
from llmctl.serving.metrics import ServerMetrics
from llmctl.serving.transport import WorkerChannel
from llmctl.serving.wire import (
    AddRequests,
    Command,
    Scheduled,
    Shutdown,
    StepMessage,
    WireRequest,
    decode_event,
    encode,
)
from llmctl.structured.compiler import GrammarCompiler

NO_GRAMMARS = GrammarCompiler(byte_level(), 40, ())
GREEDY = SamplingParams(temperature=0.0, max_tokens=4)


class Channel:
    """Brings one list of commands a turn, a tenth of a second late where the worker would wait; then the end. Sending
    takes as long as it is told."""

    def __init__(self, *turns: Sequence[Command], send_seconds: float = 0.0) -> None:
        self.turns, self.send_seconds = list(turns), send_seconds
        self.sent: list[StepMessage] = []
        self.scheduled: list[list[str]] = []

    def receive(self, timeout_ms: int) -> list[bytes]:
        if timeout_ms:
            time.sleep(0.1)
        return [encode(command) for command in (self.turns.pop(0) if self.turns else [Shutdown()])]

    def wake(self) -> None: ...

    def send(self, message: bytes) -> None:
        time.sleep(self.send_seconds)
        event = decode_event(message)
        if isinstance(event, Scheduled):
            self.scheduled.append(event.request_ids)
        else:
            assert isinstance(event, StepMessage)
            self.sent.append(event)


def add(name: str, params: SamplingParams = GREEDY) -> AddRequests:
    return AddRequests([WireRequest(name, [1, 2, 3], params, 0, None, 0.0)])


def run(engine: LLMEngine, channel: Channel) -> None:
    EngineLoop(engine, cast(WorkerChannel, channel), NO_GRAMMARS).run()


def test_a_wait_is_reported_and_counted_and_the_end_is_not_reported() -> None:
    channel = Channel([], [])
    run(LLMEngine(FakeRuntime(), SchedulerConfig()), channel)
    assert [message.outputs for message in channel.sent] == [[], []]
    waited = [message.stats.state_seconds.no_requests for message in channel.sent]
    assert 0.1 <= waited[0] < waited[1] - 0.09
    assert channel.sent[1].busy_seconds < 0.1


def test_time_to_send_reports_is_the_api_processes_while_requests_run() -> None:
    channel = Channel([add("a")], [], [], [], send_seconds=0.02)
    run(LLMEngine(FakeRuntime(), SchedulerConfig()), channel)
    seconds = channel.sent[3].stats.state_seconds
    assert channel.sent[3].outputs[0].finish_reason == "length"
    assert seconds.api_process >= 3 * 0.02
    assert seconds.no_requests >= 0.1


def test_what_is_in_a_step_for_the_first_time_is_told_before_the_step() -> None:
    class Fatal(FakeRuntime):
        def execute(self, plan: StepPlan, sampling: SamplingBatch) -> object:  # type: ignore[override]
            if any(piece.token_ids == [9] for piece in plan.slices):
                raise RuntimeError("dead")
            return super().execute(plan, sampling)

    poison = AddRequests([WireRequest("poison", [9], GREEDY, 0, None, 0.0)])
    channel = Channel([add("a"), add("b")], [], [poison, add("c"), add("d")])
    with pytest.raises(RuntimeError, match="dead"):
        run(LLMEngine(Fatal(), SchedulerConfig(max_num_seqs=4)), channel)
    assert channel.scheduled == [["a", "b"], ["poison", "c"]]


@pytest.mark.parametrize(("seconds", "milliseconds"), [(10.0, 10_000), (0.025, 25), (0.0001, 1)])
def test_an_idle_worker_reports_as_often_as_it_is_told(seconds: float, milliseconds: int) -> None:
    waits = []

    class Watched(Channel):
        def receive(self, timeout_ms: int) -> list[bytes]:
            waits.append(timeout_ms)
            return super().receive(timeout_ms)

    engine = LLMEngine(FakeRuntime(), SchedulerConfig())
    EngineLoop(engine, cast(WorkerChannel, Watched([])), NO_GRAMMARS, seconds).run()
    assert waits == [milliseconds] * 2


def test_before_it_waits_nothing_is_in_flight() -> None:
    """The step that was computed in vain is the waiting's, not the next request's."""
    runtime = FakeRuntime(steps_in_flight=2)
    plain = LLMEngine(FakeRuntime(), SchedulerConfig())
    plain.add_request(Request("a", [1, 2, 3], GREEDY))
    first = plain.step()[0].new_token_ids[0]
    in_flight = []

    class Watched(Channel):
        def receive(self, timeout_ms: int) -> list[bytes]:
            in_flight.append(len(runtime.queue))
            return super().receive(timeout_ms)

    channel = Watched([add("a", SamplingParams(temperature=0.0, stop_token_ids=(first,)))], [])
    run(LLMEngine(runtime, SchedulerConfig()), channel)
    assert channel.sent[0].outputs[0].finish_reason == "stop"
    assert len(runtime.plans) == 2
    assert in_flight == [0, 0, 0]
    assert channel.sent[1].stats.num_steps == 1


def test_a_report_before_anybody_may_ask_is_taken_in() -> None:
    metrics = ServerMetrics("m")
    client = AsyncEngineClient(ServeConfig(), metrics, stall_timeout=60)
    channel = Channel([])
    run(LLMEngine(FakeRuntime(), SchedulerConfig()), channel)
    client.on_step(channel.sent[0])
    assert metrics.engine_stats.state_seconds.no_requests >= 0.1


def test_what_missed_its_deadline_in_the_queue_is_refused() -> None:
    """It arrived at 0 s of the machine's clock; the one before it has the only seat."""
    late = WireRequest("late", [1, 2, 3], GREEDY, 0, None, 0.0, deadline=Deadline(0.25))
    channel = Channel([add("a")], [AddRequests([late])], [], [])
    run(LLMEngine(FakeRuntime(), SchedulerConfig(max_num_seqs=1, policy="fair", shed=True)), channel)
    (refused,) = [refused for message in channel.sent for refused in message.refused]
    assert refused.request_ids == ["late"]
    error = refused.error.error()
    assert (error.http_status, error.code, error.param) == (429, "deadline_missed", "deadline")
    assert "longer than its TTFT deadline of 250 ms" in str(error)
    assert channel.scheduled == [["a"]]


def test_a_request_without_a_token_is_said_to_wait_once() -> None:
    """``b`` finds no seat, and the prompt of ``c`` takes two steps."""
    long = AddRequests([WireRequest("c", list(range(1, 13)), GREEDY, 0, None, 0.0)])
    channel = Channel([add("a"), add("b")], [], [], [], [], [], [], [], [long], [], [])
    run(LLMEngine(FakeRuntime(), SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=8)), channel)
    waiting = [message.waiting for message in channel.sent]
    assert waiting[0] == ["b"]
    assert [ids for ids in waiting if ids] == [["b"], ["c"]]


def test_what_may_still_be_refused_is_not_said_to_wait() -> None:
    late = WireRequest("late", [1, 2, 3], GREEDY, 0, None, time.monotonic(), deadline=Deadline(100))
    config = SchedulerConfig(max_num_seqs=1, policy="fair", shed=True)
    channel = Channel([add("a"), AddRequests([late])], [])
    run(LLMEngine(FakeRuntime(), config), channel)
    assert not any(message.waiting for message in channel.sent)


def test_what_cannot_be_refused_any_more_is_said_to_wait() -> None:
    """``late`` has a seat once ``a`` is done, and a prompt of two steps."""
    late = WireRequest("late", list(range(1, 13)), GREEDY, 0, None, time.monotonic(), deadline=Deadline(100))
    config = SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=8, policy="fair", shed=True)
    channel = Channel([add("a"), AddRequests([late])], [], [], [], [], [])
    run(LLMEngine(FakeRuntime(), config), channel)
    waiting = [message.waiting for message in channel.sent]
    assert [ids for ids in waiting if ids] == [["late"]]
    assert not waiting[0]


def test_a_token_under_way_is_not_waited_for() -> None:
    channel = Channel([add("a")], [add("b")], [], [])
    run(LLMEngine(FakeRuntime(steps_in_flight=2), SchedulerConfig()), channel)
    assert not any(message.waiting for message in channel.sent)
