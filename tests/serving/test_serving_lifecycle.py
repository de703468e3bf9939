"""What the worker's life says and does at each turn, without a worker process."""

from __future__ import annotations

import pytest

from llmctl.config import ServeConfig
from llmctl.engine.llm_engine import EngineStats
from llmctl.errors import LlmctlError, NotReadyError
from llmctl.serving.lifecycle import EngineDeadError, EngineState, WorkerLifecycle
from llmctl.serving.wire import Progress, StepMessage, encode


class Requests:
    busy = False

    def __init__(self) -> None:
        self.steps: list[StepMessage] = []
        self.errors: list[LlmctlError] = []

    def on_step(self, message: StepMessage) -> None:
        self.steps.append(message)

    def on_scheduled(self, _: list[str]) -> None: ...

    def on_worker_lost(self, error: LlmctlError, reason: str) -> None: ...

    def on_worker_back(self) -> None: ...

    def fail_all(self, error: LlmctlError) -> None:
        self.errors.append(error)


def refusal(worker: WorkerLifecycle) -> NotReadyError:
    with pytest.raises(NotReadyError) as caught:
        worker.check_admitting()
    return caught.value


def test_it_admits_only_between_admit_and_drain_and_says_why() -> None:
    worker = WorkerLifecycle(ServeConfig(), Requests(), "info")
    lines: list[str] = []
    worker.on_progress = lines.append
    worker._on_message(encode(Progress("loading the engine")))
    assert lines == ["loading the engine"]
    assert "not ready: starting: loading the engine" in str(refusal(worker))
    worker.admit()
    assert worker.why_not_ready() is None
    worker.check_admitting()
    worker.drain()
    assert "draining: finishing running requests" in str(refusal(worker))
    worker.admit()
    assert worker.state is EngineState.DRAINING


def test_a_message_that_cannot_be_handled_is_the_engines_death() -> None:
    requests = Requests()
    worker = WorkerLifecycle(ServeConfig(), requests, "info")
    worker.admit()
    message = StepMessage([], EngineStats(0, 0, 0.0, 0, 0, 0, 0, 0, 0, 0), 0.0)
    worker._on_message(encode(message))
    assert requests.steps == [message]
    worker._on_message(b"\xff")
    assert [type(error) for error in requests.errors] == [EngineDeadError]
    assert (refusal(worker).code, worker.state) == ("engine_dead", EngineState.DEAD)
    assert str(worker.why_not_ready()).startswith("dead: the server failed: ")
    worker.drain()
    assert worker.state is EngineState.DEAD
