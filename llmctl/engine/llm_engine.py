"""The engine: requests in, tokens out, one step at a time."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from llmctl.engine.adapter_cache import AdapterCache
from llmctl.engine.adapter_slots import AdapterSlots
from llmctl.engine.jump_ahead import jump
from llmctl.engine.occupancy import Occupancy, StateSeconds
from llmctl.engine.request import FINISHED_STATUS, FinishReason, Request, RequestTimes
from llmctl.engine.sampling_batch import SamplingBatcher
from llmctl.engine.sampling_params import derive_seed
from llmctl.engine.scheduled_step import ScheduledStep
from llmctl.engine.scheduler import Scheduler
from llmctl.engine.scheduler_config import SchedulerConfig
from llmctl.engine.step import (
    PendingStep,
    Runtime,
    RuntimeLimits,
    SequenceSlice,
    StepResult,
    TokenLogprobs,
    TokenScores,
)
from llmctl.errors import DeviceMemoryError, LlmctlError, ModelNotFoundError, RequestError
from llmctl.structured.matcher import TokenMatcher

log = logging.getLogger("llmctl.engine")


class TokenOutput(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """What one step did for one request.

    Attributes:
        new_token_ids: tokens sampled (an end-of-sequence or stop token included), and forced by its grammar after that.
        logprobs: one entry per new token; None when not asked for.
        finish_reason: None while it goes on. stop_reason: the stop token id that ended it; None for end-of-sequence.
        num_cached_tokens: prompt tokens that came from the prefix cache.
        prompt_scores: log-probabilities of the prompt's tokens after the first; given once, when the whole prompt is
            computed, if the request asked for them.
        times: the request's, with its end.
        ends_in_text: the last token is text of the output, although it ended it: with it the grammar was complete.
        embedding: f32 [hidden size], of a request with ``pooling``: its only output.
    """

    request_id: str
    new_token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    num_cached_tokens: int = 0
    prompt_scores: TokenScores | None = None
    times: RequestTimes | None = None
    ends_in_text: bool = False
    embedding: NDArray[np.float32] | None = None


class EngineStats(msgspec.Struct, frozen=True, array_like=True):
    """Gauges now, and totals since the start.

    Attributes:
        num_running, num_waiting: requests. kv_cache_usage: share of KV blocks held, 0 to 1.
        num_preemptions: total. prefix_cache_queries, prefix_cache_hits: total prompt tokens looked up and found.
        num_steps, num_generated_tokens: totals of the steps whose results were taken in; last_step_tokens: what the
            last of them computed. num_scheduled_tokens: total, steps in flight included.
        compute_seconds: total wall time that the runtime computed, as far as it says (see ``StepResult``).
        state_seconds: all wall time by what it went into. num_graph_steps, num_eager_steps: steps by how they were run,
            where the runtime says it.
        num_forced_tokens: of the generated ones, those that were not sampled.
    """

    num_running: int
    num_waiting: int
    kv_cache_usage: float
    num_preemptions: int
    prefix_cache_queries: int
    prefix_cache_hits: int
    num_steps: int
    num_scheduled_tokens: int
    num_generated_tokens: int
    last_step_tokens: int
    compute_seconds: float = 0.0
    state_seconds: StateSeconds = StateSeconds()
    num_graph_steps: int = 0
    num_eager_steps: int = 0
    num_forced_tokens: int = 0


class LLMEngine:
    """Runs requests on a runtime with continuous batching.

    Attributes:
        occupancy: where its time goes; whoever drives the engine adds what it waits and sends.
        jumps: whether it jumps ahead (``jump_ahead``). Not on a device that runs ahead: a chunk among its decodes costs
            it more than the steps saved, for all that is known.
        on_first_scheduled: told the ids of requests that are in a step for the first time, before it is executed.
        on_shed: told the requests that ended because they missed their TTFT deadline in the queue.
        on_failed: told the id of a request that cannot go on, and why; it has ended, without an output.

    Args:
        runtime: computes and samples. config: the scheduler's limits.
        eos_token_ids: tokens that end a request unless it says ``ignore_eos``.
        seed: what requests without a seed derive theirs from, each by its number in the order of arrival here.
        clock: seconds, for time stamps.
        adapters: those that requests may run with, for a runtime that holds adapters; None: none.

    Raises:
        ValueError: a runtime with other than 1 or 2 steps in flight.
    """

    def __init__(
        self,
        runtime: Runtime,
        config: SchedulerConfig,
        eos_token_ids: Collection[int] = frozenset(),
        *,
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
        adapters: AdapterCache | None = None,
    ) -> None:
        if runtime.steps_in_flight not in (1, 2):
            raise ValueError(f"steps_in_flight: expected 1 or 2, found {runtime.steps_in_flight}")
        self.runtime = runtime
        self.adapters = adapters
        slots = None if adapters is None else AdapterSlots(adapters.limits.slots, adapters)
        if adapters is not None and slots is not None:
            adapters.claimed, adapters.wanted = lambda: slots.claimed, slots.wanted
        self.scheduler = Scheduler(config, runtime.limits, adapters=slots)
        self.eos_token_ids = frozenset(i for i in eos_token_ids if 0 <= i < runtime.limits.vocab_size)
        self._seed = seed
        self._num_seeded = 0
        self._clock = clock
        self._in_flight: deque[tuple[ScheduledStep, PendingStep]] = deque()
        self._sampling = SamplingBatcher(runtime.limits.vocab_size, self.eos_token_ids)
        self._num_generated = self._num_forced = 0
        self._num_steps = 0
        self._last_step_tokens = 0
        self._compute_seconds = 0.0
        self._executions = {"": 0, "graph": 0, "eager": 0}
        self.occupancy = Occupancy()
        self.jumps = runtime.steps_in_flight == 1
        self.on_first_scheduled: Callable[[list[str]], None] = lambda _: None
        self.on_shed: Callable[[list[Request]], None] = lambda _: None
        self.on_failed: Callable[[str, LlmctlError], None] = _raise

    @property
    def limits(self) -> RuntimeLimits:
        """The runtime's limits."""
        return self.runtime.limits

    def step(self) -> list[TokenOutput]:
        """Schedule, execute, postprocess: one step, and what it produced.

        Raises:
            DeviceMemoryError: no memory for a step of one request.
        """
        if self.scheduler.waiting.next_miss < math.inf:
            self._pass_time()
        while not self._in_flight or self._may_run_ahead():
            step = self.scheduler.schedule()
            if not step.plan.slices:
                break
            try:
                self._in_flight.append((step, self._execute(step)))
            except DeviceMemoryError as error:
                self._withdraw(step, error)
                if self._in_flight:  # what it sampled was to be fed to the step that failed; it is known soon
                    break
        if not self._in_flight:
            return []
        step, pending = self._in_flight.popleft()
        outputs = self._postprocess(step, pending.result())
        if not self.has_unfinished():
            self.scheduler.check_idle()
        return outputs

    def _pass_time(self) -> None:
        if shed := self.scheduler.pass_time(self._clock()):
            self.on_shed(shed)

    def _may_run_ahead(self) -> bool:
        """Whether a step may be started whose requests have tokens in flight."""
        return len(self._in_flight) < self.runtime.steps_in_flight and not self._sampling.follows_output

    def add_request(self, request: Request) -> None:
        """Queue a request.

        Raises:
            RequestError, CapacityError, QueueFullError: as ``Scheduler.add``.
        """
        self.add_requests([request])

    def add_requests(self, requests: Sequence[Request]) -> None:
        """Queue requests, all or none (the samples of one prompt).

        Raises:
            RequestError, CapacityError, QueueFullError: as ``Scheduler.add``. ModelNotFoundError: an adapter that is
                not known.
        """
        for request in requests:
            if request.adapter_id is not None and (self.adapters is None or request.adapter_id not in self.adapters):
                raise ModelNotFoundError("the adapter is not loaded any more", param="model")
        self.scheduler.add(requests, self._clock())
        for request in requests:
            if request.params.seed is not None:
                request.seed = request.params.seed % 2**64
            elif request.pooling is None:  # what is not sampled must not change what others sample
                request.seed = derive_seed(self._seed, self._num_seeded)
                self._num_seeded += 1

    def abort(self, request_ids: Iterable[str]) -> list[TokenOutput]:
        """End requests now and free their blocks; unknown or finished ids are passed over.

        Returns the last output of each one ended, with reason ``abort``.
        """
        found = [self.scheduler.requests[i] for i in dict.fromkeys(request_ids) if i in self.scheduler.requests]
        return [self._finish(request, FinishReason.ABORT) for request in found]

    def has_unfinished(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self.scheduler.requests)

    def awaits_adapters(self) -> bool:
        """Whether a step would do nothing before an adapter has been read."""
        slots, scheduler = self.scheduler.adapters, self.scheduler
        return slots is not None and not scheduler.running and not self._in_flight and slots.reading()

    def fail_adapter(self, adapter_id: str, error: LlmctlError) -> None:
        """End what waits for an adapter that cannot be read any more; those that run with it go on."""
        waiting = [request for request in self.scheduler.waiting if request.adapter_id == adapter_id]
        for request in waiting:
            self._finish(request, FinishReason.ABORT)
            self.on_failed(request.request_id, error)

    def stats(self) -> EngineStats:
        """A snapshot of gauges and totals."""
        scheduler, counters = self.scheduler, self.scheduler.counters
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            kv_cache_usage=scheduler.pool.usage,
            num_preemptions=counters.preemptions,
            prefix_cache_queries=counters.prefix_cache_queries,
            prefix_cache_hits=counters.prefix_cache_hits,
            num_steps=self._num_steps,
            num_scheduled_tokens=counters.scheduled_tokens,
            num_generated_tokens=self._num_generated,
            last_step_tokens=self._last_step_tokens,
            compute_seconds=self._compute_seconds,
            state_seconds=self.occupancy.seconds(),
            num_graph_steps=self._executions["graph"],
            num_eager_steps=self._executions["eager"],
            num_forced_tokens=self._num_forced,
        )

    def settle(self) -> None:
        """With no request left, wait for steps in flight that nobody wants any more."""
        while self._in_flight and not self.has_unfinished():
            self._in_flight.popleft()[1].result()

    def close(self) -> None:
        """Abort everything, wait for the device and free it."""
        self.abort(list(self.scheduler.requests))
        self.settle()
        if self.adapters is not None:
            self.adapters.close()
        self.runtime.close()

    def _withdraw(self, step: ScheduledStep, error: DeviceMemoryError) -> None:
        if not self.scheduler.withdraw(step):
            raise error
        log.warning(
            "%s: %d requests go back to the queue, and at most %d run at once from now on",
            error.message, len(step.requests) - self.scheduler.max_num_seqs, self.scheduler.max_num_seqs,
        )  # fmt: skip

    def _execute(self, step: ScheduledStep) -> PendingStep:
        now = self._clock()
        first = [request for request in step.requests if request.times.first_scheduled is None]
        if first:
            for request in first:
                request.times.first_scheduled = now
            self.on_first_scheduled([request.request_id for request in first])
        if self.scheduler.adapters is not None:
            self._put_adapters(self.scheduler.adapters)
        positions = [request.num_computed_tokens for request in step.sampled]
        return self.runtime.execute(step.plan, self._sampling.batch(step.sampled, positions))

    def _put_adapters(self, slots: AdapterSlots) -> None:
        for slot, adapter_id in slots.take_puts():
            assert self.adapters is not None
            self.adapters.host.put(slot, self.adapters[adapter_id])

    def _postprocess(self, step: ScheduledStep, result: StepResult) -> list[TokenOutput]:
        """Append what was sampled, cache what was computed, end what is done."""
        outputs = []
        self._count(step, result)
        tokens = iter(result.token_ids.tolist())
        logprobs = iter(result.logprobs) if result.logprobs is not None else None
        for piece, request, epoch in zip(step.plan.slices, step.requests, step.epochs, strict=True):
            token = next(tokens) if piece.sample else None
            logprob = next(logprobs) if piece.sample and logprobs is not None else None
            if request.status.finished:  # while the step was in flight
                continue
            if piece.score_targets is not None:
                request.keep_scores(piece.start, result.scores[request.request_id])
            if piece.pool_rows:
                request.keep_pooled(piece.start, result.pooled[request.request_id])
            self.scheduler.computed(request, piece, epoch)
            output = self._advance(request, piece, token, logprob)
            if output is not None:
                outputs.append(output)
        return outputs

    def _count(self, step: ScheduledStep, result: StepResult) -> None:
        self.occupancy.step_done(step.fill, result.compute_seconds)
        if self.scheduler.pacer is not None:
            self.scheduler.pacer.cost.observe(step.load, result.compute_seconds)
        self._num_steps += 1
        self._last_step_tokens = step.num_tokens
        self._compute_seconds += result.compute_seconds
        self._executions[result.execution] += 1

    def _advance(
        self, request: Request, piece: SequenceSlice, token: int | None, logprob: TokenLogprobs | None
    ) -> TokenOutput | None:
        """One computed slice's effect on its request; None short of the last known token."""
        if piece.start + len(piece.token_ids) < len(request.token_ids):
            return None
        scores = None
        if not request.scores_done:
            request.scores_done, scores = True, request.prompt_scores or TokenScores.zeros(0)
        if token is None and request.pooling is not None:
            output = self._finish(request, FinishReason.STOP, prompt_scores=scores)
            return msgspec.structs.replace(output, embedding=request.embedding())
        if token is None:
            return self._finish(request, FinishReason.LENGTH, prompt_scores=scores)
        matcher = request.matcher
        if matcher is not None and matcher.dead_end:
            return self._end_of_grammar(request, matcher, scores)
        request.append(token)
        tokens: tuple[int, ...] = (token,)
        if request.times.first_token is None:
            request.times.first_token = self._clock()
        logprobs = (logprob,) if logprob is not None else None
        reason, stop_id = self._stop_reason(request, token)
        ends_in_text = reason is None and matcher is not None and matcher.accept(token)
        if reason is None and matcher is not None and not ends_in_text and self.jumps:
            forced, ends_in_text = jump(request, matcher, self.eos_token_ids)
            tokens += forced
            self._num_forced += len(forced)
        self._num_generated += len(tokens)
        if ends_in_text:
            reason = FinishReason.STOP
        elif reason is None and len(request.token_ids) >= request.max_length:
            reason = FinishReason.LENGTH
        if reason is not None:
            output = self._finish(request, reason, stop_id, tokens, logprobs, scores)
            return msgspec.structs.replace(output, ends_in_text=True) if ends_in_text else output
        return _output(request, tokens, logprobs, prompt_scores=scores)

    def _stop_reason(self, request: Request, token: int) -> tuple[FinishReason | None, int | None]:
        """``STOP``, and the stop id, when a token ends its output by being what it is."""
        params = request.params
        if len(request.token_ids) - request.num_prompt_tokens > params.min_tokens:
            if token in params.stop_token_ids:
                return FinishReason.STOP, token
            if token in self.eos_token_ids and not params.ignore_eos:
                return FinishReason.STOP, None
        return None, None

    def _end_of_grammar(
        self, request: Request, matcher: TokenMatcher, scores: TokenScores | None
    ) -> TokenOutput | None:
        """No token may come next: a complete output ends without one, any other fails."""
        if matcher.complete:
            return self._finish(request, FinishReason.STOP, prompt_scores=scores)
        param = request.params.grammar.param if request.params.grammar is not None else None
        reason = matcher.problem or "no token is left that neither it nor the request's other fields forbid"
        self._finish(request, FinishReason.ABORT)
        self.on_failed(request.request_id, RequestError(f"{param}: the output cannot go on: {reason}", param=param))
        return None

    def _finish(
        self,
        request: Request,
        reason: FinishReason,
        stop_reason: int | None = None,
        tokens: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprobs, ...] | None = None,
        prompt_scores: TokenScores | None = None,
    ) -> TokenOutput:
        request.times.finished = self._clock()
        request.times.num_preemptions = request.num_preemptions
        self.scheduler.finish(request, FINISHED_STATUS[reason])
        return _output(request, tokens, logprobs, reason, stop_reason, prompt_scores)


def _output(
    request: Request,
    tokens: tuple[int, ...],
    logprobs: tuple[TokenLogprobs, ...] | None,
    reason: FinishReason | None = None,
    stop_reason: int | None = None,
    prompt_scores: TokenScores | None = None,
) -> TokenOutput:
    return TokenOutput(
        request_id=request.request_id,
        new_token_ids=tokens,
        logprobs=logprobs,
        finish_reason=reason,
        stop_reason=stop_reason,
        num_cached_tokens=request.num_cached_tokens,
        prompt_scores=prompt_scores,
        times=request.times if reason is not None else None,
    )


def _raise(request_id: str, error: LlmctlError) -> None:  # noqa: ARG001
    raise error
