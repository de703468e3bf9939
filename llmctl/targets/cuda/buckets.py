"""The sizes that steps are padded to, so that few programs serve them all. Plain arithmetic."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from llmctl.engine.step import RuntimeLimits

GRAPH_CONTEXT = 2048
"""Tokens of context that every decode graph is captured for at least. Longer grids cost little (an H100
took 6.68 ms for 32 sequences of 512 tokens on a grid for 8,192 positions, 6.64 on one for 2,048), longer block tables
are more to send."""
_GROWTH = 4


def sequence_buckets(most: int) -> tuple[int, ...]:
    """Numbers of sequences, ascending up to ``most``: 1, 2, 4, 8, 16, 32, then by 32.

    Those are the rows that the GEMM kernels' tiles have: a step of 40 sequences costs what one of 64 does.
    """
    sizes = [1, 2, 4, 8, 16, *range(32, most + 32, 32)]
    return (*[n for n in sizes if n < most], most)


def padded(count: int, buckets: Sequence[int] = ()) -> int:
    """The smallest bucket that holds ``count``; without buckets the next multiple of 8, or of 1/16 of its power of 2.

    Padding wastes at most a sixteenth of the work then, and a budget of 2,048 tokens makes 80 sizes.
    """
    if buckets:
        return buckets[bisect_left(buckets, count)]
    step = max(8, 1 << max(0, count.bit_length() - 5))
    return -(-count // step) * step


def context_width(longest: int, limits: RuntimeLimits) -> int:
    """Blocks a row of block tables for contexts of up to ``longest`` tokens.

    That is ``GRAPH_CONTEXT``, or a power of four times it, but no more than the longest sequence has.
    """
    context = GRAPH_CONTEXT
    while context < longest:
        context *= _GROWTH
    return -(-min(context, limits.max_model_len) // limits.block_size)
