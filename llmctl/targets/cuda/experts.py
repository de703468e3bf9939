"""Launches of the kernels of a mixture's experts: blocks of slots, entries, geometry. Plain arithmetic over shapes.

A slot is one token's choice of one expert. A token alone needs no order; slots of several are sorted by expert into
blocks of up to 8, or 16 where experts get more than 8 each, and a block reads its expert's weights once.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from llmctl.graph.dtypes import DTYPES
from llmctl.targets.cuda.call import MAX_GRID
from llmctl.targets.cuda.gemm import plan_stream
from llmctl.targets.cuda.layout import TILE, CudaFormat, row_order

EXPERTS_SOURCE = "experts.cu"
SLOTS = (8, 16)
"""Slots a block."""
MAX_EXPERTS = 4096
"""What the router's scores in 48 KiB of shared memory allow; no fewer than a config may have."""
_WARPS = 8
_STRIDE = TILE + 4  # kStreamStride of gemm_stream.cuh


@dataclass(frozen=True)
class GroupedPlan:
    """One grouped product.

    Attributes:
        entry: kernel. grid, threads, shared: the launch; shared is dynamic shared memory, bytes.
        group: the kernel that sorts the slots; "": one token's slots, as they are.
    """

    entry: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    group: str


def max_blocks(slots: int, experts: int, size: int) -> int:
    """The most blocks of ``size`` that slots sorted by expert can make."""
    return min(slots, experts + slots // size)


def most_tokens(experts: int, chosen: int) -> int:
    """Tokens of the largest step, of which each chooses ``chosen`` of the experts: blocks of slots are the grid's z."""
    return (SLOTS[-1] * (MAX_GRID[2] - experts + 1) - 1) // chosen


@functools.lru_cache(maxsize=4096)
def plan_grouped(
    shape: tuple[int, int], experts: int, dtype: str, tokens: int, chosen: int, fmt: CudaFormat | None, *, gated: bool
) -> GroupedPlan:
    """The launch for ``tokens`` tokens with ``chosen`` experts each.

    Args:
        shape: of the weight, all experts' rows. fmt: how its codes are packed; None: it is dense.
    """
    slots, tag = tokens * chosen, DTYPES[dtype].tag
    size = SLOTS[slots > SLOTS[0] * experts]
    blocks = slots if tokens == 1 else max_blocks(slots, experts, size)
    group = "" if tokens == 1 else f"group_slots_m{size}"
    if fmt is None:
        tiles = len(row_order(shape[0] // experts, gated)) // TILE
        return GroupedPlan(
            f"grouped_dense_{tag}_m{size}", (tiles, 1, blocks), 32 * _WARPS, 4 * _WARPS * size * _STRIDE, group
        )
    tiles = fmt.rows // experts // TILE
    # Ring, warps and group as a linear of all experts' rows has them, whose tiles are many: four warps from 64 experts
    # of the usual widths on, however few are chosen. Its shares of K over blocks are left out.
    stream = plan_stream(fmt, dtype, size)
    entry = f"grouped_{stream.entry.replace('_stream', '')}"
    return GroupedPlan(entry, (tiles, 1, blocks), stream.threads, stream.shared, group)


def grouped_entries(
    shape: tuple[int, int], experts: int, dtype: str, chosen: int, fmt: CudaFormat | None, *, gated: bool
) -> tuple[str, ...]:
    """Every entry point that a weight may need, whatever the tokens."""
    many = SLOTS[0] * experts + 1
    plans = [plan_grouped(shape, experts, dtype, n, chosen, fmt, gated=gated) for n in (1, 2, many)]
    return tuple(dict.fromkeys(name for plan in plans for name in (plan.entry, plan.group) if name))


def grouped_source(fmt: CudaFormat | None) -> str:
    """The file of the product among ``grouped_entries``."""
    return "grouped_dense.cu" if fmt is None else f"grouped_{fmt.kind}a16.cu"


def route_shared(experts: int, groups: int) -> int:
    """Bytes of shared memory that the router takes."""
    return -(-4 * (2 * experts + groups) // 16) * 16
