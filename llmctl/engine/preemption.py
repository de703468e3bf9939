"""Priority preemption: how many running requests go back to the queue so that a more important one can enter."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from llmctl.engine.kv_blocks import KVBlocks, Prefix
from llmctl.engine.request import Request


@dataclass(frozen=True, slots=True)
class Entry:
    """What a waiting request takes to enter a step.

    Attributes:
        cached: what the prefix cache has of it. start: tokens in that; remaining: known tokens after those.
        needed: further blocks. least_tokens: of ``remaining``, how many the step must compute at least.
    """

    request: Request
    cached: Prefix
    start: int
    remaining: int
    needed: int
    least_tokens: int

    def has_blocks(self, blocks: KVBlocks) -> bool:
        """Whether the free blocks hold it whole."""
        return self.needed <= self.free_beside(blocks)

    def free_beside(self, blocks: KVBlocks) -> int:
        """How many blocks are free beside those of its cached prefix."""
        return blocks.pool.num_free - blocks.pool.num_unheld(self.cached.held)


def num_staying(
    entry: Entry,
    running: Sequence[Request],
    blocks: KVBlocks,
    *,
    seats: int,
    budget: int,
    admits: Sequence[bool] | None,
) -> int:
    """How many of ``running`` stay, from the front, for ``entry`` to be in the next step; the others make room.

    As many as can; all when nothing but the budget is in its way, or when sending away everyone with a larger priority
    value would not help. It enters after those that stay: their next tokens, and the blocks for them, come first. So
    while the prompt of one of them is not computed yet, nobody makes room.

    Args:
        running: in order. seats: requests at once. budget: tokens a step. admits: see ``admitting_prefixes``; None:
            nobody has an ITL deadline.
    """
    everyone = len(running)
    fewest = bisect_right(running, entry.request.sort_key[0], key=lambda r: r.sort_key[0])
    wants = [_next_tokens(r) for r in running]
    in_prompt = next((i for i, r in enumerate(running) if wants[i] > 1 + r.num_forced), everyone)
    if in_prompt < fewest:
        return everyone
    ends = (r.num_computed_tokens + count for r, count in zip(running, wants, strict=True))
    growth = [0, *accumulate(blocks.missing(r, end) for r, end in zip(running, ends, strict=True))]
    tokens = [0, *accumulate(wants)]
    room = entry.free_beside(blocks)
    let_go: Counter[int] = Counter()
    cached = set(entry.cached.held)
    for staying in range(everyone, fewest - 1, -1):
        if staying < everyone:
            for block in blocks.held(running[staying]):
                let_go[block] += 1
                room += let_go[block] == blocks.pool.num_holders(block) and block not in cached
        if staying >= seats or entry.needed + growth[staying] > room or not (admits is None or admits[staying]):
            continue
        if staying == everyone:
            return everyone
        if staying <= in_prompt and tokens[staying] + entry.least_tokens <= budget:
            return staying
    return everyone


def _next_tokens(request: Request) -> int:
    """What a running request can compute next; the token in flight if that is all, and does not end it."""
    behind = len(request.token_ids) - request.num_computed_tokens
    return behind or int(len(request.token_ids) + 1 < request.max_length)
