"""Shapes of the LoRA kernels: entry points by rank, splits of the scratch between them. Plain arithmetic."""

from __future__ import annotations

LORA_SOURCE = "lora.cu"
MAX_RANK = 64
RANK_MULTIPLE = 8
SLICE = 512
"""Columns of x a split: fixed, so that a row has the same bits in any batch."""


def lora_splits(k: int, slice_: int = SLICE) -> int:
    """Splits of ``k`` columns: the first size of the scratch ``h``."""
    return -(-k // slice_)


def lora_entries(tag: str, rank: int) -> tuple[str, str]:
    """The entry points for adapters of up to ``rank``, shrink and expand."""
    ranks = 16 if rank <= 16 else MAX_RANK
    return f"lora_shrink_{tag}_r{ranks}", f"lora_expand_{tag}_r{ranks}"
