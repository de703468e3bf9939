"""What to compute next: continuous batching under a token budget, over paged KV blocks.

One rule covers prefill, chunked prefill, prefix hits, decode, jump-ahead, recompute after preemption: a request whose
computed tokens lag behind its known tokens wants the difference computed. Running requests are served first, in the
order in which they were admitted; then waiting ones are admitted while budget, seats and blocks last, in the order of
the policy (``waiting_queue``). When a running request needs a block and none is free, the last running request in order
loses its blocks and waits to be recomputed.

When the queue's next request is more important (its priority value is lower) than the last running ones, and lacks a
seat, blocks, or leave by an ITL deadline, as few of those as suffice make room (``preemption``): before anything is
scheduled in the step, and only if it then enters in that step. They wait behind it.

Beside decodes, prompts get no more than a ``PrefillAllowance``: what keeps the next tokens of running requests coming,
within their ITL deadlines (``step_cost``). Once a prompt is cut by it, the step takes no more of any, and admits
nobody. Nor is anybody admitted, while others run, who would make the decodes alone exceed an ITL deadline
(``itl_guard``).

So that not everybody waits for a long prompt, some of the steps are turns of shorter ones (``prompt_turns``): those
that run or enter go first in it, the shortest first, and the long one has what they leave. Who enters in a turn takes
no block that a running request needs for its known tokens. It may pass waiting prompts that do not fit a step, if it
leaves the next of them the blocks it would find once the long one is done.

Why nothing starves within a priority: the first request in order is never preempted by an equal and fits the pool alone
(checked when it is added), so it advances in every step but turns (an allowance gives the first prompt in order some
tokens, whatever they cost), and what turns may cost is bounded; whoever is admitted comes after those that run, or lets
them pass for good (by priority or an earlier arrival); the queue's next request stays next until it enters, or is
passed as its policy allows; nobody enters before it but in turns, which end with the long prompt, so one that an ITL
deadline keeps out enters when those that run have ended, at the latest.

A request that runs with a LoRA adapter enters only when that has a slot on the device; while the next one waits for a
slot, others may pass it (``adapter_slots``).

Steps in flight: ``schedule`` advances ``num_computed_tokens`` at once, counts what the step samples as in flight, and
the engine appends it later. So one step may be scheduled before the last one is done. In it, a request whose newest
token is still being sampled computes just that one, ``IN_FLIGHT`` in the plan, unless the request ends with it by its
length. Lengths, positions and blocks count the token in flight; hashes cover known tokens only. Freed blocks may be
handed out while a step that uses them is in flight, because runtimes execute steps in order. A request preempted in
flight still gets the token being sampled; a recompute scheduled meanwhile covers the known tokens and samples nothing.
One that ends in flight (a stop, an abort) leaves a token behind that nobody takes in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

from llmctl.engine.adapter_slots import AdapterSlots
from llmctl.engine.itl_guard import DecodeOutlook, admitting_prefixes
from llmctl.engine.kv_blocks import Prefix
from llmctl.engine.occupancy import Fill
from llmctl.engine.preemption import Entry, num_staying
from llmctl.engine.prompt_turns import PromptTurns, goes_on, is_shorter, may_enter, tokens_left
from llmctl.engine.request import Request
from llmctl.engine.roster import Roster
from llmctl.engine.scheduled_step import ScheduledStep, StepUnderWay
from llmctl.engine.scheduler_config import SchedulerConfig
from llmctl.engine.step import IN_FLIGHT, RuntimeLimits, SequenceSlice, StepPlan
from llmctl.engine.step_cost import PrefillAllowance, PrefillPacer, StepLoad


class Scheduler(Roster):
    """Decides each step. Plain data in and out; see the module's text for the rules.

    Attributes:
        max_num_seqs: requests running at once: the configuration's, or fewer once a device ran out of memory.
        pacer: sizes prompts' chunks beside decodes, and knows what steps cost; None while nobody has asked for either.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        limits: RuntimeLimits,
        *,
        cache_key: bytes | None = None,
        adapters: AdapterSlots | None = None,
    ) -> None:
        super().__init__(config, limits, cache_key=cache_key, adapters=adapters)
        self.max_num_seqs = config.max_num_seqs
        paced = config.enable_chunked_prefill and config.itl_target != 0
        self.pacer = PrefillPacer(config.itl_target) if paced else None
        self._turns = PromptTurns(self.pacer.cost, config.max_num_batched_tokens) if self.pacer else None
        self._ranked = False  # whether there ever was a priority

    def _enqueue(self, request: Request, now: float) -> None:
        super()._enqueue(request, now)
        if request.deadline.itl is not None:
            self.pacer = self.pacer or PrefillPacer(self.config.itl_target)
        self._ranked |= request.sort_key[0] != 0

    # -- scheduling -------------------------------------------------------------------------------------------

    def schedule(self) -> ScheduledStep:
        """The next step; its plan is empty when nothing can be computed before the step in flight is done."""
        self.blocks.let_go(self.running)
        if self._ranked:
            self._make_way()
        budget = self.config.max_num_batched_tokens
        step = StepUnderWay(budget, self._allowance(budget))
        preemptions = self.counters.preemptions
        self._schedule_running(step)
        if step.put_off:
            self._schedule_turn(step)
        elif self.waiting and len(self.running) < self.max_num_seqs and step.open:
            self._schedule_waiting(step)
        num_tokens = budget - step.budget
        self.counters.scheduled_tokens += num_tokens
        load = step.load()
        if self._turns is not None and step.first is not None:
            pays = bool(step.put_off) or not step.behind_decodes
            self._turns.charge(step.first, step.load_of(step.first), load, pays=pays)
        return ScheduledStep(
            StepPlan(tuple(step.slices)),
            tuple(step.requests),
            tuple([r.num_preemptions for r in step.requests]),
            tuple(step.sampled),
            num_tokens,
            "kv_full" if self.counters.preemptions > preemptions else self._fill(step),
            load,
        )

    def _allowance(self, budget: int) -> PrefillAllowance | None:
        if self.pacer is None or not self.config.enable_chunked_prefill:
            return None
        limit = math.inf
        if self._num_itl:
            decoding = (r for r in self.running if r.num_computed_tokens >= r.num_prompt_tokens)
            limit = DecodeOutlook(self.pacer.cost, decoding).tightest
        decodes, joining = self._decodes()
        return self.pacer.allowance(decodes, budget, joining, limit)

    def _decodes(self) -> tuple[StepLoad, int]:
        """The decode rows of the next step, if it has room for all; and how many waiting prompts will be rows soon:
        those that find a seat and fit a step."""
        rows = context = 0
        for request in self.running:
            known = len(request.token_ids)
            behind = known - request.num_computed_tokens
            if 0 < behind <= 1 + request.num_forced or (not behind and known + 1 < request.max_length):
                rows += 1
                context += request.num_computed_tokens + 1
        seats = max(self.max_num_seqs - len(self.running), 0)
        return StepLoad(rows, context), min(seats, self.waiting.num_short)

    def _fill(self, step: StepUnderWay) -> Fill:
        """What bounded a step that preempted nobody."""
        seats = self.max_num_seqs
        if not step.budget:
            return "token_budget" if self.waiting or self._cut_short(step) else "busy"
        if not step.open:
            return "itl_target"
        if self.waiting:
            return "max_num_seqs" if len(self.running) >= seats else step.kept_out_by
        return "busy" if len(step.requests) >= seats else "few_requests"

    def _cut_short(self, step: StepUnderWay) -> bool:
        """Whether a running request could have computed more, had there been more budget."""
        last = step.requests[-1]
        return last.num_computed_tokens < last.num_tokens or len(step.requests) < len(self.running)

    def _schedule_running(self, step: StepUnderWay) -> None:
        index = 0
        while index < len(self.running) and step.budget:  # preemption shortens the list from its end
            request = self.running[index]
            index += 1
            count = len(request.token_ids) - request.num_computed_tokens
            if count > 1:
                if self._turns is not None and count > 1 + request.num_forced and self._put_off(step, request, index):
                    continue
                count = step.chunk(request, count, len(self.running) - index)
                if not count:
                    continue  # decodes may follow
            elif not count:
                if len(request.token_ids) + 1 >= request.max_length:
                    continue  # what is in flight ends it
                count = 1  # the token in flight
            if not self._grow(request, request.num_computed_tokens + count):
                break  # it preempted itself
            self._take(step, request, count)

    def _grow(self, request: Request, num_tokens: int) -> bool:
        """Give a running request blocks for ``num_tokens`` tokens, preempting from the end; False if it fell itself."""
        missing = self.blocks.missing(request, num_tokens)
        if not missing:
            return True
        while missing > self.pool.num_free:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is request:
                return False
        self.blocks.grow(request, num_tokens)
        return True

    def _put_off(self, step: StepUnderWay, request: Request, behind: int) -> bool:
        """Leave a prompt for after the decodes, if the step is a turn; False: it is none. ``behind``: the place in
        order of the request after it."""
        if step.first is None:
            step.first, step.behind_decodes = request, behind > 1
            if not self._begin_turn(step, request, behind):
                return False
        elif not step.put_off:
            return False
        step.put_off.append(request)
        return True

    def _begin_turn(self, step: StepUnderWay, first: Request, behind: int) -> bool:
        """Whether the step is a turn. If none is due, waiting prompts do not enter beside a long one, nor enlarge its
        chunks."""
        assert self._turns is not None
        if self._turns.due(first):
            others = self.running[behind:]
            return any(goes_on(r, first) for r in others) or self._shorter_entry(step, first) is not None
        if step.allowance is not None and tokens_left(first) > self.config.max_num_batched_tokens:
            step.allowance.joining = 0
        return False

    def _schedule_turn(self, step: StepUnderWay) -> None:
        first, *others = step.put_off  # all still run: who needs a block preempts nobody before it in order
        prompts = sorted((r for r in others if goes_on(r, first)), key=tokens_left, reverse=True)
        while step.open:
            entry = self._shorter_entry(step, first)
            if prompts and (entry is None or tokens_left(prompts[-1]) <= entry.remaining):
                self._proceed(step, prompts.pop())
            elif entry is None:
                self._proceed(step, first)
                return
            elif count := step.prefill(entry.request, entry.remaining, entry.start):
                self._enter(step, entry, count)

    def _proceed(self, step: StepUnderWay, request: Request) -> None:
        """Compute more of a running prompt, as far as free blocks hold it: whom it would preempt may be in the step."""
        start = request.num_computed_tokens
        room = self.blocks.room(request) - start
        count = step.prefill(request, min(tokens_left(request), room), start)
        if count:
            self._grow(request, start + count)
            self._take(step, request, count)

    def _shorter_entry(self, step: StepUnderWay, first: Request) -> Entry | None:
        """The waiting request that enters in a turn, if any can."""
        if not self.waiting or len(self.running) >= self.max_num_seqs:
            return None
        passed = None
        has_slot = self._having_slots()
        request = self._next(has_slot)
        if request is None:
            return None
        entry = self._entry(request)
        if entry.remaining > self.config.max_num_batched_tokens and not is_shorter(entry.remaining, first):
            request = self.waiting.first_short(has_slot)
            if request is None:
                return None
            passed, entry = entry, self._entry(request)
        if not may_enter(entry, first, self.running, self.blocks, passed=passed):
            return None
        return entry if not self._num_itl or self._within_itl(step, entry.request) else None

    def _next(self, has_slot: Callable[[Request], bool]) -> Request | None:
        """The waiting request that is next of those whose adapters have a slot; there must be one that waits."""
        request = self.waiting.peek()
        return request if has_slot(request) else self.waiting.first_where(has_slot)

    def _having_slots(self) -> Callable[[Request], bool]:
        """Whether a waiting request's adapter has a slot, or one is to be had, asked once for each adapter: until
        somebody enters. There must be a request that waits."""
        adapters = self.adapters
        if adapters is None:
            return lambda _: True
        leaving = () if adapters.admits(self.waiting.peek().adapter_id) else adapters.leaving()
        admits = cache(lambda adapter_id: adapters.admits(adapter_id, leaving))
        return lambda request: admits(request.adapter_id)

    def _schedule_waiting(self, step: StepUnderWay) -> None:
        # Budget is left and no prompt was cut, so every running request holds the blocks of all tokens that it can
        # compute, and free blocks are nobody's. A request enters when all of it fits, not only its first chunk: the
        # rest would only preempt. So whoever was preempted in this step does not come straight back either: its blocks
        # are gone to another.
        while self.waiting and step.open and len(self.running) < self.max_num_seqs:
            request = self._next(self._having_slots())
            if request is None:
                step.kept_out_by = "max_loras"
                return
            entry = self._entry(request)
            if step.budget < entry.least_tokens:
                step.kept_out_by = "token_budget"
                return
            if not entry.has_blocks(self.blocks):
                step.kept_out_by = "kv_full"
                return
            if self._num_itl and not self._within_itl(step, entry.request):
                step.kept_out_by = "deadline"
                return
            count = step.prefill(entry.request, entry.remaining, entry.start)
            if not count:
                return
            self._enter(step, entry, count)

    def _enter(self, step: StepUnderWay, entry: Entry, count: int) -> None:
        """Admit a waiting request and compute its first tokens."""
        self._admit(entry.request, entry.cached)
        if step.outlook is not None:
            step.outlook.add(entry.request)
        self._grow(entry.request, entry.start + count)
        self._take(step, entry.request, count)

    def _entry(self, request: Request) -> Entry:
        """What a waiting request takes."""
        cached = self._cached_prefix(request)
        start = cached.num_blocks * self.pool.block_size
        remaining = request.num_tokens - start
        needed = self.blocks.missing_after(cached, request.num_tokens + request.num_in_flight)
        least_tokens = 1 if self._may_cut(remaining) else remaining
        return Entry(request, cached, start, remaining, needed, least_tokens)

    def _within_itl(self, step: StepUnderWay, request: Request) -> bool:
        assert self.pacer is not None, "whoever has an ITL deadline makes it"
        if step.outlook is None:
            step.outlook = DecodeOutlook(self.pacer.cost, self.running)
        return step.outlook.admits(request)

    def _make_way(self) -> None:
        """Send back as many running requests as a more important one that waits needs to enter this step."""
        if not self.waiting or not self.running or self.waiting.least_priority >= self.running[-1].sort_key[0]:
            return
        if self.adapters is not None and not self.adapters.admits(self.waiting.peek().adapter_id):
            return  # a seat is not what it lacks
        entry = self._entry(self.waiting.peek())
        admits = None
        if self._num_itl:
            assert self.pacer is not None
            admits = admitting_prefixes(self.pacer.cost, self.running, entry.request)
        budget = self.config.max_num_batched_tokens
        staying = num_staying(entry, self.running, self.blocks, seats=self.max_num_seqs, budget=budget, admits=admits)
        while len(self.running) > staying:
            self._preempt(self.running[-1])

    def _may_cut(self, remaining: int) -> bool:
        return self.config.enable_chunked_prefill or remaining > self.config.max_num_batched_tokens

    def _cached_prefix(self, request: Request) -> Prefix:
        """What is cached of this request, short of its last token: one at least must be computed."""
        if not self.pool.enable_caching or request.computes_all:
            return self.blocks.nothing
        self._extend_hashes(request)
        return self.blocks.match(request.block_hashes[: (request.num_tokens - 1) // self.pool.block_size])

    def _take(self, step: StepUnderWay, request: Request, count: int) -> None:
        """Add a request's next ``count`` tokens to the step."""
        start = request.num_computed_tokens
        end = start + count
        targets, top = None, 0
        if not request.scores_done and start < request.num_prompt_tokens - 1:
            targets = request.token_ids[start + 1 : min(end + 1, request.num_prompt_tokens)]
            top = request.params.prompt_logprobs or 0
        known = len(request.token_ids)
        tokens = request.token_ids[start:end] if start < known else (IN_FLIGHT,)
        sample = end == known + request.num_in_flight and end < request.max_length
        pooled = 0 if request.pooling is None else request.pooling.rows(count, ends=end == request.num_prompt_tokens)
        (blocks, *more), slot = request.tables, request.adapter_slot
        piece = SequenceSlice(
            request.request_id, tokens, start, blocks, sample, targets, top, pooled, slot, tuple(more)
        )
        step.add(request, piece)
        request.num_computed_tokens = end

    # -- after a step -----------------------------------------------------------------------------------------

    def computed(self, request: Request, piece: SequenceSlice, epoch: int) -> None:
        """A slice is computed: count what it sampled, make the blocks that it filled findable."""
        if piece.sample:
            request.account.charge_output()
        size = self.pool.block_size
        filled = range(piece.start // size, (piece.start + len(piece.token_ids)) // size)
        if not filled or not self.pool.enable_caching or epoch != request.num_preemptions:
            return
        self._extend_hashes(request)
        self.blocks.cache(request, filled)

    def withdraw(self, step: ScheduledStep) -> bool:
        """Take back a step that was not executed for want of memory: half of its requests run on, the later half waits.

        False when there is only one, which no smaller step can serve.
        """
        for piece, request in zip(step.plan.slices, step.requests, strict=True):
            request.num_computed_tokens = piece.start
            request.num_in_flight -= piece.sample
        self.counters.scheduled_tokens -= step.num_tokens
        if len(step.requests) == 1:
            return False
        self.max_num_seqs = len(step.requests) // 2
        while len(self.running) > self.max_num_seqs:
            self._preempt(self.running[-1])
        return True

    def _extend_hashes(self, request: Request) -> None:
        self.pool.extend_hashes(request.block_hashes, request.token_ids, request.adapter_id, request.cache_salt)
