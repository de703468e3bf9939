"""What goes wrong in the worker, before and amid serving, is what the API process says; no process is started."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmctl.config import EngineOptions, ServeConfig
from llmctl.errors import DeviceLostError, EngineLoadError, ExitCode, LlmctlError, UsageError
from llmctl.extras import install_hint
from llmctl.serving import engine_loop, worker
from llmctl.serving.api_channel import ApiChannel
from llmctl.serving.lifecycle import EngineDeadError, EngineState, WorkerLifecycle
from llmctl.serving.transport import socket_pair
from llmctl.serving.wire import WorkerFailed, decode_event
from llmctl.serving.worker_settings import WorkerSettings

LOST = DeviceLostError("a kernel failed, and the GPU with it", fix="restart the server")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Exception, Exception | None], tuple[int, LlmctlError]]]:
    """Run the worker's main, in this process, with an engine that fails: its exit code and what it told."""
    ours, theirs = socket_pair()
    monkeypatch.setattr(worker, "ignore_signals", lambda: None)
    monkeypatch.setattr(worker, "die_with_parent", lambda _: None)
    monkeypatch.setattr(
        worker, "_read_settings", lambda: WorkerSettings(EngineOptions(model="m"), theirs.detach(), 1, "critical")
    )

    def fail(at_start: Exception | None, serving: Exception | None) -> tuple[int, LlmctlError]:
        def start(*_: object) -> object:
            if at_start is not None:
                raise at_start
            limits = SimpleNamespace(vocab_size=1)
            return SimpleNamespace(engine=SimpleNamespace(limits=limits, eos_token_ids=()), tokenizer=None)

        class Loop:
            def __init__(self, *_: object) -> None:
                pass

            def run(self) -> None:
                assert serving is not None
                raise serving

        monkeypatch.setattr(engine_loop, "start", start)
        monkeypatch.setattr(engine_loop, "EngineLoop", Loop)
        code = worker.main()
        return code, asyncio.run(told(ours))

    yield fail
    ours.close()


async def told(end: socket.socket) -> LlmctlError:
    events: list[bytes] = []
    channel = await ApiChannel.open(end, events.append)
    await channel.ended()
    (event,) = map(decode_event, events)
    assert isinstance(event, WorkerFailed)
    return event.error.error()


@pytest.mark.parametrize(
    ("error", "said", "code"),
    [
        (LOST, str(LOST), ExitCode.RUNTIME),
        (UsageError("--x: no", fix="y"), "--x: no (y)", ExitCode.USAGE),
        (EngineLoadError("not this one"), "not this one", ExitCode.RUNTIME),
        (FileNotFoundError(2, "No such file", "f"), "No such file: f", ExitCode.RUNTIME),
        (
            ModuleNotFoundError("No module named 'torch'", name="torch.nn"),
            f"this needs PyTorch, which is not installed ({install_hint('quantize')})",
            ExitCode.RUNTIME,
        ),
        (RuntimeError("a shape\nis wrong"), "the engine failed: RuntimeError: a shape is wrong", ExitCode.RUNTIME),
        (AssertionError(), "the engine failed: AssertionError", ExitCode.RUNTIME),
    ],
)
@pytest.mark.parametrize("serving", [False, True], ids=["starting", "serving"])
def test_the_api_process_is_told(
    run: Callable[..., tuple[int, LlmctlError]], serving: bool, error: Exception, said: str, code: ExitCode
) -> None:
    found, told_error = run(*((None, error) if serving else (error, None)))
    assert (found, str(told_error), told_error.exit_code) == (code, said, code)


@pytest.mark.parametrize("gone", [EOFError("gone"), BrokenPipeError()])
def test_without_an_api_process_nothing_is_told(
    run: Callable[..., tuple[int, LlmctlError]], gone: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asyncio, "run", lambda coroutine: coroutine.close())
    assert run(None, gone) == (1, None)


class Requests:
    busy = True

    def __init__(self) -> None:
        self.errors: list[LlmctlError] = []

    def on_step(self, _: object) -> None: ...

    def on_scheduled(self, _: list[str]) -> None: ...

    def on_worker_lost(self, error: LlmctlError, reason: str) -> None: ...

    def on_worker_back(self) -> None: ...

    def fail_all(self, error: LlmctlError) -> None:
        self.errors.append(error)


class Hanging:
    """A worker process that does not end by itself."""

    def __init__(self) -> None:
        self.stopped: list[float] = []

    async def stop(self, timeout: float) -> int:
        self.stopped.append(timeout)
        return -9


@pytest.mark.parametrize("serving", [False, True])
def test_ready_and_the_end_say_it(serving: bool, tmp_path: Path) -> None:
    from llmctl.serving.wire import ErrorInfo, encode

    async def life() -> None:
        requests, process = Requests(), Hanging()
        lifecycle = WorkerLifecycle(ServeConfig(model=str(tmp_path)), requests, "info")
        lifecycle._process = process  # type: ignore[assignment]
        lifecycle._tasks = []
        if serving:
            lifecycle.admit()
        lifecycle._on_message(encode(WorkerFailed(ErrorInfo.of(LOST))))
        assert lifecycle.state is EngineState.DEAD
        assert lifecycle.why_not_ready() == f"dead: {LOST}"
        assert [(type(error), str(error)) for error in requests.errors] == [(EngineDeadError, str(LOST))]
        died = await lifecycle.until_dead()
        assert (died.message, died.fix, died.exit_code) == (LOST.message, LOST.fix, ExitCode.RUNTIME)
        with pytest.raises(LlmctlError, match="a kernel failed"):
            await lifecycle.until_ready()
        await asyncio.gather(*lifecycle._tasks)
        assert process.stopped == [5.0]

    asyncio.run(life())
