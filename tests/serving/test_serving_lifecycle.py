"""What the worker's life says and does at each turn, without a worker process."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fixtures import make_tokenizer

from llmctl.config import EngineOptions, ServeConfig
from llmctl.engine.llm_engine import EngineStats
from llmctl.errors import LlmctlError, NotReadyError, UsageError
from llmctl.serving import lifecycle as module
from llmctl.serving.lifecycle import EngineDeadError, EngineState, WorkerLifecycle
from llmctl.serving.restarts import RestartPolicy
from llmctl.serving.transport import socket_pair
from llmctl.serving.wire import (
    EngineInfo,
    ErrorInfo,
    Event,
    Located,
    Progress,
    StepMessage,
    WorkerFailed,
    encode,
)


class Requests:
    busy = False

    def __init__(self) -> None:
        self.steps: list[StepMessage] = []
        self.errors: list[LlmctlError] = []
        self.lost: list[str] = []
        self.back = 0

    def on_step(self, message: StepMessage) -> None:
        self.steps.append(message)

    def on_scheduled(self, _: list[str]) -> None: ...

    def on_worker_lost(self, _: LlmctlError, reason: str) -> None:
        self.lost.append(reason)

    def on_worker_back(self) -> None:
        self.back += 1

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


class Worker:
    """A worker process that does what the test says; its end of the channel."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end
        self.exit: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def say(self, event: Event) -> None:
        data = encode(event)
        self.end.sendall(len(data).to_bytes(4, "little") + data)

    def leave(self, code: int) -> None:
        self.end.close()
        if not self.exit.done():
            self.exit.set_result(code)

    def kill(self) -> None:
        self.leave(-9)

    async def wait(self) -> int:
        return await asyncio.shield(self.exit)

    async def stop(self, _: float) -> int:
        self.kill()
        return await self.wait()


INFO = EngineInfo("m", "llama", "reference", "none", "float32", 64, 16, 8, 300, 32, 0, 0, "float32", 2, 64)


class Played:
    """A worker that would wait for its settings."""

    def __init__(self, life: Life) -> None:
        if life.refuse:
            life.refuse -= 1
            raise OSError(11, "Resource temporarily unavailable")
        self.life = life
        self.channel, self.end = socket_pair()

    def tell(self, config: EngineOptions, *_: Any) -> None:
        self.life.models.append(config.model)

    def watch(self) -> Worker:
        self.life.workers.append(Worker(self.end))
        return self.life.workers[-1]


