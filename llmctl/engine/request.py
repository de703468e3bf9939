"""A request inside the engine: known tokens, how far they are computed, where their keys and values lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum

import numpy as np
from numpy.typing import NDArray

from llmctl.engine.deadline import NO_DEADLINE, Deadline
from llmctl.engine.pooling import Pooling
from llmctl.engine.sampling_params import SamplingParams
from llmctl.engine.step import TokenScores
from llmctl.engine.tenants import Account
from llmctl.structured.matcher import TokenMatcher


class RequestStatus(IntEnum):
    """Where a request is. Every status from FINISHED_STOPPED on is final; the order encodes that."""

    WAITING = 0
    RUNNING = 1
    PREEMPTED = 2
    FINISHED_STOPPED = 3
    FINISHED_LENGTH = 4
    FINISHED_ABORTED = 5

    @property
    def finished(self) -> bool:
        """Whether the request will produce nothing more."""
        return self >= RequestStatus.FINISHED_STOPPED


class FinishReason(StrEnum):
    """Why a request ended, as OpenAI spells it (and ``abort``)."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


FINISHED_STATUS = {
    FinishReason.STOP: RequestStatus.FINISHED_STOPPED,
    FinishReason.LENGTH: RequestStatus.FINISHED_LENGTH,
    FinishReason.ABORT: RequestStatus.FINISHED_ABORTED,
}


@dataclass(slots=True)
class RequestTimes:
    """Moments of a request's life by the engine's clock, seconds; None until they happen.

    ``num_preemptions``: how often it lost its blocks in between; filled at the end.
    """

    arrival: float
    first_scheduled: float | None = None
    first_token: float | None = None
    finished: float | None = None
    num_preemptions: int = 0


@dataclass(slots=True)
class Batch:
    """Requests that were added together. ``scheduled``: whether one of them ever was."""

    scheduled: bool = False


