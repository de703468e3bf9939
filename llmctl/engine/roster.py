"""The requests that an engine has: who waits, who runs, and what becomes of queue, blocks and adapters' slots when one
comes, enters, is sent back or ends. When one is to, the ``Scheduler`` decides.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmctl.engine.adapter_slots import AdapterSlots
from llmctl.engine.admission import check_request
from llmctl.engine.kv_blocks import KVBlocks, Prefix
from llmctl.engine.request import Batch, Request, RequestStatus
from llmctl.engine.scheduler_config import SchedulerConfig
from llmctl.engine.step import RuntimeLimits
from llmctl.engine.waiting_queue import WaitingQueue
from llmctl.errors import QueueFullError, RequestError


@dataclass(slots=True)
class SchedulerCounters:
    """Totals since the start: preemptions, tokens looked up in the prefix cache and found there, tokens scheduled."""

    preemptions: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    scheduled_tokens: int = 0


class Roster:
    """The requests, from when they are added until they end; each waits or runs.

    Attributes:
        requests: all, by id. waiting: in the order of the policy. running: in that of admission. adapters: which of
            them have a slot; None: none is served.
    """

    def __init__(
        self, config: SchedulerConfig, limits: RuntimeLimits, *, cache_key: bytes | None, adapters: AdapterSlots | None
    ) -> None:
        self.config = config
        self.adapters = adapters
        self.limits = limits
        self.blocks = KVBlocks(
            limits,
            step_tokens=config.max_num_batched_tokens,
            enable_caching=config.enable_prefix_caching,
            key=cache_key,
        )
        self.pool = self.blocks.pool
        self._num_itl = 0  # requests with an ITL deadline
        self.max_length = self.blocks.longest
        self.counters = SchedulerCounters()
        self.requests: dict[str, Request] = {}
        self.waiting = WaitingQueue(config.policy, short=config.max_num_batched_tokens)
        self.running: list[Request] = []  # in sort_key order

    def add(self, requests: Sequence[Request], now: float) -> None:
        """Queue requests, all or none. ``now``: arrival time of those that bring none, seconds.

        Raises:
            RequestError: an id in use, or as ``check_request``. CapacityError: a request that can never fit.
            QueueFullError: too many are waiting.
        """
        ids = {r.request_id for r in requests}
        if len(ids) < len(requests) or not self.requests.keys().isdisjoint(ids):  # in this order it walks the few
            raise RequestError("request_id: already in use", param="request_id")
        config = self.config
        uncut = None if config.enable_chunked_prefill else config.max_num_batched_tokens
        for request in requests:
            check_request(request, self.limits, max_length=self.max_length, max_uncut=uncut, policy=config.policy)
        limit = config.max_num_queued_reqs
        if len(self.waiting) + len(requests) > limit:
            raise QueueFullError(
                f"{len(self.waiting)} requests are waiting and at most {limit} may", fix="try again later"
            )
        batch = Batch()
        for request in requests:
            request.batch = batch
            self._enqueue(request, now)

    def _enqueue(self, request: Request, now: float) -> None:
        arrival = now if request.arrival_time is None else request.arrival_time
        request.times.arrival = request.arrival_time = arrival
        wanted = request.params.max_tokens
        request.max_length = self.max_length if wanted is None else request.num_prompt_tokens + wanted
        self.requests[request.request_id] = request
        if request.deadline.itl is not None:
            self._num_itl += 1
        self.waiting.add(request, arrival)
        if self.adapters is not None:
            self.adapters.added(request)

    def _admit(self, request: Request, cached: Prefix) -> None:
        self.waiting.pop(request)
        self.blocks.start(request, cached)
        request.num_computed_tokens = cached.num_blocks * self.pool.block_size
        if request.status is RequestStatus.WAITING and not request.computes_all and self.pool.enable_caching:
            self.counters.prefix_cache_queries += request.num_tokens
            self.counters.prefix_cache_hits += request.num_computed_tokens
            request.num_cached_tokens = request.num_computed_tokens
        if request.status is RequestStatus.WAITING:  # what is computed again is nobody's fault
            request.account.charge_prompt(request.num_prompt_tokens - request.num_computed_tokens)
        if self.adapters is not None:
            self.adapters.admitted(request)
        request.status, request.batch.scheduled = RequestStatus.RUNNING, True
        insort(self.running, request, key=_key)

    def _preempt(self, request: Request) -> None:
        self.blocks.release(request)
        self.running.pop()
        if self.adapters is not None:
            self.adapters.left(request)
            self.adapters.added(request)
        request.status = RequestStatus.PREEMPTED
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self.counters.preemptions += 1
        self.waiting.put_back(request)

    def finish(self, request: Request, status: RequestStatus) -> None:
        """End a request and free its blocks."""
        if request.status is RequestStatus.RUNNING:
            del self.running[bisect_left(self.running, request.sort_key, key=_key)]
        else:
            self.waiting.remove(request)
        self.waiting.ended(request)
        self._num_itl -= request.deadline.itl is not None
        self.blocks.release(request)
        if self.adapters is not None:
            self.adapters.left(request)
        request.status = status
        del self.requests[request.request_id]

    def pass_time(self, now: float) -> list[Request]:
        """Take note of TTFT deadlines that have passed. With ``shed``, ends the requests that missed theirs, unless one
        of their batch was scheduled: its client has seen a beginning. These."""
        missed = self.waiting.pass_time(now)
        if not self.config.shed:
            return []
        shed = [request for request in missed if not request.batch.scheduled]
        for request in shed:
            self.finish(request, RequestStatus.FINISHED_ABORTED)
        return shed

    def check(self) -> None:
        """The whole of the bookkeeping is consistent; O(blocks).

        Raises:
            RuntimeError: it is not.
        """
        if len(self.running) + len(self.waiting) != len(self.requests):
            raise RuntimeError("scheduler: a request is neither waiting nor running, or both")
        self.blocks.check(self.running)
        if any(r.tables for r in self.waiting):
            raise RuntimeError("scheduler: a waiting request holds blocks")
        if self.adapters is not None:
            self.adapters.check()
        if self._num_itl != sum(r.deadline.itl is not None for r in self.requests.values()):
            raise RuntimeError("scheduler: ITL deadlines are miscounted")

    def check_idle(self) -> None:
        """Cheap form of ``check`` for when no request is left: every block is free.

        Raises:
            RuntimeError: blocks have leaked.
        """
        if self.pool.num_free != self.pool.num_blocks:
            raise RuntimeError(f"scheduler: idle, yet {self.pool.num_blocks - self.pool.num_free} blocks are held")


def _key(request: Request) -> Any:
    return request.sort_key