class Life:
    """A lifecycle whose workers are played; ``refuse``: how many starts fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, restarts: int) -> None:
        self.requests = Requests()
        self.workers: list[Worker] = []
        self.models: list[str] = []
        self.refuse = 0
        self.lifecycle = WorkerLifecycle(ServeConfig(model="m"), self.requests, "info", RestartPolicy(restarts))
        self.folder = make_tokenizer(folder) and folder
        monkeypatch.setattr(module, "SpawnedWorker", partial(Played, self))

    async def begin(self) -> Worker:
        await self.lifecycle.start()
        (worker,) = self.workers
        worker.say(Located(str(self.folder)))
        worker.say(INFO)
        await asyncio.wait_for(self.lifecycle.until_ready(), 10)
        self.lifecycle.admit()
        return worker

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.005)


@pytest.fixture
def life(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[int], Life]:
    monkeypatch.setattr("llmctl.serving.restarts.FIRST_DELAY_SECONDS", 0.01)
    return lambda restarts: Life(monkeypatch, tmp_path, restarts)


def test_the_next_worker_runs_the_same_engine_and_is_told_of(life: Callable[[int], Life]) -> None:
    async def run() -> None:
        played = life(1)
        first = await played.begin()
        first.leave(-11)
        await played.until(lambda: len(played.workers) == 2)
        assert played.lifecycle.state is EngineState.RESTARTING
        assert "restarting: the engine worker died: killed by SIGSEGV; now" in str(played.lifecycle.why_not_ready())
        assert refusal(played.lifecycle).code == "not_ready"
        assert (played.requests.lost, played.requests.back) == (["SIGSEGV"], 0)
        played.workers[1].say(INFO)
        await played.until(lambda: played.requests.back == 1)
        assert played.lifecycle.why_not_ready() is None
        assert played.models == ["m", str(played.folder)]
        await played.lifecycle.close()

    asyncio.run(run())


def test_restarts_are_spent_and_the_last_reason_is_the_end(life: Callable[[int], Life]) -> None:
    async def run() -> None:
        played = life(2)
        (await played.begin()).leave(1)
        await played.until(lambda: len(played.workers) == 2)
        played.workers[1].say(WorkerFailed(ErrorInfo.of(UsageError("--x: no"))))
        await played.until(lambda: len(played.workers) == 3)
        played.workers[2].leave(-9)
        error = await asyncio.wait_for(played.lifecycle.until_dead(), 10)
        assert "killed by SIGKILL" in error.message
        assert error.message.endswith("2 of 2 restarts within 10 minutes are spent")
        assert (played.requests.lost, len(played.requests.errors)) == (["exit", "failed"], 1)
        await played.lifecycle.close()

    asyncio.run(run())


def test_a_worker_that_is_never_ready_again_is_killed(
    life: Callable[[int], Life], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LEAST_RESTART_SECONDS", 0.05)
    monkeypatch.setattr(module, "_RESTART_SHARE", 0.0)

    async def run() -> None:
        played = life(1)
        (await played.begin()).leave(-9)
        error = await asyncio.wait_for(played.lifecycle.until_dead(), 10)
        assert "the engine worker was not ready within 0 s" in error.message
        assert await played.workers[1].wait() == -9
        await played.lifecycle.close()

    asyncio.run(run())


def test_a_process_that_cannot_be_started_counts_as_a_death(life: Callable[[int], Life]) -> None:
    async def run() -> None:
        played = life(2)
        first = await played.begin()
        played.refuse = 1
        first.leave(-9)
        await played.until(lambda: len(played.workers) == 2)
        assert played.requests.lost == ["SIGKILL", "failed"]
        await played.lifecycle.close()

    asyncio.run(run())


def test_what_a_worker_says_after_it_was_given_up_is_not_heard(life: Callable[[int], Life]) -> None:
    async def run() -> None:
        played = life(1)
        await played.begin()
        played.lifecycle._lose(EngineDeadError("given up"), "not_ready")
        steps = len(played.requests.steps)
        played.lifecycle._on_message(encode(INFO))
        played.lifecycle._on_message(encode(StepMessage([], EngineStats(0, 0, 0.0, 0, 0, 0, 0, 0, 0, 0), 0.0)))
        await asyncio.sleep(0.01)
        assert played.lifecycle.state is EngineState.RESTARTING
        assert (len(played.requests.steps), played.requests.back) == (steps, 0)
        await played.lifecycle.close()

    asyncio.run(run())


def test_before_it_was_ready_a_death_is_the_end(life: Callable[[int], Life]) -> None:
    async def run() -> None:
        played = life(3)
        await played.lifecycle.start()
        played.workers[0].leave(-9)
        with pytest.raises(EngineDeadError, match="killed by SIGKILL"):
            await asyncio.wait_for(played.lifecycle.until_ready(), 10)
        assert len(played.workers) == 1
        await played.lifecycle.close()

    asyncio.run(run())


@pytest.mark.parametrize("busy", [False, True])
def test_while_draining_it_is_replaced_only_for_what_waits(life: Callable[[int], Life], busy: bool) -> None:
    async def run() -> None:
        played = life(3)
        first = await played.begin()
        played.requests.busy = busy
        played.lifecycle.drain()
        first.leave(-9)
        await played.until(lambda: played.requests.lost == ["SIGKILL"])
        await asyncio.sleep(0.1)
        assert len(played.workers) == 1 + busy
        assert played.lifecycle.state is EngineState.DRAINING
        await played.lifecycle.close()

    asyncio.run(run())
