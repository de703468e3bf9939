"""The life of the worker, seen from the API process: started, ready, replaced when it dies, drained, closed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from llmctl.config import EngineOptions
from llmctl.errors import LlmctlError, NotReadyError
from llmctl.serving.api_channel import ApiChannel
from llmctl.serving.restarts import RestartPolicy
from llmctl.serving.spawned import SpawnedWorker
from llmctl.serving.supervisor import WorkerProcess, describe_exit, exit_reason
from llmctl.serving.wire import (
    AdapterLoaded,
    AdapterRefused,
    Command,
    EngineInfo,
    Located,
    Progress,
    Scheduled,
    Shutdown,
    StepMessage,
    WorkerFailed,
    decode_event,
    encode,
)
from llmctl.serving.worker_settings import ALL_PROCESSORS, IDLE_SECONDS, Processors, engine_options
from llmctl.text.tokenizer import Tokenizer

log = logging.getLogger("llmctl.serving")

_WORKER_EXIT_SECONDS = 5.0
LEAST_RESTART_SECONDS = 60.0
"""What a replaced worker has at least to become ready; it has more where the first one took long."""
_RESTART_SHARE = 4.0


class EngineState(StrEnum):
    """Where the engine is in its life."""

    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
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

    def on_scheduled(self, request_ids: list[str]) -> None:
        """The worker is about to run a first step with these."""
        ...

    def on_adapter(self, event: AdapterLoaded | AdapterRefused) -> None:
        """An adapter was loaded, or not."""
        ...

    def on_worker_lost(self, error: LlmctlError, reason: str) -> None:
        """The worker is dead, and another will come: end what cannot outlive it. ``reason``: a word for metrics."""
        ...

    def on_worker_back(self) -> None:
        """Another worker is ready."""
        ...

    def fail_all(self, error: LlmctlError) -> None:
        """End every one of them with an error."""
        ...


class WorkerLifecycle:
    """One engine, in one worker process at a time.

    A worker that dies before it was ever ready is the end, with its reason. Later ones are replaced, as often as
    ``restarts`` allows.

    Attributes:
        state: see EngineState. info, tokenizer, engine_path: known once it is ready.
        on_progress: called with a line while the engine starts.

    Args:
        requests: what runs in it; told of each step, and of its death.
        idle_seconds: how often an idle worker gives a sign of life. processors: of its workers.
    """

    def __init__(
        self,
        config: EngineOptions,
        requests: Requests,
        log_level: str,
        restarts: RestartPolicy | None = None,
        idle_seconds: float = IDLE_SECONDS,
        processors: Processors = ALL_PROCESSORS,
    ) -> None:
        self.state = EngineState.STARTING
        self.info: EngineInfo | None = None
        self.tokenizer: Tokenizer | None = None
        self.engine_path: Path | None = None
        self.on_progress: Callable[[str], None] = lambda line: log.info("%s", line)
        self._config = engine_options(config)
        self._requests = requests
        self._log_level = log_level
        self._restarts = restarts or RestartPolicy(0)
        self._idle_seconds, self._processors = idle_seconds, processors
        self._doing = "starting the worker"
        self._error: LlmctlError | None = None
        self._channel: ApiChannel | None = None
        self._process: WorkerProcess | None = None
        self._tasks: list[asyncio.Task[Any]] = []
        self._loading: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()
        self._dead = asyncio.Event()
        self._closing = asyncio.Event()
        self._launching = asyncio.Lock()
        self._admitted = self._serving = False
        self._launched = self._first_start_seconds = 0.0
        self._delay: float | None = None  # before the next worker, once this one is known to be dead

    async def start(self, spawned: SpawnedWorker | None = None) -> None:
        """Start the worker process, or take one that has been told; it reports by itself when it is ready."""
        await self._launch(spawned)

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
        """Wait for the death of the worker that is not replaced, which may never come; why it died."""
        await self._dead.wait()
        assert self._error is not None
        return self._error

    def admit(self) -> None:
        """Begin to take requests, unless told to drain before."""
        if self.state is EngineState.STARTING:
            self.state = EngineState.READY
            self._admitted = True

    def drain(self) -> None:
        """Take no new requests from now on."""
        if self.state is not EngineState.DEAD:
            self.state = EngineState.DRAINING

    async def close(self) -> None:
        """End the worker and remove every trace of it; no request may be running."""
        self._closing.set()
        self.drain()
        async with self._launching:  # a process that is being started is there to be ended after this
            if self._serving:
                self.send(Shutdown())
            if self._process is not None:
                await self._process.stop(_WORKER_EXIT_SECONDS if self._serving else 0)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._channel is not None:
            self._channel.close()

    def kill(self) -> None:
        """End the worker at once; for a process that is about to exit."""
        if self._process is not None:
            self._process.kill()

    @property
    def pid(self) -> int | None:
        """The worker's process; None while there is none."""
        return None if self._process is None else self._process.pid

    def send(self, command: Command) -> None:
        """Send the worker a command."""
        assert self._channel is not None
        self._channel.send(encode(command))

    def why_not_ready(self) -> str | None:
        """Why a new request would not be taken now; None when it would."""
        if self.state is EngineState.STARTING:
            return f"starting: {self._doing}"
        if self.state is EngineState.RESTARTING:
            return f"restarting: {self._error}; now {self._doing}"
        if self.state is EngineState.DRAINING:
            return "draining: finishing running requests, taking no new ones"
        if self.state is EngineState.DEAD:
            return f"dead: {self._error}"
        return None

    def check_admitting(self) -> None:
        """Refuse when requests cannot be taken.

        Raises:
            NotReadyError: starting, restarting, draining or dead, with the reason.
        """
        if self.state is EngineState.READY:
            return
        error = EngineDeadError if self.state is EngineState.DEAD else NotReadyError
        raise error(f"the engine is not ready: {self.why_not_ready()}")

    # What the worker says

    def _on_message(self, message: bytes) -> None:
        if self._delay is not None:  # of a worker that was given up
            return
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
        if isinstance(event, Scheduled):
            self._requests.on_scheduled(event.request_ids)
        elif isinstance(event, AdapterLoaded | AdapterRefused):
            self._requests.on_adapter(event)
        elif isinstance(event, Progress):
            self._doing = event.text
            self.on_progress(event.text)
        elif isinstance(event, Located):
            self.engine_path = Path(event.engine_path)
            if self._loading is None:  # the worker may fail before anyone awaits it, and for the same reason
                self._loading = self._spawn(self._load_tokenizer(self.engine_path))
        elif isinstance(event, EngineInfo):
            self._spawn(self._become_ready(event))
        elif isinstance(event, WorkerFailed):
            self._lose(event.error.error(), "failed")
            if self._process is not None:  # what has lost its device may never come to its end
                self._spawn(self._process.stop(_WORKER_EXIT_SECONDS))

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
        if self._delay is not None or self.state is EngineState.DEAD:
            return
        seconds = time.monotonic() - self._launched
        self.info, self._serving = info, True
        if not self._admitted:
            self._first_start_seconds = seconds
            self._ready.set()
            return
        log.warning("the engine is back after %.1f s, with an empty prefix cache", seconds)
        if self.state is EngineState.RESTARTING:
            self.state, self._error = EngineState.READY, None
        self._requests.on_worker_back()

    # Processes

    async def _launch(self, spawned: SpawnedWorker | None = None) -> None:
        """Start a worker process if there is none yet, and watch it."""
        async with self._launching:
            if self._closing.is_set():
                return
            config = self._config
            if self.engine_path is not None:  # what was resolved or built for the first worker
                config = replace(config, model=str(self.engine_path))
            if spawned is None:
                spawned = SpawnedWorker()
                spawned.tell(config, self._log_level, self._idle_seconds, self._processors)
            self._channel = await ApiChannel.open(spawned.channel, self._on_message)
            self._process = spawned.watch()
            self._launched, self._delay, self._serving = time.monotonic(), None, False
            self._spawn(self._watch(self._process, self._channel))
            if self._admitted:
                self._spawn(self._expect_ready(self._process))

    async def _watch(self, process: WorkerProcess, channel: ApiChannel) -> None:
        code = await process.wait()
        with contextlib.suppress(TimeoutError):  # whoever else holds the other end sends nothing that matters
            await asyncio.wait_for(channel.ended(), _WORKER_EXIT_SECONDS)  # a last message may say why
        channel.close()
        self._serving = False
        if self._closing.is_set() or (self.state is EngineState.DRAINING and not self._requests.busy and code == 0):
            return
        self._lose(EngineDeadError(f"the engine worker died: {describe_exit(code)}"), exit_reason(code))
        await self._replace()

    async def _replace(self) -> None:
        """Start the next worker when its time has come, if there is to be one and somebody to serve."""
        while self._delay is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), self._delay)
            if self._closing.is_set() or (self.state is EngineState.DRAINING and not self._requests.busy):
                return
            self._delay, self._doing = None, "starting the worker"
            try:
                await self._launch()
            except OSError as error:
                if self._channel is not None:
                    self._channel.close()
                self._lose(EngineDeadError(f"the worker cannot be started: {error.strerror or error}"), "failed")

    async def _expect_ready(self, process: WorkerProcess) -> None:
        """End a replaced worker that does not become ready."""
        seconds = max(LEAST_RESTART_SECONDS, _RESTART_SHARE * self._first_start_seconds)
        await asyncio.sleep(seconds)
        if process is self._process and not self._serving:
            self._lose(EngineDeadError(f"the engine worker was not ready within {seconds:.0f} s"), "not_ready")
            process.kill()

    # Death

    def _lose(self, error: LlmctlError, reason: str) -> None:
        """The present worker is dead, or good for nothing: prepare for another one, or for the end."""
        if self.state is EngineState.DEAD or self._delay is not None:
            return  # it was said before
        self._serving = False
        delay = self._restarts.next_delay() if self._admitted else None
        if delay is None:
            if self._admitted and self._restarts.most:
                error.message += f"; {self._restarts.describe()} are spent"
            self._die(error)
            return
        log.error("%s; restarting it in %.1f s, %s", error, delay, self._restarts.describe())
        self._delay, self._doing = delay, f"waiting {delay:g} s before the next one"
        if self.state is EngineState.READY:
            self.state = EngineState.RESTARTING
        self._error = error
        self._requests.on_worker_lost(error, reason)

    def _die(self, error: LlmctlError) -> None:
        self._error = error
        self.state, self._serving = EngineState.DEAD, False
        self._requests.fail_all(error if isinstance(error, NotReadyError) else EngineDeadError(str(error)))
        self._ready.set()
        self._dead.set()

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.append(task)
        return task
