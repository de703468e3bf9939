"""Which KV blocks sequences hold: a block table for each group of layers, all out of one pool.

Groups whose layers have a sliding window let go of blocks that no later token sees: their tables name the null block
there, which nobody holds and no query reads. Tables of one sequence are equally long, whatever was let go of. When is
it safe? A token at position p sees ``p - window + 1 .. p``. Tokens are computed in order, and a runtime executes steps
in the order in which they were scheduled; so what the next token to be scheduled does not see is read by steps in
flight at most, which come before whatever the block is handed out for.

A prefix is found in the cache when the groups that see all have all of its blocks, and those with a window the blocks
that the token after it sees. Design after vLLM's hybrid KV cache manager.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llmctl.engine.block_pool import BlockPool
from llmctl.engine.request import Request
from llmctl.engine.step import RuntimeLimits


def window_blocks(window: int, block_size: int, step_tokens: int) -> int:
    """Blocks that a layer with a window needs at most, while steps compute up to ``step_tokens`` tokens."""
    return -(-(window + step_tokens - 2) // block_size) + 1


def sequence_blocks(windows: Sequence[int], block_size: int, step_tokens: int, num_tokens: int) -> int:
    """Blocks that a sequence of ``num_tokens`` tokens holds at most, over all groups; ``windows``: one a group."""
    whole = -(-num_tokens // block_size)
    return sum(min(whole, window_blocks(w, block_size, step_tokens)) if w else whole for w in windows)


def longest_sequence(windows: Sequence[int], block_size: int, step_tokens: int, num_blocks: int, limit: int) -> int:
    """Tokens of the longest sequence, up to ``limit``, that ``num_blocks`` blocks hold."""
    low, high = 0, -(-limit // block_size)  # in blocks of one group: low fits, and nothing above high is asked for
    while low < high:
        middle = (low + high + 1) // 2
        fits = sequence_blocks(windows, block_size, step_tokens, middle * block_size) <= num_blocks
        low, high = (middle, high) if fits else (low, middle - 1)
    return min(low * block_size, limit)


@dataclass(frozen=True, slots=True)
class Prefix:
    """A cached beginning of a sequence; nobody holds it yet.

    Attributes:
        tables: by group, null blocks included. gone: how many of those each table begins with.
    """

    tables: tuple[tuple[int, ...], ...]
    gone: tuple[int, ...]

    @property
    def num_blocks(self) -> int:
        """Blocks of one group."""
        return len(self.tables[0])

    @property
    def held(self) -> list[int]:
        """The blocks to hold."""
        return _held(self.tables, self.gone)


class KVBlocks:
    """The block tables of requests (``Request.tables``), and the pool that they are made of.

    Args:
        step_tokens: the most that a step computes.
        enable_caching, key: see ``BlockPool``.

    Attributes:
        pool: the blocks. slides: whether any group lets go of blocks.
        longest: tokens of the longest sequence that fits.
    """

    def __init__(
        self, limits: RuntimeLimits, *, step_tokens: int, enable_caching: bool = True, key: bytes | None = None
    ) -> None:
        self.pool = BlockPool(limits.num_blocks, limits.block_size, enable_caching=enable_caching, key=key)
        windows, size = limits.windows, limits.block_size
        if not windows or list(windows) != sorted(windows, key=lambda w: (w != 0, -w)):
            raise ValueError(f"KV groups: expected those that see most first, found windows of {windows}")
        self._windows, self._null = windows, limits.null_block
        self._most = tuple(window_blocks(w, size, step_tokens) if w else None for w in windows)
        self._sliding = [(window, windows.index(window)) for window in dict.fromkeys(windows) if window]
        self.slides = bool(self._sliding)
        self.longest = longest_sequence(windows, size, step_tokens, limits.num_blocks, limits.max_model_len)
        self.nothing = Prefix(((),) * len(windows), (0,) * len(windows))

    # -- counts -----------------------------------------------------------------------------------------------

    def missing(self, request: Request, num_tokens: int) -> int:
        """Blocks that ``num_tokens`` tokens take at most beside those that a running request holds."""
        new = self.pool.blocks_for(num_tokens) - len(request.tables[0])
        if new <= 0 or not self.slides:
            return max(0, new)
        held = (len(table) - gone for table, gone in zip(request.tables, request.gone, strict=True))
        return sum(new if most is None else min(new, most - now) for most, now in zip(self._most, held, strict=True))

    def missing_after(self, prefix: Prefix, num_tokens: int) -> int:
        """Blocks that ``num_tokens`` tokens take at most beside a cached prefix, those of it that are free included."""
        return self._taken(self.pool.blocks_for(num_tokens) - prefix.num_blocks, prefix)

    def _taken(self, new: int, prefix: Prefix) -> int:
        if not self.slides:
            return new
        total = 0
        for most, table, gone in zip(self._most, prefix.tables, prefix.gone, strict=True):
            # Free blocks of the prefix are taken as well, and let go of again: never more are held than ``most``.
            total += new if most is None else max(0, min(new, most - self.pool.num_unheld(table[gone:])))
        return total

    def room(self, request: Request) -> int:
        """Tokens that fit into what a running request holds, and into the free blocks."""
        return (len(request.tables[0]) + self.pool.num_free // len(self._windows)) * self.pool.block_size

    def num_held(self, request: Request) -> int:
        """Blocks that a running request holds."""
        return sum(map(len, request.tables)) - sum(request.gone)

    def held(self, request: Request) -> list[int]:
        """The blocks that a request holds, those of the sequence's beginning first."""
        return _held(request.tables, request.gone)

    # -- handing out and taking back --------------------------------------------------------------------------

    def start(self, request: Request, prefix: Prefix) -> None:
        """Give a request the blocks of its cached prefix."""
        self.pool.share(prefix.held)
        request.tables, request.gone = prefix.tables, prefix.gone

    def grow(self, request: Request, num_tokens: int) -> None:
        """Give a running request blocks for ``num_tokens`` tokens; they must be free."""
        groups = len(self._windows)
        new = self.pool.allocate(groups * (self.pool.blocks_for(num_tokens) - len(request.tables[0])))
        request.tables = tuple([table + tuple(new[i::groups]) for i, table in enumerate(request.tables)])

    def let_go(self, requests: Iterable[Request]) -> None:
        """Take from running requests the blocks that no token which is not scheduled yet sees."""
        if not self.slides:
            return
        size, sliding = self.pool.block_size, self._sliding
        for request in requests:
            position = request.num_computed_tokens
            if any((position - window + 1) // size > request.gone[group] for window, group in sliding):
                self._slide(request)

    def _slide(self, request: Request) -> None:
        tables, gone = request.tables, request.gone
        seen = tuple(self._first_seen(window, request.num_computed_tokens) for window in self._windows)
        request.gone = tuple(map(max, seen, gone))
        request.tables = tuple(
            [
                (self._null,) * now + table[now:] if now > before else table
                for table, before, now in zip(tables, gone, request.gone, strict=True)
            ]
        )
        self.pool.release(_held([table[:now] for table, now in zip(tables, request.gone, strict=True)], gone))

    def _first_seen(self, window: int, position: int) -> int:
        """Index of the first block that a token at ``position`` sees."""
        return max(0, position - window + 1) // self.pool.block_size if window else 0

    def release(self, request: Request) -> None:
        """Take back all."""
        self.pool.release(self.held(request))
        request.tables = request.gone = ()

    # -- prefixes ---------------------------------------------------------------------------------------------

    def match(self, hashes: Sequence[bytes]) -> Prefix:
        """The longest cached prefix of a hash chain."""
        count = len(hashes)
        for group, window in enumerate(self._windows):
            if not window:
                count = len(self.pool.match(_key(digest, group) for digest in hashes[:count]))
        found = -1
        while self.slides and found != count:  # what one group lacks, the others need not have
            found = count
            for group, window in enumerate(self._windows):
                if window:
                    count = self._seen_by_next(hashes, count, group)
        gone = tuple(self._first_seen(window, count * self.pool.block_size) for window in self._windows)
        tables = tuple(
            (self._null,) * first + tuple(self.pool.match(_key(digest, group) for digest in hashes[first:count]))
            for group, first in enumerate(gone)
        )
        assert all(len(table) == count for table in tables)
        return Prefix(tables, gone)

    def _seen_by_next(self, hashes: Sequence[bytes], count: int, group: int) -> int:
        """The most blocks, up to ``count``, such that the token after them finds all that it sees in a group."""
        known = count  # blocks from here up to count are cached
        while True:
            first = self._first_seen(self._windows[group], count * self.pool.block_size)
            lacking = first + len(self.pool.match(_key(digest, group) for digest in hashes[first:known]))
            if lacking == known:
                return count
            # Of a token whose window this block is in, all up to it: whole windows are skipped where little is cached.
            known, count = first, lacking

    def cache(self, request: Request, indices: Iterable[int]) -> None:
        """Make full, computed blocks of a request findable, but for those that it has let go of meanwhile."""
        for index in indices:
            for group, (table, gone) in enumerate(zip(request.tables, request.gone, strict=True)):
                if index >= gone:
                    self.pool.cache(table[index], _key(request.block_hashes[index], group))

    # -- integrity --------------------------------------------------------------------------------------------

    def check(self, requests: Iterable[Request]) -> None:
        """Every block is free or held by one of the running requests, whose tables name no block that they let go of.

        Raises:
            RuntimeError: naming the first in disorder.
        """
        tables = []
        for request in requests:
            tables.append(self.held(request))
            ends = {len(table) for table in request.tables}
            let_go = {i for table, gone in zip(request.tables, request.gone, strict=True) for i in table[:gone]}
            if len(ends) > 1 or self._null in tables[-1] or not let_go <= {self._null}:
                raise RuntimeError(f"KV blocks: the tables of request {request.request_id} are in disorder")
        self.pool.check(tables)


def _held(tables: Sequence[tuple[int, ...]], gone: Sequence[int]) -> list[int]:
    """Blocks of tables without what is gone: of all groups for the sequence's beginning, then of all for what follows,
    so that the pool forgets a sequence's end, whole, before its beginning."""
    if len(tables) == 1:
        return list(tables[0][gone[0] :])
    longest = max(map(len, tables), default=0)
    return [
        table[i]
        for i in range(min(gone, default=0), longest)
        for table, first in zip(tables, gone, strict=True)
        if first <= i < len(table)
    ]


def _key(digest: bytes, group: int) -> bytes:
    """What a group's block of some content is found by."""
    return digest + bytes((group,)) if group else digest
