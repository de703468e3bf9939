"""The pool of fixed-size KV blocks: reference counts, an LRU free list, prefix reuse by content hash.

A block is *used* while some request's block table names it (its reference count says how many). Otherwise it stands in
the free list, where it may still hold a cached prefix until it is handed out again. Design after vLLM v1's block pool.

A cached block is found by a hash over its tokens and everything before them: a chain of keyed blake2b digests whose
root covers the adapter and the request's cache salt. The digest is 256 bits wide because a collision would show one
user's context to another, and keyed with a secret of this pool so that nobody can prepare one.
"""

from __future__ import annotations

import hashlib
import secrets
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence


class _Block:
    """One block, and its links in the free list (None while it is used)."""

    __slots__ = ("hash", "id", "next", "prev", "refs")

    def __init__(self, block_id: int) -> None:
        self.id = block_id
        self.refs = 0
        self.hash: bytes | None = None
        self.prev: _Block | None = None
        self.next: _Block | None = None


class _FreeList:
    """Doubly linked list of free blocks, next to be handed out first. Every operation is O(1)."""

    def __init__(self) -> None:
        self._ends = _Block(-1)
        self._ends.prev = self._ends.next = self._ends
        self.length = 0

    def _insert(self, block: _Block, before: _Block) -> None:
        after = before.prev
        assert after is not None
        block.prev, block.next = after, before
        after.next = before.prev = block
        self.length += 1

    def append(self, block: _Block) -> None:
        """To be handed out last."""
        self._insert(block, self._ends)

    def append_left(self, block: _Block) -> None:
        """To be handed out next."""
        first = self._ends.next
        assert first is not None
        self._insert(block, first)

    def remove(self, block: _Block) -> None:
        """Take a block out of the middle."""
        assert block.prev is not None
        assert block.next is not None
        block.prev.next, block.next.prev = block.next, block.prev
        block.prev = block.next = None
        self.length -= 1

    def pop(self) -> _Block:
        """The block to hand out next; the list must not be empty."""
        block = self._ends.next
        assert block is not None
        assert block is not self._ends
        self.remove(block)
        return block

    def walk(self) -> list[_Block]:
        """All blocks, in order."""
        found: list[_Block] = []
        block = self._ends.next
        while block is not None and block is not self._ends and len(found) <= self.length:
            found.append(block)
            block = block.next
        return found


class BlockPool:
    """``num_blocks`` KV blocks of ``block_size`` tokens, named 0 .. num_blocks-1.

    Args:
        enable_caching: find and keep prefixes. key: the hash key, up to 64 bytes; None draws a secret one.
    """

    def __init__(
        self, num_blocks: int, block_size: int, *, enable_caching: bool = True, key: bytes | None = None
    ) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"block pool: expected positive sizes, found {num_blocks} blocks of {block_size} tokens")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_caching = enable_caching
        self._key = secrets.token_bytes(32) if key is None else key
        self._blocks = [_Block(i) for i in range(num_blocks)]
        self._cached: dict[bytes, _Block] = {}
        self._free = _FreeList()
        for block in self._blocks:
            self._free.append(block)

    @property
    def num_free(self) -> int:
        """Blocks that no request holds."""
        return self._free.length

    @property
    def usage(self) -> float:
        """Share of the blocks that requests hold, 0 to 1."""
        return 1.0 - self._free.length / self.num_blocks

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size)

    # -- handing out and taking back -------------------------------------------------------------------------

    def allocate(self, count: int) -> list[int]:
        """``count`` blocks of unspecified content, least recently used first; what they had cached is forgotten.

        Raises:
            RuntimeError: fewer are free (the scheduler asks first).
        """
        if count > self._free.length:
            raise RuntimeError(f"block pool: {count} blocks wanted, {self._free.length} free")
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._forget(block)
            block.refs = 1
        return [block.id for block in taken]

    def share(self, block_ids: Iterable[int]) -> None:
        """Hold cached blocks (found by ``match``) once more."""
        for block_id in block_ids:
            block = self._blocks[block_id]
            if block.refs == 0:
                self._free.remove(block)
            block.refs += 1

    def release(self, block_ids: Sequence[int]) -> None:
        """Let go of a request's blocks. The end of a sequence is handed out before its beginning, which more requests
        are likely to share; blocks that cache nothing go first of all."""
        for block_id in reversed(block_ids):
            block = self._blocks[block_id]
            if block.refs < 1:
                raise RuntimeError(f"block pool: block {block_id} released more often than held")
            block.refs -= 1
            if block.refs == 0:
                (self._free.append if block.hash is not None else self._free.append_left)(block)

    # -- prefixes ---------------------------------------------------------------------------------------------

    def extend_hashes(
        self, hashes: list[bytes], token_ids: Sequence[int], adapter_id: str | None, cache_salt: str | None
    ) -> None:
        """Bring the hashes of a sequence's full blocks up to its length, in place."""
        size = self.block_size
        for index in range(len(hashes), len(token_ids) // size):
            parent = hashes[-1] if hashes else self._root_hash(adapter_id, cache_salt)
            tokens = array("q", token_ids[index * size : (index + 1) * size]).tobytes()
            hashes.append(self._digest(parent + tokens))

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """Blocks of the longest cached prefix of a hash chain; they are not held yet."""
        found = []
        for digest in hashes:
            block = self._cached.get(digest)
            if block is None:
                break
            found.append(block.id)
        return found

    def num_holders(self, block_id: int) -> int:
        """How many requests hold a block."""
        return self._blocks[block_id].refs

    def num_unheld(self, block_ids: Iterable[int]) -> int:
        """How many of these blocks are in the free list."""
        return sum(self._blocks[i].refs == 0 for i in block_ids)

    def cache(self, block_id: int, digest: bytes) -> None:
        """Make a full, computed block findable. When another block holds the same content, that one stays."""
        block = self._blocks[block_id]
        if self.enable_caching and block.hash is None and digest not in self._cached:
            block.hash = digest
            self._cached[digest] = block

    def _forget(self, block: _Block) -> None:
        if block.hash is not None:
            del self._cached[block.hash]
            block.hash = None

    def _root_hash(self, adapter_id: str | None, cache_salt: str | None) -> bytes:
        parts = (
            b"-" if text is None else b"+" + text.encode("utf-8", "surrogatepass") for text in (adapter_id, cache_salt)
        )
        return self._digest(b"".join(len(part).to_bytes(8, "little") + part for part in parts))

    def _digest(self, data: bytes) -> bytes:
        return hashlib.blake2b(data, digest_size=32, key=self._key).digest()

    # -- integrity --------------------------------------------------------------------------------------------

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Conservation: every block is either free or held exactly by ``tables``, the live requests' block tables.

        O(num_blocks).

        Raises:
            RuntimeError: naming the first block in disorder.
        """
        held = Counter(block_id for table in tables for block_id in table)
        free = self._free.walk()
        free_ids = {block.id for block in free}
        if len(free) != self._free.length or len(free_ids) != len(free):
            raise RuntimeError("block pool: the free list is damaged")
        for block in self._blocks:
            if block.refs != held[block.id]:
                raise RuntimeError(f"block pool: block {block.id} has {block.refs} references, held {held[block.id]}x")
            if (block.refs == 0) != (block.id in free_ids):
                raise RuntimeError(f"block pool: block {block.id} has {block.refs} references; free list disagrees")
            if block.hash is not None and self._cached.get(block.hash) is not block:
                raise RuntimeError(f"block pool: block {block.id} is not found under its hash")
        if len(self._cached) != sum(block.hash is not None for block in self._blocks):
            raise RuntimeError("block pool: the prefix cache names a block that does not know it")
