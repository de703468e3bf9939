"""Launch shapes of the attention kernels: grids, threads, dynamic shared memory and scratch. Plain arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from llmctl.graph.dtypes import BY_TAG

HEAD_DIMS = (64, 80, 96, 128, 256)
BLOCK_SIZES = (16, 32, 64)
DECODE_SPLIT = 512
"""Positions a split of decode attention: fixed, so that a sequence has the same bits in any batch."""
UNIT = 16
"""Positions a cache unit: what one warp loads at a time."""


@dataclass(frozen=True)
class Launch:
    """One kernel launch: entry point, grid (x, y, z), threads a block, bytes of dynamic shared memory.

    Above 48 KB of shared memory the function's limit has to be raised first
    (``CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES``). No launch needs more than the 99 KB of sm_86, 89 and 120.
    """

    entry: str
    grid: tuple[int, int, int]
    threads: int
    shared: int


@dataclass(frozen=True)
class AttentionShape:
    """What an attention op's kernels are chosen by.

    Attributes:
        tag: ``f16`` or ``bf16``, of queries and output. kv_tag: that, ``s8`` or ``e4m3``, of the cache.

    Raises:
        ValueError: what the kernels do not serve, and what they do.
    """

    tag: str
    kv_tag: str
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int

    def __post_init__(self) -> None:
        if self.tag not in ("f16", "bf16"):
            raise ValueError(f"queries are {self.tag}; the kernels take f16 or bf16")
        if self.kv_tag not in (self.tag, "s8", "e4m3"):
            raise ValueError(f"a {self.kv_tag} cache with {self.tag} queries; expected {self.tag}, s8 or e4m3")
        if self.head_dim not in HEAD_DIMS:
            raise ValueError(f"head size {self.head_dim}; the kernels have {HEAD_DIMS}")
        if self.block_size not in BLOCK_SIZES:
            raise ValueError(f"block size {self.block_size}; the kernels have {BLOCK_SIZES}")
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads are not a multiple of {self.kv_heads} key/value heads")

    @property
    def group(self) -> int:
        """Query heads of one key/value head."""
        return self.heads // self.kv_heads

    @property
    def sources(self) -> tuple[str, ...]:
        """Files that the three kernels are in."""
        return (
            f"attention_decode_d{self.head_dim}.cu",
            f"attention_prefill_d{self.head_dim}.cu",
            "attention_combine.cu",
        )

    @property
    def entries(self) -> tuple[str, ...]:
        """Entry points: decode, prefill, combine."""
        return self.decode(1, 1).entry, self.prefill(1, 1).entry, self.combine(1).entry

    @property
    def _cache_row(self) -> int:
        return (self.head_dim * BY_TAG[self.kv_tag].nbytes // 16 | 1) * 16

    @property
    def _query_row(self) -> int:
        return (self.head_dim * 2 // 16 | 1) * 16

    def decode(self, sequences: int, max_splits: int) -> Launch:
        """``attention_decode_*``; ``max_splits`` as given by ``max_splits``."""
        warps = 2 if self.head_dim > 128 else 4
        ring = max(4 * UNIT * self._cache_row, 16 * self.head_dim * 4)
        shared = 16 * self._query_row + warps * (ring + (4 * UNIT + 32) * 4)
        entry = f"attention_decode_{self.tag}_{self.kv_tag}_d{self.head_dim}"
        return Launch(entry, (max_splits, self.kv_heads * -(-self.group // 16), sequences), warps * 32, shared)

    def prefill(self, sequences: int, tokens: int) -> Launch:
        """``attention_prefill_*`` for ``tokens`` rows of q in ``sequences`` sequences."""
        rows = 64 if self.head_dim > 128 else 128
        scales = 2 * 2 * 32 * 4 if self.kv_tag == "s8" else 0
        shared = rows * self._query_row + 2 * 2 * 2 * UNIT * self._cache_row + scales
        tiles = -(-tokens * self.group // rows) + sequences
        entry = f"attention_prefill_{self.tag}_{self.kv_tag}_d{self.head_dim}"
        return Launch(entry, (self.kv_heads, tiles, 1), 128, shared)

    def combine(self, sequences: int) -> Launch:
        """``attention_combine_*``, after ``decode``."""
        return Launch(f"attention_combine_{self.tag}", (-(-sequences * self.heads // 4), 1, 1), 128, 0)

    def value_unit(self, value_scale: float) -> float:
        """The combine kernel's factor: what a sum over cached values is multiplied by."""
        return 256.0 * value_scale if self.kv_tag == "e4m3" else 1.0


def max_splits(max_context: int, window: int, split: int) -> int:
    """Splits of a sequence of up to ``max_context`` positions that a window of ``window`` (0 = none) can touch."""
    longest = -(-max_context // split)
    return min(longest, (window - 1) // split + 2) if window else longest
