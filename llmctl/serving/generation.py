"""The API process's view of one HTTP request in the engine: its sequences, and output that nobody has taken yet."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from llmctl.engine.deadline import NO_DEADLINE, Deadline
from llmctl.engine.output import TextOutput, merge_outputs
from llmctl.engine.pooling import Pooling
from llmctl.engine.request import FinishReason
from llmctl.engine.sampling_params import SamplingParams
from llmctl.serving.adapters import ServedAdapter
from llmctl.serving.wire import WireRequest


@dataclass(frozen=True, slots=True)
class SequenceSpec:
    """One sequence to generate, or with ``pooling`` to embed: prompt, parameters with ``n`` = 1, scheduling facts.

    ``samples``: it is one of so many of its prompt, which follow each other. ``adapter``: what it runs with.
    """

    prompt_token_ids: list[int]
    params: SamplingParams
    priority: int = 0
    cache_salt: str | None = None
    samples: int = 1
    deadline: Deadline = NO_DEADLINE
    pooling: Pooling | None = None
    adapter: ServedAdapter | None = None


@dataclass(slots=True, eq=False)
class Samples:
    """The ``n`` samples of one prompt: how many are not finished, and the tokens of the longest that is."""

    n: int
    unfinished: int
    longest_output: int = 0


@dataclass(slots=True, eq=False)
class RunningSequence:
    """One sequence in the engine.

    Attributes:
        samples: shared with the other samples of its prompt. max_tokens: what it may generate; None: up to the context.
        wire: what the worker is sent of it; None once it has a token, for then it is not sent again.
        scheduled_at, first_token, last_token: when it was first in a step, and when its first and newest token came,
            seconds on ``time.monotonic``.
        finish_reason, output_tokens: once it is finished.
        sent, scheduled: whether the present worker has it, and has had it in a step.
        adapter: what it runs with.
    """

    request_id: str
    generation: Generation
    index: int
    prompt_tokens: int
    samples: Samples
    max_tokens: int | None
    wire: WireRequest | None
    deadline: Deadline = NO_DEADLINE
    first_token: float | None = None
    last_token: float | None = None
    sent: bool = False
    scheduled: bool = False
    scheduled_at: float | None = None
    finish_reason: FinishReason | None = None
    output_tokens: int = 0
    adapter: ServedAdapter | None = None

    @property
    def in_hand(self) -> bool:
        """Whether the present worker has done something with it that could be its end: a step, or its grammar."""
        return self.scheduled or (self.sent and self.wire is not None and self.wire.params.grammar is not None)

    @property
    def ttft(self) -> float:
        """Seconds from its arrival to its first token; infinity: it has none."""
        return math.inf if self.first_token is None else self.first_token - self.generation.arrival

    @property
    def mean_itl(self) -> float:
        """Seconds between its tokens after the first, once it is finished (``bench serve`` calls it TPOT); 0 for fewer
        than two."""
        if self.first_token is None or self.last_token is None or self.output_tokens < 2:
            return 0.0
        return (self.last_token - self.first_token) / (self.output_tokens - 1)


class Generation:
    """Output of the sequences of one HTTP request, merged per sequence while nobody takes it.

    Iterate it for a stream of ``[(index, output), …]``; or await ``result`` for everything at once, which wakes up
    only when all sequences are done. ``started`` waits for the first output, ``accepted`` for that or the engine's word
    that it will not refuse the request, so that a refusal can still become an HTTP status.

    Attributes:
        tenant: whose it is, see ``tenants``.
        request_id: of the HTTP request, which may be its client's; for who watches.
        deaths: workers in a row that died while one of these sequences was in a step.

    Args:
        cancel: tells the engine to drop these sequences; called at most once, by ``abort``.
    """

    def __init__(self, count: int, cancel: Callable[[Generation], None], tenant: str = "") -> None:
        self.arrival = time.monotonic()
        self.tenant = tenant
        self.request_id = ""
        self.sequences: list[RunningSequence] = []
        self.deaths = 0
        self._cancel = cancel
        self._pending: dict[int, list[TextOutput]] = {}
        self._unfinished = count
        self._error: Exception | None = None
        self._aborted = False
        self._waiter: asyncio.Future[None] | None = None
        self._waits_for_all = False
        self._taken_in = False

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        return self._unfinished == 0 or self._error is not None or self._aborted

    @property
    def error(self) -> Exception | None:
        """What it ended with, if that is an error."""
        return self._error

    @property
    def aborted(self) -> bool:
        """Whether it was dropped before it was done."""
        return self._aborted

    @property
    def begun(self) -> bool:
        """Whether a sequence has a token."""
        return any(sequence.last_token is not None for sequence in self.sequences)

    @property
    def all_begun(self) -> bool:
        """Whether every sequence has a token."""
        return all(sequence.last_token is not None for sequence in self.sequences)

    def push(self, index: int, output: TextOutput) -> None:
        """Take in output of one sequence."""
        self._pending.setdefault(index, []).append(output)
        if output.finish_reason is not None:
            self._unfinished -= 1
        if not self._waits_for_all or self._unfinished == 0:
            self._wake()

    def taken_in(self) -> None:
        """The engine will not refuse it any more; its first output takes a while."""
        self._taken_in = True
        self._wake()

    def fail(self, error: Exception) -> None:
        """End with an error; the consumer raises it."""
        if self._error is None and not self.done:
            self._error = error
        self._wake()

    def abort(self) -> None:
        """Drop what is not finished (client gone); safe to call at any time."""
        if self._aborted or self.done:
            return
        self._aborted = True
        self._cancel(self)
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _wait(self, *, for_all: bool, or_taken_in: bool = False) -> None:
        """Until there is output that nobody has taken (``for_all``: until nothing more will come; ``or_taken_in``: or
        the engine has taken it in).

        Raises:
            LlmctlError: the engine refused the request or died, and all output before that is taken.
        """
        self._waits_for_all = for_all
        while not (self.done or (self._pending and not for_all) or (or_taken_in and self._taken_in)):
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self._error is not None and (for_all or not self._pending):
            raise self._error

    async def started(self) -> None:
        """Wait for the first output of any sequence.

        Raises:
            LlmctlError: the engine refused the request or died.
        """
        await self._wait(for_all=False)

    async def accepted(self) -> bool:
        """Wait for the first output of any sequence, or until the engine has taken the request in: whether there is
        output.

        Raises:
            LlmctlError: the engine refused the request or died.
        """
        await self._wait(for_all=False, or_taken_in=True)
        return bool(self._pending) or self.done

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> list[tuple[int, TextOutput]]:
        await self._wait(for_all=False)
        pending, self._pending = self._pending, {}
        if not pending:
            raise StopAsyncIteration
        return [(index, _merged(parts)) for index, parts in sorted(pending.items())]

    async def result(self) -> list[TextOutput]:
        """Everything, one output per sequence, once all are done (fewer after ``abort``).

        Raises:
            LlmctlError: the engine refused the request or died.
        """
        await self._wait(for_all=True)
        return [_merged(parts) for _, parts in sorted(self._pending.items())]


def _merged(parts: list[TextOutput]) -> TextOutput:
    return parts[0] if len(parts) == 1 else merge_outputs(parts)
