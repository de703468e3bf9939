"""The life of the worker, seen from the API process: started, ready, drained, dead, closed."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from dataclasses import fields
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from llmctl.config import EngineOptions
from llmctl.errors import LlmctlError, NotReadyError
from llmctl.serving.supervisor import WorkerProcess, WorkerSettings, describe_exit
from llmctl.serving.transport import ApiChannel, socket_pair
from llmctl.serving.wire import (
    Command,
    EngineInfo,
    Located,
    Progress,
    Shutdown,
    StepMessage,
    WorkerFailed,
    decode_event,
    encode,
)
from llmctl.text.tokenizer import Tokenizer

log = logging.getLogger("llmctl.serving")

_WORKER_EXIT_SECONDS = 5.0


class EngineState(StrEnum):
    """Where the engine is in its life."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"


class EngineDeadError(NotReadyError):
    """The worker process is gone."""

    code = "engine_dead"


class Requests(Protocol):
    """The requests that run in the worker, as far as its life concerns them."""

    @property
    def busy(self) -> bool:
        """Whether any is running."""
        ...

    def on_step(self, message: StepMessage) -> None:
        """Take in what one step did."""
        ...

    def fail_all(self, error: LlmctlError) -> None:
        """End every one of them with an error."""
        ...


class WorkerLifecycle:
    """One engine in one worker process.

    Attributes:
        state: see EngineState. info, tokenizer, engine_path: known once it is ready.
        on_progress: called with a line while the engine starts.

    Args:
        requests: what runs in it; told of each step, and of its death.
    """

    def __init__(self, config: EngineOptions, requests: Requests, log_level: str) -> None:
        self.state = EngineState.STARTING
        self.info: EngineInfo | None = None
        self.tokenizer: Tokenizer | None = None
        self.engine_path: Path | None = None
        self.on_progress: Callable[[str], None] = lambda line: log.info("%s", line)
        self._config = config
        self._requests = requests
        self._log_level = log_level
        self._doing = "starting the worker"
        self._error: LlmctlError | None = None
        self._channel: ApiChannel | None = None
        self._process: WorkerProcess | None = None
        self._tasks: list[asyncio.Task[Any]] = []
        self._loading: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()
        self._dead = asyncio.Event()

    async def start(self) -> None:
        """Start the worker process; it reports by itself when it is ready."""
        ours, theirs = socket_pair()
        self._channel = await ApiChannel.open(ours, self._on_message)
        plain = EngineOptions(**{f.name: getattr(self._config, f.name) for f in fields(EngineOptions)})
        with theirs:
            settings = WorkerSettings(plain, theirs.fileno(), os.getpid(), self._log_level)
            self._process = await WorkerProcess.start(settings, theirs)
        self._tasks = [asyncio.create_task(self._watch(self._process, self._channel))]

    async def until_ready(self) -> EngineInfo:
        """Wait until requests can be served.

        Raises:
            LlmctlError: what kept the worker from starting.
        """
        await self._ready.wait()
        if self._error is not None:
            raise self._error
        assert self.info is not None
        return self.info

    async def until_dead(self) -> LlmctlError:
        """Wait for the worker's death, which may never come; why it died."""
        await self._dead.wait()
        assert self._error is not None
        return self._error

    def admit(self) -> None:
        """Begin to take requests, unless told to drain before."""
        if self.state is EngineState.STARTING:
            self.state = EngineState.READY

    def drain(self) -> None:
        """Take no new requests from now on."""
        if self.state in (EngineState.STARTING, EngineState.READY):
            self.state = EngineState.DRAINING

    async def close(self) -> None:
        """End the worker and remove every trace of it; no request may be running."""
        obeys = self.state in (EngineState.READY, EngineState.DRAINING) and self.info is not None
        self.drain()
        if obeys:
            self.send(Shutdown())
        if self._process is not None:
            await self._process.stop(_WORKER_EXIT_SECONDS if obeys else 0)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._channel is not None:
            self._channel.close()

    def kill(self) -> None:
        """End the worker at once; for a process that is about to exit."""
        if self._process is not None:
            self._process.kill()

    def send(self, command: Command) -> None:
        """Send the worker a command."""
        assert self._channel is not None
        self._channel.send(encode(command))

    def why_not_ready(self) -> str | None:
        """Why a new request would not be taken now; None when it would."""
        if self.state is EngineState.STARTING:
            return f"starting: {self._doing}"
        if self.state is EngineState.DRAINING:
            return "draining: finishing running requests, taking no new ones"
        if self.state is EngineState.DEAD:
            return f"dead: {self._error}"
        return None

    def check_admitting(self) -> None:
        """Refuse when requests cannot be taken.

        Raises:
            NotReadyError: starting, draining or dead, with the reason.
        """
        if self.state is EngineState.READY:
            return
        error = EngineDeadError if self.state is EngineState.DEAD else NotReadyError
        raise error(f"the engine is not ready: {self.why_not_ready()}")

    def _on_message(self, message: bytes) -> None:
        try:
            event = decode_event(message)
            if isinstance(event, StepMessage):
                self._requests.on_step(event)
            else:
                self._on_other_event(event)
        except Exception as error:  # what is lost here, nothing would ever answer
            log.exception("cannot handle what the worker sent")
            self._die(EngineDeadError(f"the server failed: {type(error).__name__}: {error}"))

    def _on_other_event(self, event: Any) -> None:
        if isinstance(event, Progress):
            self._doing = event.text
            self.on_progress(event.text)
        elif isinstance(event, Located):
            self.engine_path = Path(event.engine_path)
            self._loading = asyncio.create_task(self._load_tokenizer(self.engine_path))
            self._tasks.append(self._loading)  # the worker may fail before anyone awaits it, and for the same reason
        elif isinstance(event, EngineInfo):
            self._tasks.append(asyncio.create_task(self._become_ready(event)))
        elif isinstance(event, WorkerFailed):
            self._die(event.error.error())
            if self._process is not None:  # what has lost its device may never come to its end
                self._tasks.append(asyncio.create_task(self._process.stop(_WORKER_EXIT_SECONDS)))

    async def _load_tokenizer(self, path: Path) -> None:
        tokenizer = self.tokenizer = await asyncio.to_thread(Tokenizer.from_folder, path)
        # Nothing waits for the bounds: the first long text would, on the event loop.
        self._tasks.append(asyncio.create_task(asyncio.to_thread(lambda: tokenizer.bounds)))

    async def _become_ready(self, info: EngineInfo) -> None:
        assert self._loading is not None
        try:
            await self._loading
        except LlmctlError as error:
            self._die(error)
            return
        self.info = info
        self._ready.set()

    async def _watch(self, process: WorkerProcess, channel: ApiChannel) -> None:
        code = await process.wait()
        await channel.ended()  # a last message may say why
        if self.state is EngineState.DRAINING and not self._requests.busy and code == 0:
            return
        self._die(self._error or EngineDeadError(f"the engine worker died: {describe_exit(code)}"))

    def _die(self, error: LlmctlError) -> None:
        self._error = error
        self.state = EngineState.DEAD
        self._requests.fail_all(error if isinstance(error, NotReadyError) else EngineDeadError(str(error)))
        self._ready.set()
        self._dead.set()
