"""The API process's end of the engine: requests go to the worker, its steps become text and metrics.

Token ids come from the worker, one message per step; text is made here, so that the worker's time goes to the model.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from itertools import count

from llmctl.config import EngineOptions
from llmctl.engine.llm_engine import TokenOutput
from llmctl.engine.output import OutputProcessor, TextOutput
from llmctl.errors import LlmctlError, NotReadyError, QueueFullError, RequestError
from llmctl.serving.generation import Generation, RunningSequence, SequenceSpec
from llmctl.serving.lifecycle import EngineState, WorkerLifecycle
from llmctl.serving.metrics import ServerMetrics
from llmctl.serving.wire import AbortRequests, AddRequests, StepMessage, WireRequest


class AsyncEngineClient:
    """The requests that run in one worker.

    Attributes:
        worker: its life.

    Args:
        metrics: where request latencies and the engine's totals are recorded.
        stall_timeout: seconds without a step, while requests run, after which the engine counts as stalled.
    """

    def __init__(
        self, config: EngineOptions, metrics: ServerMetrics, *, stall_timeout: float, log_level: str = "info"
    ) -> None:
        self.worker = WorkerLifecycle(config, self, log_level)
        self._config = config
        self._metrics = metrics
        self._stall_timeout = stall_timeout
        self._idle = asyncio.Event()
        self._idle.set()
        self._texts: OutputProcessor | None = None
        self._numbers = count()
        self._running: dict[str, RunningSequence] = {}
        self._ended_by_stop: dict[str, tuple[RunningSequence, TextOutput]] = {}
        self._last_progress = time.monotonic()

    @property
    def busy(self) -> bool:
        """Whether any request is running."""
        return bool(self._running)

    def admit(self) -> None:
        """Begin to take requests; called once everything around a ready worker is in place."""
        assert self.worker.tokenizer is not None
        self._texts = OutputProcessor(self.worker.tokenizer)
        self._last_progress = time.monotonic()
        self.worker.admit()

    def why_not_ready(self) -> str | None:
        """Why a new request would not be served now; None when it would."""
        reason = self.worker.why_not_ready()
        silent = time.monotonic() - self._last_progress
        if reason is None and self._running and silent > self._stall_timeout:
            return f"stalled: no step for {silent:.0f} s while {len(self._running)} requests run"
        return reason

    async def until_idle(self) -> None:
        """Wait until no request is running."""
        await self._idle.wait()

    async def close(self) -> None:
        """End running requests, and the worker."""
        self.fail_all(NotReadyError("the server is shutting down"))
        await self.worker.close()

    # Requests

    def check_room(self, sequences: int) -> None:
        """Refuse a request that the engine's queue has no room for, before anything is made of it.

        Raises:
            RequestError: more sequences than ever fit. QueueFullError: more than fit now.
        """
        limit = self._config.max_num_queued_reqs
        if sequences > limit:
            raise RequestError(
                f"expected at most {limit} sequences in a request (prompts times n), found {sequences}",
                fix="send fewer prompts at once, or start the server with a larger --max-num-queued-reqs",
                param="n",
            )
        # At most max_num_seqs of those that have been sent run: the others wait. The engine, which knows which, refuses
        # by the same limit; here nothing has to reach it.
        assert self.worker.info is not None, "requests are taken only once the engine is there"
        waiting = len(self._running) - self.worker.info.max_num_seqs
        if waiting + sequences > limit:
            raise QueueFullError(f"{waiting} requests are waiting and at most {limit} may", fix="try again later")

    def generate(self, specs: Sequence[SequenceSpec], tenant: str = "") -> Generation:
        """Submit the sequences of one HTTP request of a tenant; the engine admits all of them or none.

        Raises:
            NotReadyError: starting, draining or dead.
        """
        self.worker.check_admitting()
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
                    tenant,
                )
            )
        self._idle.clear()
        self.worker.send(AddRequests(wire))
        return generation

    def _cancel(self, generation: Generation) -> None:
        ids = [s.request_id for s in generation.sequences if s.request_id in self._running]
        self._forget(ids)
        for _ in ids:
            self._metrics.ended("abort")
        if ids and self.worker.state is not EngineState.DEAD:
            self.worker.send(AbortRequests(ids))

    def _forget(self, ids: Iterable[str]) -> None:
        assert self._texts is not None
        for request_id in ids:
            self._running.pop(request_id, None)
        self._texts.drop(ids)
        if not self._running:
            self._idle.set()

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

    # Outputs

    def on_step(self, message: StepMessage) -> None:
        """Hand each request what a step made of it."""
        now = self._last_progress = time.monotonic()
        self._metrics.engine(message.stats, message.busy_seconds)
        if self._texts is None:  # an engine that waits says so before anybody may ask it something
            return
        outputs, aborts = self._texts.process(message.outputs)
        for output in outputs:
            self._on_output(output, now)
        if self._ended_by_stop:
            for aborted in message.outputs:
                self._on_late_times(aborted)
        if aborts:
            self.worker.send(AbortRequests(aborts))
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