@dataclass(slots=True, eq=False)
class Request:
    """One sequence to generate, or with ``pooling`` to compute alone.

    The caller fills the first group of fields. ``num_computed_tokens`` is the single counter of progress: prefill,
    chunked prefill, prefix hits and recompute after preemption are all "computed lags behind known tokens".

    Attributes:
        request_id: unique among unfinished requests.
        prompt_token_ids: at least one id.
        params: sampling parameters with ``n`` = 1 (see ``fan_out``).
        priority: lower runs earlier, but under the ``fcfs`` policy.
        tenant: whose it is; under the ``fair`` policy tenants take turns.
        arrival_time: seconds by the engine's clock; None = when it is added.
        cache_salt: requests share cached prefixes only with the same salt.
        adapter_id: the LoRA adapter it runs with, by its content; part of the prefix key.
        deadline: what it is promised; under the ``fcfs`` policy nothing can be.
        matcher: where its output is in ``params.grammar``; None when it has none.
        pooling: what its prompt's hidden states become; nothing is generated then (``max_tokens`` is 0).
        token_ids: prompt and output so far.
        num_forced: of the last known tokens, how many its grammar forced after a sampled one (``jump_ahead``).
        num_in_flight: tokens being sampled by steps in flight; they come after ``token_ids``.
        num_computed_tokens: leading tokens whose keys and values are cached or being computed by a step in flight.
        tables: while it runs, its KV blocks, in order, for each group of layers; gone: how many null blocks each begins
            with (``kv_blocks``). block_hashes: hashes of the full blocks of ``token_ids`` known so far.
        max_length: known tokens at which it ends with ``length``.
        seed: what the sampler uses.
        num_cached_tokens: prompt tokens found in the prefix cache when first scheduled.
        adapter_slot: where its adapter is while it runs; -1: it has none.
        account: its tenant's. sort_key: its place in the queue, then among running requests (``waiting_queue``).
        due: its place among its tenant's that never ran: (seconds, arrival, number). hopeful: it has a TTFT deadline,
            and has not missed it before it ran. batch: with whom it was added.
        prompt_scores: of the prompt's tokens after the first, filled as it is computed; None before.
        scores_done: nothing (more) of them is wanted.
        hidden_sum: f32 [hidden size], of the hidden states that count for ``pooling``, as far as they are computed.
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    priority: int = 0
    arrival_time: float | None = None
    cache_salt: str | None = None
    adapter_id: str | None = None
    tenant: str = ""
    deadline: Deadline = NO_DEADLINE
    matcher: TokenMatcher | None = None
    pooling: Pooling | None = None

    status: RequestStatus = field(default=RequestStatus.WAITING, init=False)
    token_ids: list[int] = field(init=False)
    num_prompt_tokens: int = field(init=False)
    num_forced: int = field(default=0, init=False)
    num_in_flight: int = field(default=0, init=False)
    num_computed_tokens: int = field(default=0, init=False)
    tables: tuple[tuple[int, ...], ...] = field(default=(), init=False)
    gone: tuple[int, ...] = field(default=(), init=False)
    block_hashes: list[bytes] = field(default_factory=list, init=False)
    max_length: int = field(default=0, init=False)
    seed: int = field(default=0, init=False)
    num_cached_tokens: int = field(default=0, init=False)
    adapter_slot: int = field(default=-1, init=False)
    num_preemptions: int = field(default=0, init=False)
    prompt_scores: TokenScores | None = field(default=None, init=False)
    scores_done: bool = field(default=True, init=False)
    hidden_sum: NDArray[np.float32] | None = field(default=None, init=False)
    times: RequestTimes = field(init=False)
    account: Account = field(default_factory=Account, init=False)
    sort_key: tuple[int, int, float, int] = field(default=(0, 0, 0.0, 0), init=False)
    due: tuple[float, float, int] = field(default=(0.0, 0.0, 0), init=False)
    hopeful: bool = field(default=False, init=False)
    batch: Batch = field(default_factory=Batch, init=False)

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.times = RequestTimes(arrival=self.arrival_time or 0.0)
        self.scores_done = self.params.prompt_logprobs is None

    @property
    def num_tokens(self) -> int:
        """Known tokens: prompt and output."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        """Tokens generated so far (a copy)."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def computes_all(self) -> bool:
        """Whether something is wanted of every token of its prompt. Cached tokens have keys and values, but neither
        hidden states nor logits: such a request takes none from the prefix cache."""
        return not self.scores_done or self.pooling is Pooling.MEAN

    def append(self, token: int) -> None:
        """Take in a token that was in flight."""
        self.token_ids.append(token)
        self.num_in_flight -= 1

    def keep_scores(self, start: int, scores: TokenScores) -> None:
        """Take in those of the prompt's tokens from ``start + 1`` on."""
        if self.prompt_scores is None:
            self.prompt_scores = TokenScores.zeros(self.num_prompt_tokens - 1, scores.top_ids.shape[1])
        self.prompt_scores.put(start, scores)

    def keep_pooled(self, start: int, pooled: NDArray[np.float32]) -> None:
        """Take in the sum over a slice that begins at ``start``.

        Results come in the order of their steps, and where every token counts (``Pooling.MEAN``) each beginning is at
        0: what a preempted request had is left behind there.
        """
        self.hidden_sum = pooled if self.hidden_sum is None or not start else self.hidden_sum + pooled

    def embedding(self) -> NDArray[np.float32]:
        """f32 [hidden size], once the prompt is computed."""
        assert self.pooling is not None
        assert self.hidden_sum is not None
        return self.hidden_sum / np.float32(self.pooling.rows(self.num_prompt_tokens, ends=True))

    def last_output_tokens(self, count: int) -> list[int]:
        """The last ``count`` generated tokens; fewer when there are fewer."""
        return self.token_ids[max(self.num_prompt_tokens, len(self.token_ids) - count) :]


def fan_out(request: Request) -> list[Request]:
    """The ``n`` single-sample requests of a request, named ``<id>`` or ``<id>#<index>``.

    They share the prompt's blocks through the prefix cache.
    """
    if request.params.n == 1:
        return [request]
    return [
        Request(
            request_id=f"{request.request_id}#{index}",
            prompt_token_ids=request.prompt_token_ids,
            params=params,
            priority=request.priority,
            arrival_time=request.arrival_time,
            cache_salt=request.cache_salt,
            adapter_id=request.adapter_id,
            tenant=request.tenant,
            deadline=request.deadline,
            pooling=request.pooling,
        )
        for index, params in enumerate(request.params.samples())
    ]
