"""The API process's end of the engine: starts and watches the worker, sends requests, turns its steps into text.

Token ids come from the worker, one message per step; text is made here, so that the worker's time goes to the model.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from enum import StrEnum
from itertools import count
from pathlib import Path
from typing import Any

from llmctl.config import EngineConfig
from llmctl.engine.llm_engine import EngineStats, TokenOutput
from llmctl.engine.output import OutputProcessor, TextOutput
from llmctl.errors import LlmctlError, NotReadyError
from llmctl.serving.generation import Generation, RunningSequence, SequenceSpec
from llmctl.serving.metrics import ServerMetrics
from llmctl.serving.supervisor import WorkerProcess, WorkerSettings, describe_exit
from llmctl.serving.transport import ApiChannel, socket_pair
from llmctl.serving.wire import (
    AbortRequests,
    AddRequests,
    Command,
    EngineInfo,
    Located,
    Progress,
    Shutdown,
    StartFailed,
    StepMessage,
    WireRequest,
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


class AsyncEngineClient:
    """One engine in one worker process.

    Attributes:
        state: see EngineState. info, tokenizer, engine_path: known once it is ready.
        on_progress: called with a line while the engine starts.

    Args:
        metrics: where request latencies and the engine's totals are recorded.
        stall_timeout: seconds without a step, while requests run, after which the engine counts as stalled.
    """

    def __init__(
        self, config: EngineConfig, metrics: ServerMetrics, *, stall_timeout: float, log_level: str = "info"
    ) -> None:
        self.state = EngineState.STARTING
        self.info: EngineInfo | None = None
        self.tokenizer: Tokenizer | None = None
        self.engine_path: Path | None = None
        self.stats: EngineStats | None = None
        self.on_progress: Callable[[str], None] = lambda line: log.info("%s", line)
        self._config = config
        self._metrics = metrics
        self._stall_timeout = stall_timeout
        self._log_level = log_level
        self._doing = "starting the worker"
        self._error: LlmctlError | None = None
        self._channel: ApiChannel | None = None
        self._worker: WorkerProcess | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._loading: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()
        self._dead = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._texts: OutputProcessor | None = None
        self._numbers = count()
        self._running: dict[str, RunningSequence] = {}
        self._ended_by_stop: dict[str, tuple[RunningSequence, TextOutput]] = {}
        self._last_progress = time.monotonic()

    # Life of the worker

    async def start(self) -> None:
        """Start the worker process; it reports by itself when it is ready."""
        ours, theirs = socket_pair()
        self._channel = await ApiChannel.open(ours, self._on_message)
        plain = EngineConfig(**{f.name: getattr(self._config, f.name) for f in fields(EngineConfig)})
        with theirs:
            settings = WorkerSettings(plain, theirs.fileno(), os.getpid(), self._log_level)
            self._worker = await WorkerProcess.start(settings, theirs)
        self._tasks = [asyncio.create_task(self._watch_worker(self._worker, self._channel))]

    @property
    def worker_pid(self) -> int | None:
        """Process id of the worker."""
        return self._worker.pid if self._worker else None

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

    async def close(self) -> None:
        """End the worker and remove every trace of it."""
        obeys = self.state in (EngineState.READY, EngineState.DRAINING) and self.info is not None
        self.drain()
        self.fail_all(NotReadyError("the server is shutting down"))
        if obeys:
            self._send(Shutdown())
        if self._worker is not None:
            await self._worker.stop(_WORKER_EXIT_SECONDS if obeys else 0)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._channel is not None:
            self._channel.close()

    def kill(self) -> None:
        """End the worker at once; for a process that is about to exit."""
        if self._worker is not None:
            self._worker.kill()

    # Health

    def why_not_ready(self) -> str | None:
        """Why a new request would not be served now; None when it would."""
        if self.state is EngineState.STARTING:
            return f"starting: {self._doing}"
        if self.state is EngineState.DRAINING:
            return "draining: finishing running requests, taking no new ones"
        if self.state is EngineState.DEAD:
            return f"dead: {self._error}"
        silent = time.monotonic() - self._last_progress
        if self._running and silent > self._stall_timeout:
            return f"stalled: no step for {silent:.0f} s while {len(self._running)} requests run"
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

    def drain(self) -> None:
        """Take no new requests from now on."""
        if self.state in (EngineState.STARTING, EngineState.READY):
            self.state = EngineState.DRAINING

    async def until_idle(self) -> None:
        """Wait until no request is running."""
        await self._idle.wait()

    # Requests

    def generate(self, specs: Sequence[SequenceSpec]) -> Generation:
        """Submit the sequences of one HTTP request; the engine admits all of them or none.

        Raises:
            NotReadyError: starting, draining or dead.
        """
        self.check_admitting()
        assert self._texts is not None
        generation = Generation(len(specs), self._cancel)
        if not self._running:
            self._last_progress = generation.arrival
        wire = []
        for index, spec in enumerate(specs):
            request_id = str(next(self._numbers))  # short: it is in every step's message
            sequence = RunningSequence(request_id, generation, index, len(spec.prompt_token_ids))
            generation.sequences.append(sequence)
            self._running[request_id] = sequence
            self._texts.add(request_id, spec.prompt_token_ids, spec.params)
            wire.append(
                WireRequest(
                    request_id,
                    spec.prompt_token_ids,
                    spec.params,
                    spec.priority,
                    spec.cache_salt,
                    generation.arrival,
                )
            )
        self._idle.clear()
        self._send(AddRequests(wire))
        return generation

    def _cancel(self, generation: Generation) -> None:
        ids = [s.request_id for s in generation.sequences if s.request_id in self._running]
        self._forget(ids)
        for _ in ids:
            self._metrics.ended("abort")
        if ids and self.state is not EngineState.DEAD:
            self._send(AbortRequests(ids))

    def _forget(self, ids: Iterable[str]) -> None:
        assert self._texts is not None
        for request_id in ids:
            self._running.pop(request_id, None)
        self._texts.drop(ids)
        if not self._running:
            self._idle.set()

    def _send(self, command: Command) -> None:
        assert self._channel is not None
        self._channel.send(encode(command))

    # Events

    def _on_message(self, message: bytes) -> None:
        try:
            event = decode_event(message)
            if isinstance(event, StepMessage):
                self._on_step(event)
            else:
                self._on_start_event(event)
        except Exception as error:  # what is lost here, nothing would ever answer
            log.exception("cannot handle what the worker sent")
            self._die(EngineDeadError(f"the server failed: {type(error).__name__}: {error}"))

    def _on_start_event(self, event: Any) -> None:
        if isinstance(event, Progress):
            self._doing = event.text
            self.on_progress(event.text)
        elif isinstance(event, Located):
            self.engine_path = Path(event.engine_path)
            self._loading = asyncio.create_task(self._load_tokenizer(self.engine_path))
            self._tasks.append(self._loading)  # the worker may fail before anyone awaits it, and for the same reason
        elif isinstance(event, EngineInfo):
            self._tasks.append(asyncio.create_task(self._become_ready(event)))
        elif isinstance(event, StartFailed):
            self._error = event.error.error()

    async def _load_tokenizer(self, path: Path) -> None:
        self.tokenizer = await asyncio.to_thread(Tokenizer.from_folder, path)
        self._texts = OutputProcessor(self.tokenizer)

    async def _become_ready(self, info: EngineInfo) -> None:
        assert self._loading is not None
        try:
            await self._loading
        except LlmctlError as error:
            self._die(error)
            return
        self.info = info
        self._ready.set()

    def admit(self) -> None:
        """Begin to take requests; called once everything around a ready engine is in place."""
        if self.state is EngineState.STARTING:
            self.state = EngineState.READY
            self._last_progress = time.monotonic()

    def _on_step(self, message: StepMessage) -> None:
        assert self._texts is not None
        now = self._last_progress = time.monotonic()
        self.stats = message.stats
        self._metrics.engine(message.stats, message.busy_seconds)
        outputs, aborts = self._texts.process(message.outputs)
        for output in outputs:
            self._on_output(output, now)
        if self._ended_by_stop:
            for aborted in message.outputs:
                self._on_late_times(aborted)
        if aborts:
            self._send(AbortRequests(aborts))
        for refused in message.refused:
            self._on_refused(refused.request_ids, refused.error.error())
        if not self._running:
            self._idle.set()

    def _on_output(self, output: TextOutput, now: float) -> None:
        sequence = self._running[output.request_id]
        if sequence.last_token is None:
            waited = now - sequence.generation.arrival
            self._metrics.begun(sequence.prompt_tokens, output.num_cached_tokens, waited)
        elif output.token_ids:
            self._metrics.itl.observe(now - sequence.last_token)
        sequence.last_token = now
        if output.finish_reason is not None:
            del self._running[output.request_id]
            if output.times is not None:
                self._metrics.finished(output, sequence.prompt_tokens, output.times)
            else:  # a stop string: the engine's times come when it has aborted the request
                self._ended_by_stop[output.request_id] = (sequence, output)
        sequence.generation.push(sequence.index, output)

    def _on_late_times(self, output: TokenOutput) -> None:
        if output.times is not None and output.request_id in self._ended_by_stop:
            sequence, ended = self._ended_by_stop.pop(output.request_id)
            self._metrics.finished(ended, sequence.prompt_tokens, output.times)

    def _on_refused(self, ids: list[str], error: LlmctlError) -> None:
        found = [self._running[i] for i in ids if i in self._running]
        self._forget(ids)
        for generation in {s.generation for s in found}:
            generation.fail(error)

    # Death

    async def _watch_worker(self, worker: WorkerProcess, channel: ApiChannel) -> None:
        code = await worker.wait()
        await channel.ended()  # a last message may say why
        if self.state is EngineState.DRAINING and not self._running and code == 0:
            return
        self._die(self._error or EngineDeadError(f"the engine worker died: {describe_exit(code)}"))

    def _die(self, error: LlmctlError) -> None:
        self._error = error
        self.state = EngineState.DEAD
        self.fail_all(error if isinstance(error, NotReadyError) else EngineDeadError(str(error)))
        self._ready.set()
        self._dead.set()

    def fail_all(self, error: LlmctlError) -> None:
        """End every running request with an error."""
        running = list(self._running.values())
        if running:
            self._forget([s.request_id for s in running])
            for _ in running:
                self._metrics.ended("error")
        for generation in {s.generation for s in running}:
            generation.fail(error)
        self._idle.set()
