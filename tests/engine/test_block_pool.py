"""BlockPool: conservation, LRU order, prefix identity."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llmctl.engine.block_pool import BlockPool


def chain(pool: BlockPool, tokens: list[int], adapter: str | None = None, salt: str | None = None) -> list[bytes]:
    hashes: list[bytes] = []
    pool.extend_hashes(hashes, tokens, adapter, salt)
    return hashes


def fill(pool: BlockPool, tokens: list[int]) -> list[int]:
    """Hold and cache the full blocks of a sequence."""
    hashes = chain(pool, tokens)
    blocks = pool.allocate(len(hashes))
    for block, digest in zip(blocks, hashes, strict=True):
        pool.cache(block, digest)
    return blocks


def test_released_prefix_is_found_again_until_its_blocks_are_handed_out() -> None:
    pool = BlockPool(4, 2)
    blocks = fill(pool, [1, 2, 3, 4])
    pool.release(blocks)
    assert pool.match(chain(pool, [1, 2, 3, 4, 5])) == blocks
    pool.allocate(3)  # two that cache nothing, then the end of the prefix
    assert pool.match(chain(pool, [1, 2, 3, 4])) == blocks[:1]
    pool.check([[b for b in range(4) if b != blocks[0]]])


def test_blocks_that_cache_nothing_are_handed_out_first_then_least_recently_used() -> None:
    pool = BlockPool(4, 1)
    old, new = fill(pool, [1]), fill(pool, [2])
    plain = pool.allocate(2)
    pool.release(old)
    pool.release(plain)
    pool.release(new)
    assert set(pool.allocate(2)) == set(plain)
    assert pool.allocate(1) == old
    assert pool.match(chain(pool, [2])) == new


def test_sharing_takes_a_block_out_of_the_middle_of_the_free_list() -> None:
    pool = BlockPool(5, 1)
    held = [fill(pool, [t]) for t in range(5)]
    for blocks in held:
        pool.release(blocks)
    pool.share(held[2])
    pool.check([held[2]])
    assert pool.allocate(4) == [b for blocks in held if blocks is not held[2] for b in blocks]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (([1, 2], None, None), ([1, 3], None, None)),
        (([1, 2], "a", None), ([1, 2], None, None)),
        (([1, 2], None, "a"), ([1, 2], None, None)),
        (([1, 2], "a", None), ([1, 2], None, "a")),
        (([1, 2], "ab", "c"), ([1, 2], "a", "bc")),
        (([1, 2], None, ""), ([1, 2], None, None)),
        (([1, 2], None, "\ud800"), ([1, 2], None, "\ud801")),
    ],
)
def test_hashes_separate_tokens_adapters_and_salts(one: tuple, other: tuple) -> None:
    pool = BlockPool(1, 2)
    assert chain(pool, *one) != chain(pool, *other)


def test_hash_covers_everything_before_the_block_and_the_pools_key() -> None:
    pool = BlockPool(1, 2, key=b"k")
    assert chain(pool, [1, 2, 3, 4])[1] != chain(pool, [9, 2, 3, 4])[1]
    assert chain(pool, [1, 2]) == chain(BlockPool(1, 2, key=b"k"), [1, 2])
    assert chain(pool, [1, 2]) != chain(BlockPool(1, 2), [1, 2])


@given(st.lists(st.integers(0, 3), max_size=20), st.integers(0, 20))
def test_hashes_grown_in_steps_equal_hashes_made_at_once(tokens: list[int], cut: int) -> None:
    pool = BlockPool(1, 3, key=b"k")
    grown: list[bytes] = []
    pool.extend_hashes(grown, tokens[:cut], None, "s")
    pool.extend_hashes(grown, tokens, None, "s")
    assert grown == chain(pool, tokens, salt="s")
    assert len(grown) == len(tokens) // 3


def test_misuse_and_damage_are_noticed() -> None:
    pool = BlockPool(2, 1)
    with pytest.raises(RuntimeError, match="3 blocks wanted, 2 free"):
        pool.allocate(3)
    blocks = pool.allocate(1)
    with pytest.raises(RuntimeError, match="1 references, held 0x"):
        pool.check([])
    with pytest.raises(RuntimeError, match="held 2x"):
        pool.check([blocks, blocks])
    pool.release(blocks)
    with pytest.raises(RuntimeError, match="more often than held"):
        pool.release(blocks)
    pool._blocks[0].hash = b"unknown"
    with pytest.raises(RuntimeError, match="not found under its hash"):
        pool.check([])
    with pytest.raises(ValueError, match="positive sizes"):
        BlockPool(0, 16)


class PoolMachine(RuleBasedStateMachine):
    """Tables come and go; contents are modelled as what each block was last cached for."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(6, 2)
        self.tables: list[tuple[list[int], list[int]]] = []

    @rule(tokens=st.lists(st.integers(0, 1), min_size=2, max_size=8))
    def hold(self, tokens: list[int]) -> None:
        hashes = chain(self.pool, tokens)
        found = self.pool.match(hashes)
        missing = len(hashes) - len(found)
        if missing > self.pool.num_free - self.pool.num_unheld(found):
            return
        self.pool.share(found)
        table = found + self.pool.allocate(missing)
        for block, digest in zip(table, hashes, strict=True):
            self.pool.cache(block, digest)
        self.tables.append((table, tokens))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        table, _ = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.release(table)

    @invariant()
    def conserved(self) -> None:
        self.pool.check(table for table, _ in self.tables)
        held = Counter(b for table, _ in self.tables for b in table)
        assert self.pool.num_free == 6 - len(held)
        assert self.pool.usage == pytest.approx(len(held) / 6)

    @invariant()
    def held_prefixes_are_found(self) -> None:
        for _, tokens in self.tables:
            hashes = chain(self.pool, tokens)
            assert len(self.pool.match(hashes)) == len(hashes)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
