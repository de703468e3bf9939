"""How a KV cache is cut into blocks, in bytes: what sequences take, and what fits."""

from __future__ import annotations

from dataclasses import dataclass

from llmctl.engine.kv_blocks import longest_sequence, sequence_blocks
from llmctl.graph.kv_groups import KVGroup, block_bytes


@dataclass(frozen=True)
class KVLayout:
    """Blocks of a KV cache.

    Attributes:
        groups: which layers share a block table; a block holds the tokens of one group. Where there are several, all
            layers take the same.
        bytes_per_token: of one token over all layers. block_size: tokens a block.
        step_tokens: of the largest step, which a sliding window needs room for.
    """

    groups: tuple[KVGroup, ...]
    bytes_per_token: int
    block_size: int
    step_tokens: int

    @property
    def windows(self) -> tuple[int, ...]:
        """Positions that each group sees; 0: all."""
        return tuple(group.window for group in self.groups)

    @property
    def block_bytes(self) -> int:
        """Size of a block."""
        return max(1, block_bytes(self.groups, self.bytes_per_token, self.block_size))

    @property
    def _null_blocks(self) -> int:
        """Blocks that a runtime allocates beyond the pool's (``RuntimeLimits.null_block``)."""
        return int(any(self.windows))

    def blocks_of(self, num_tokens: int, count: int = 1) -> int:
        """Blocks that so many sequences of ``num_tokens`` hold at most: a step's tokens are all theirs together."""
        first, further = self._first_and_further(num_tokens)
        return first + (count - 1) * further

    def tokens_in(self, num_blocks: int, num_tokens: int) -> int:
        """Tokens that so many blocks hold, in sequences of ``num_tokens`` rounded up to whole blocks."""
        whole = -(-num_tokens // self.block_size) * self.block_size
        first, further = self._first_and_further(num_tokens)
        return num_blocks * whole // first if num_blocks < first else whole + (num_blocks - first) * whole // further

    def _first_and_further(self, num_tokens: int) -> tuple[int, int]:
        """Blocks of a sequence in which a step computes all of its tokens, and in which it computes one."""
        windows, size = self.windows, self.block_size
        first = sequence_blocks(windows, size, self.step_tokens, num_tokens)
        return first, sequence_blocks(windows, size, 1, num_tokens)

    def longest(self, num_blocks: int, limit: int) -> int:
        """Tokens of the longest sequence, up to ``limit``, that so many blocks hold."""
        return longest_sequence(self.windows, self.block_size, self.step_tokens, num_blocks, limit)

    def size(self, num_blocks: int) -> int:
        """Bytes that so many blocks take in all."""
        return (num_blocks + self._null_blocks) * self.block_bytes if num_blocks else 0

    def blocks_in(self, size: int) -> int:
        """Blocks that fit into so many bytes."""
        return max(0, size // self.block_bytes - self._null_blocks)
