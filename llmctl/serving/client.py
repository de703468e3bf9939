"""The API process's end of the engine: requests go to the worker, its steps become text and metrics.

Token ids come from the worker, one message per step; text is made here, so that the worker's time goes to the model.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import count

from llmctl.config import EngineOptions
from llmctl.engine.llm_engine import TokenOutput
from llmctl.engine.output import OutputProcessor, TextOutput
from llmctl.engine.request import RequestTimes
from llmctl.errors import (
    DeadlineMissedError,
    DeadlineUnreachableError,
    LlmctlError,
    NotReadyError,
    OverloadError,
    QueueFullError,
    RequestError,
)
from llmctl.serving.adapters import Adapters, ServedAdapter
from llmctl.serving.finish_rate import FinishRate, whole_seconds
from llmctl.serving.generation import Generation, RunningSequence, Samples, SequenceSpec
from llmctl.serving.lifecycle import EngineDeadError, EngineState, WorkerLifecycle
from llmctl.serving.metrics import ServerMetrics
from llmctl.serving.restarts import RestartPolicy
from llmctl.serving.survivors import QuarantinedError, Survivors
from llmctl.serving.ttft_predictor import TtftPredictor, Waiting
from llmctl.serving.wire import (
    AbortRequests,
    AdapterLoaded,
    AdapterRefused,
    AddRequests,
    StepMessage,
    WireRequest,
)
from llmctl.serving.worker_settings import ALL_PROCESSORS, Processors, idle_seconds


class AsyncEngineClient:
    """The requests of one engine, which outlive its worker as far as they can.

    Attributes:
        worker: its life. adapters: those that requests may ask for.

    Args:
        metrics: where request latencies and the engine's totals are recorded.
        stall_timeout: seconds without a word from the worker after which the engine counts as stalled.
        max_restarts: how often a dead worker is replaced, see ``RestartPolicy``.
        processors: of its workers.
    """

    def __init__(
        self,
        config: EngineOptions,
        metrics: ServerMetrics,
        *,
        stall_timeout: float,
        max_restarts: int = 0,
        log_level: str = "info",
        processors: Processors = ALL_PROCESSORS,
    ) -> None:
        signs = idle_seconds(stall_timeout)
        self.worker = WorkerLifecycle(config, self, log_level, RestartPolicy(max_restarts), signs, processors)
        self.adapters = Adapters(lambda command: self.worker.send(command))
        self._config = config
        self._metrics = metrics
        self._stall_timeout = stall_timeout
        self._idle = asyncio.Event()
        self._idle.set()
        self._texts: OutputProcessor | None = None
        self._numbers = count()
        self._running: dict[str, RunningSequence] = {}
        self._ended_by_stop: dict[str, tuple[RunningSequence, TextOutput]] = {}
        self._finished = FinishRate()
        self._predictor = TtftPredictor(fair=config.scheduling_policy == "fair") if config.shed else None
        self._survivors = Survivors(self._submit, self._engine_room)
        self._last_sign = time.monotonic()
        metrics.watch(self._held, lambda: self.worker.pid)
        if config.enable_lora:
            metrics.watch_adapters(config.max_loras, self._adapters_in_use)

    @property
    def busy(self) -> bool:
        """Whether any request is running."""
        return bool(self._running)

    def admit(self) -> None:
        """Begin to take requests; called once everything around a ready worker is in place."""
        assert self.worker.tokenizer is not None
        self._texts = OutputProcessor(self.worker.tokenizer)
        self._last_sign = time.monotonic()
        self.worker.admit()

    def why_not_ready(self) -> str | None:
        """Why a new request would not be served now; None when it would."""
        reason = self.worker.why_not_ready()
        silent = time.monotonic() - self._last_sign
        if reason is not None or silent <= self._stall_timeout:
            return reason
        if self._running:
            return f"stalled: no step for {silent:.0f} s while {len(self._running)} requests run"
        return f"stalled: no sign of life from the idle worker for {silent:.0f} s"

    async def until_idle(self) -> None:
        """Wait until no request is running."""
        await self._idle.wait()

    async def close(self) -> None:
        """End running requests, and the worker."""
        self.fail_all(NotReadyError("the server is shutting down"))
        await self.worker.close()

    # Requests

    def check_room(self, sequences: int, param: str = "n") -> None:
        """Refuse a request that the engine's queue has no room for, before anything is made of it.

        Args:
            param: the field to blame.

        Raises:
            RequestError: more sequences than ever fit. QueueFullError: more than fit now.
        """
        limit = self._config.max_num_queued_reqs
        if sequences > limit:
            counted = " (prompts times n)" if param == "n" else ""
            raise RequestError(
                f"{param}: expected at most {limit} sequences in a request{counted}, found {sequences}",
                fix="send fewer at once, or start the server with a larger --max-num-queued-reqs",
                param=param,
            )
        # At most max_num_seqs of those that have been sent run: the others wait. The engine, which knows which, refuses
        # by the same limit; here nothing has to reach it.
        assert self.worker.info is not None, "requests are taken only once the engine is there"
        waiting = len(self._running) - self.worker.info.max_num_seqs
        if waiting + sequences > limit:
            error = QueueFullError(f"{waiting} requests are waiting and at most {limit} may", fix="try again later")
            error.retry_after = self._finished.seconds_until(waiting + sequences - limit)
            raise error

    def generate(self, specs: Sequence[SequenceSpec], tenant: str = "") -> Generation:
        """Submit the sequences of one HTTP request of a tenant; the engine admits all of them or none.

        Raises:
            NotReadyError: starting, draining or dead. DeadlineUnreachableError: with ``shed``, when the first token
                would come too late by all that is known.
        """
        self.worker.check_admitting()
        assert self._texts is not None
        generation = Generation(len(specs), self._cancel, tenant)
        self._check_reachable(specs, generation.arrival, tenant)
        if not self._running:
            self._finished.begin(generation.arrival)
        samples = Samples(0, 0)
        for index, spec in enumerate(specs):
            if index % spec.samples == 0:
                samples = Samples(spec.samples, spec.samples)
            request_id = str(next(self._numbers))  # short: it is in every step's message
            prompt = spec.prompt_token_ids
            wire = WireRequest(
                request_id,
                prompt,
                spec.params,
                spec.priority,
                spec.cache_salt,
                generation.arrival,
                tenant,
                spec.deadline,
                spec.pooling,
                None if spec.adapter is None else spec.adapter.id,
            )
            sequence = RunningSequence(
                request_id, generation, index, len(prompt), samples, spec.params.max_tokens, wire, spec.deadline,
                adapter=spec.adapter,
            )  # fmt: skip
            generation.sequences.append(sequence)
            self._running[request_id] = sequence
            self._texts.add(request_id, prompt, spec.params)
            if self._predictor is not None:
                self._predictor.waits(request_id, _waiting(spec, generation.arrival, tenant))
        self._idle.clear()
        if self._survivors.holding:
            self._survivors.hold(generation)
        else:
            self._submit(generation)
        return generation

    def _check_reachable(self, specs: Sequence[SequenceSpec], arrival: float, tenant: str) -> None:
        first = specs[0]
        if self._predictor is None or first.deadline.ttft is None:
            return
        if not self._running:  # to refuse it would help nobody, and what a slow step measured would stand for ever
            return
        assert self.worker.info is not None, "requests are taken only once the engine is there"
        predicted = self._predictor.predict(
            _waiting(first, arrival, tenant), self.worker.info.max_num_seqs, self._finished.per_second(arrival)
        )
        if predicted <= first.deadline.ttft:
            return
        self._metrics.goodput.shed(first.deadline, len(specs))
        error = DeadlineUnreachableError(
            f"the first token is expected after {1000 * predicted:.0f} ms, "
            f"the TTFT deadline is {1000 * first.deadline.ttft:g} ms",
            fix="try again later, or with a longer deadline",
            param="deadline",
        )
        error.retry_after = whole_seconds(predicted - first.deadline.ttft)
        raise error

    def _submit(self, generation: Generation) -> None:
        for sequence in generation.sequences:
            sequence.sent = True
        self.worker.send(AddRequests([s.wire for s in generation.sequences if s.wire is not None]))

    def _engine_room(self) -> int:
        """How many more sequences the worker's queue takes, as far as it is known here."""
        queued = sum(s.sent and not s.scheduled for s in self._running.values())
        return self._config.max_num_queued_reqs - queued

    def _held(self) -> int:
        """How many sequences wait here for a worker."""
        return sum(not s.sent for s in self._running.values()) if self._survivors.holding else 0

    def _adapters_in_use(self) -> tuple[set[str], set[str]]:
        """Names of the adapters that requests run with, and of those that only wait for one."""
        named = [(s.adapter.name, s.scheduled) for s in self._running.values() if s.adapter is not None]
        running = {name for name, scheduled in named if scheduled}
        return running, {name for name, _ in named} - running

    def running(self) -> Iterator[tuple[RunningSequence, int]]:
        """Every sequence that is not finished, in order of arrival, with its output tokens so far."""
        for sequence in self._running.values():
            yield sequence, 0 if self._texts is None else self._texts.num_tokens(sequence.request_id)

    def requests_of(self, adapter: ServedAdapter) -> int:
        """How many sequences run with an adapter, or wait to."""
        return sum(s.adapter is not None and s.adapter.id == adapter.id for s in self._running.values())

    def _cancel(self, generation: Generation) -> None:
        ids = [s.request_id for s in generation.sequences if s.request_id in self._running]
        self._forget(ids)
        self._finished.count(len(ids))
        for _ in ids:
            self._metrics.ended("abort")
        if ids and self.worker.state is not EngineState.DEAD:
            self.worker.send(AbortRequests(ids))

    def _forget(self, ids: Iterable[str]) -> None:
        assert self._texts is not None
        for request_id in ids:
            self._running.pop(request_id, None)
            if self._predictor is not None:
                self._predictor.left(request_id)
        self._texts.drop(ids)
        if not self._running:
            self._idle.set()

    def fail_all(self, error: LlmctlError) -> None:
        """End every running request with an error, and what is being loaded."""
        self.adapters.worker_lost(error)
        self._fail(self._generations(), error)
        self._idle.set()

    def _generations(self) -> list[Generation]:
        """Those that run or wait, in order of arrival."""
        return list(dict.fromkeys(s.generation for s in self._running.values()))

    def _fail(self, generations: Iterable[Generation], error: LlmctlError) -> None:
        for generation in generations:
            failed = [s for s in generation.sequences if s.request_id in self._running]
            self._forget([s.request_id for s in failed])
            for sequence in failed:
                self._metrics.ended("error")
                self._metrics.goodput.ended(sequence.deadline, sequence.ttft, math.inf)
            generation.fail(error)

    # The worker's life

    def on_worker_lost(self, error: LlmctlError, reason: str) -> None:
        """End what has a token or has been the end of two workers; keep the rest for the next worker."""
        for sequence, output in self._ended_by_stop.values():  # their times will not come
            self._record(sequence, output, RequestTimes(sequence.generation.arrival))
        self._ended_by_stop.clear()
        lost, quarantined = self._survivors.sort(self._generations())
        self._fail(lost, EngineDeadError(f"{error}; this request was running", fix="send it again"))
        self._fail(
            quarantined,
            QuarantinedError(f"the engine died twice while it ran this request, which is not tried again: {error}"),
        )
        self._metrics.restarted(reason)
        self.adapters.worker_lost(EngineDeadError(f"{error}; an adapter was being loaded", fix="load it again"))
        if self._predictor is not None:
            self._predictor.worker_lost()

    def on_worker_back(self) -> None:
        """Give the new worker what was kept."""
        self._last_sign = time.monotonic()
        self.adapters.worker_back([s.adapter for s in self._running.values() if s.adapter is not None])
        self._survivors.release()

    def on_adapter(self, event: AdapterLoaded | AdapterRefused) -> None:
        """Take in what came of loading an adapter."""
        self.adapters.on_event(event)

    def on_scheduled(self, request_ids: list[str]) -> None:
        """Remember what is in a step that may be the worker's last."""
        now = self._last_sign = time.monotonic()
        for request_id in request_ids:
            if (sequence := self._running.get(request_id)) is not None:
                sequence.scheduled = True
                if self._predictor is not None:
                    self._predictor.scheduled(request_id)
                if sequence.scheduled_at is None:
                    sequence.scheduled_at = now

    # Outputs

    def on_step(self, message: StepMessage) -> None:
        """Hand each request what a step made of it."""
        now = self._last_sign = time.monotonic()
        self._metrics.engine(message.stats, message.busy_seconds)
        if self._predictor is not None:
            self._predictor.step(message.stats, message.busy_seconds)
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
        for request_id in message.waiting:
            if (waiting := self._running.get(request_id)) is not None:
                waiting.generation.taken_in()
        if message.refused:
            self._end_rest([g for r in message.refused for g in self._on_refused(r.request_ids, r.error.error())])
        if self._survivors.holding:
            self._survivors.release()
        if not self._running:
            self._idle.set()

    def _on_output(self, output: TextOutput, now: float) -> None:
        sequence = self._running[output.request_id]
        if sequence.last_token is None:
            sequence.wire, sequence.first_token = None, now
            self._metrics.begun(sequence.prompt_tokens, output.num_cached_tokens, sequence.ttft)
            if self._predictor is not None:
                self._predictor.begun(output.request_id, output.num_cached_tokens)
        elif output.token_ids:
            self._metrics.itl.observe(now - sequence.last_token)
        sequence.last_token = now
        if output.finish_reason is not None:
            del self._running[output.request_id]
            sequence.finish_reason, sequence.output_tokens = output.finish_reason, output.num_output_tokens
            self._finished.count(now=now)
            self._metrics.goodput.ended(sequence.deadline, sequence.ttft, sequence.mean_itl)
            if self._predictor is not None:
                self._predictor.left(output.request_id)
            if output.times is not None:
                self._record(sequence, output, output.times)
            else:  # a stop string: the engine's times come when it has aborted the request
                self._ended_by_stop[output.request_id] = (sequence, output)
        sequence.generation.push(sequence.index, output)

    def _on_late_times(self, output: TokenOutput) -> None:
        if output.times is not None and output.request_id in self._ended_by_stop:
            sequence, ended = self._ended_by_stop.pop(output.request_id)
            self._record(sequence, ended, output.times)

    def _record(self, sequence: RunningSequence, output: TextOutput, times: RequestTimes) -> None:
        """A sequence was answered; ``output`` is its last."""
        self._metrics.finished(output, sequence.prompt_tokens, sequence.max_tokens, times)
        samples = sequence.samples
        samples.unfinished -= 1
        samples.longest_output = max(samples.longest_output, output.num_output_tokens)
        if not samples.unfinished:
            self._metrics.samples_finished(samples.n, samples.longest_output)

    def _on_refused(self, ids: list[str], error: LlmctlError) -> set[Generation]:
        """Fail the generations of these sequences."""
        found = [self._running[i] for i in ids if i in self._running]
        if error.http_status == OverloadError.http_status:
            error.retry_after = self._finished.seconds_until(len(ids))
        if error.code == DeadlineMissedError.code:
            for sequence in found:
                self._metrics.goodput.shed(sequence.deadline)
        self._count_begun(found)
        self._forget(ids)
        generations = {s.generation for s in found}
        for generation in generations:
            generation.fail(error)
        return generations

    def _end_rest(self, failed: Iterable[Generation]) -> None:
        """Stop what still runs of generations of which a sequence failed."""
        rest = [s for g in dict.fromkeys(failed) for s in g.sequences if s.request_id in self._running]
        self._count_begun(rest)
        if rest:
            ids = [s.request_id for s in rest]
            self._forget(ids)
            self.worker.send(AbortRequests(ids))

    def _count_begun(self, failed: Iterable[RunningSequence]) -> None:
        """Count sequences that fail under way; those that never began are counted as refusals of their request."""
        for sequence in failed:
            if sequence.last_token is not None:
                self._metrics.ended("error")


def _waiting(spec: SequenceSpec, arrival: float, tenant: str) -> Waiting:
    return Waiting(spec.priority, tenant, spec.deadline.due(arrival), len(spec.prompt_token_ids))
