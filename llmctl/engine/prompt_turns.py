"""When a long prompt that is being computed lets shorter ones go first in a step.

Prompts are computed in the order of the running requests, and a step that cuts the first one computes no other: so all
would wait for a long one. Shortest first would have the least mean wait (Smith 1956, "Various Optimizers for
Single-Stage Production"), but a stream of short ones would keep a long one waiting for ever. So the first prompt in
order has an account, in seconds of the cost model (``step_cost``): it earns ``SHARE`` of what its own tokens cost, and
pays for what steps cost beside. While there is anything in it, the step is a turn of those that are shorter.

What a step costs beside is not all their doing. A request that decodes since before the prompt began would slow it down
without them: then only turns are paid for. Otherwise nothing would decode, but for those that turns let in: then the
whole of every step is, except the prompt's own tokens. In debt it lets nobody in, and those that are in end some time;
so it takes ``1 + SHARE`` times as long as without turns, and what those let in by the last turn take.

Shorter is a prompt of which ``LEAST_RATIO`` times as much is left as fits into what is left of the first: turns, which
are at most so rare, compute it before the first is done. Any other would gain nothing, and keep the turns from others.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmctl.engine.kv_blocks import KVBlocks
from llmctl.engine.preemption import Entry
from llmctl.engine.request import Request
from llmctl.engine.step_cost import StepCost, StepLoad

SHARE = 0.2
"""Of the seconds that a prompt's own tokens take, what turns of shorter ones may take beside."""
LEAST_RATIO = 5
"""A prompt is shorter than the first when it has at most this part of the tokens that the first has left."""


class PromptTurns:
    """The account of the prompt that is first in order.

    Args:
        cost: what steps take. budget: tokens of a step.
    """

    def __init__(self, cost: StepCost, budget: int) -> None:
        self._cost, self._budget = cost, budget
        self._first, self._seconds = "", 0.0

    def due(self, first: Request) -> bool:
        """Whether shorter prompts than this one, the first in order, may go first."""
        return self._first == first.request_id and self._seconds > 0

    def charge(self, first: Request, own: StepLoad, load: StepLoad, *, pays: bool) -> None:
        """A step was scheduled.

        Args:
            first: its first prompt in order. own: what the step computes of it. load: all that the step computes.
            pays: whether what the step costs beside it is paid for.
        """
        if self._first != first.request_id:
            self._first, self._seconds = first.request_id, 0.0
        each = self._cost.coefficients()
        computed = own.decode_rows + own.prefill_rows
        seconds = (each.base + each.prefill_base) * computed / self._budget + each.prefill_row * computed
        seconds += each.prefill_context * (own.decode_context + own.prefill_context)
        seconds += each.prefill_logits * own.prefill_logits
        self._seconds += SHARE * seconds
        if pays:
            self._seconds -= max(0.0, self._cost.seconds(load) - seconds)


def tokens_left(request: Request) -> int:
    """Known tokens that are not computed yet."""
    return len(request.token_ids) - request.num_computed_tokens


def is_shorter(tokens: int, first: Request) -> bool:
    """Whether a prompt with so many tokens to compute goes first in turns."""
    return LEAST_RATIO * tokens <= tokens_left(first)


def goes_on(request: Request, first: Request) -> bool:
    """Whether a running request is a prompt that goes on in turns: shorter than the first by any measure, for it was
    when it entered. (One of a larger priority value never is: the first has then entered in a turn of it.)"""
    return 1 + request.num_forced < tokens_left(request) < tokens_left(first)


def may_enter(
    entry: Entry, first: Request, running: Sequence[Request], blocks: KVBlocks, *, passed: Entry | None
) -> bool:
    """Whether a waiting request may enter in a turn: it is shorter than the first, of no larger priority value, and
    takes no block that a running one needs for its tokens, those in flight included.

    Args:
        passed: the queue's next, where ``entry`` is another. It is left the blocks that it would find once the first
            is done.
    """
    if not is_shorter(entry.remaining, first) or entry.request.sort_key[0] > first.sort_key[0]:
        return False
    free = entry.free_beside(blocks)
    if passed is not None and entry.needed + passed.needed > free + blocks.num_held(first):
        return False
    return entry.needed <= free - sum(blocks.missing(r, len(r.token_ids) + r.num_in_flight) for r in running)
