"""A step as the scheduler puts it together, and what is remembered of it until it is done."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from llmctl.engine.itl_guard import DecodeOutlook
from llmctl.engine.occupancy import Fill
from llmctl.engine.request import Request
from llmctl.engine.step import SequenceSlice, StepPlan
from llmctl.engine.step_cost import PrefillAllowance, StepLoad, chunk_context


class ScheduledStep(msgspec.Struct, frozen=True):
    """A step and what must be remembered about it until it is done.

    Attributes:
        plan: what the runtime computes.
        requests: the requests of ``plan.slices``, in order. epochs: their ``num_preemptions`` when scheduled; a slice
            of an older epoch wrote to blocks that its request no longer holds.
        sampled: those that get a token from this step, in SamplingBatch row order.
        num_tokens: tokens computed. fill: what bounded them. load: what they cost depends on.
    """

    plan: StepPlan
    requests: tuple[Request, ...]
    epochs: tuple[int, ...]
    sampled: tuple[Request, ...]
    num_tokens: int
    fill: Fill
    load: StepLoad


class StepUnderWay:
    """A step being put together.

    Attributes:
        budget: tokens left. allowance: what prompts may take of it; None: all. kept_out_by: what the first waiting
            request lacks. outlook: that of all running requests, once a waiting one was held against it.
        first: the first prompt in order, where prompts take turns. behind_decodes: others come before it in order.
        put_off: in a turn of shorter prompts, those that run, in order.
    """

    def __init__(self, budget: int, allowance: PrefillAllowance | None) -> None:
        self.budget = budget
        self.allowance = allowance
        self.slices: list[SequenceSlice] = []
        self.requests: list[Request] = []
        self.sampled: list[Request] = []
        self.kept_out_by: Fill = "kv_full"
        self.outlook: DecodeOutlook | None = None
        self.first: Request | None = None
        self.behind_decodes = False
        self.put_off: list[Request] = []

    @property
    def open(self) -> bool:
        """Whether it takes more of prompts."""
        return self.budget > 0 and (self.allowance is None or not self.allowance.cut)

    def prefill(self, request: Request, wanted: int, start: int) -> int:
        """How many of a request's ``wanted`` next tokens, from position ``start`` on, it takes."""
        count = min(wanted, self.budget)
        if self.allowance is None:
            return count
        end = start + count
        ends = end == len(request.token_ids) and end < request.max_length and request.pooling is None
        return self.allowance.take(count, start, ends=ends, scored=not request.scores_done)

    def chunk(self, request: Request, wanted: int, behind: int) -> int:
        """How many of a running request's ``wanted`` next tokens, more than one, it takes; ``behind``: requests after.

        What a grammar forced are no prompt's tokens: they come beside the sampled one that each of the others gets.
        """
        if wanted > 1 + request.num_forced:
            return self.prefill(request, wanted, request.num_computed_tokens)
        return min(wanted, max(1, self.budget - behind))

    def add(self, request: Request, piece: SequenceSlice) -> None:
        """A request's next slice."""
        self.slices.append(piece)
        self.requests.append(request)
        if piece.sample:
            self.sampled.append(request)
            request.num_in_flight += 1
        self.budget -= len(piece.token_ids)

    def load_of(self, request: Request) -> StepLoad:
        """What that of a request's tokens costs depends on."""
        return _load(p for p, r in zip(self.slices, self.requests, strict=True) if r is request)

    def load(self) -> StepLoad:
        """What it costs depends on."""
        return _load(self.slices)


def _load(pieces: Iterable[SequenceSlice]) -> StepLoad:
    decodes = decode_context = rows = context = logits = 0
    for piece in pieces:
        count = len(piece.token_ids)
        if count == 1:
            decodes += 1
            decode_context += piece.start + 1
        else:
            rows += count
            context += chunk_context(piece.start, count)
            logits += piece.logits_rows
    return StepLoad(decodes, decode_context, rows, context, logits)
