"""Plans as flat arrays: the kept block tables of native code always say what the plan says."""

from __future__ import annotations

import ctypes as c

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.engine.step import IN_FLIGHT, RuntimeLimits, SequenceSlice, StepPlan
from llmctl.targets.batch import BlockTables, build_batch, flatten

LIMITS = RuntimeLimits(num_blocks=64, block_size=4, max_model_len=40, vocab_size=30)


def plan_of(tables: list[tuple[int, ...]]) -> StepPlan:
    """One decoded token a sequence, the last that its table has room for."""
    return StepPlan(
        tuple(SequenceSlice(str(i), [i], 4 * len(blocks) - 1, blocks, True) for i, blocks in enumerate(tables))
    )


def read(tables: BlockTables, plan: StepPlan) -> list[tuple[int, ...]]:
    rows = np.ctypeslib.as_array(
        c.cast(tables.address, c.POINTER(c.c_int32)), shape=(len(plan.slices), tables.width)
    ).tolist()
    return [tuple(row[: len(piece.block_ids)]) for row, piece in zip(rows, plan.slices, strict=True)]


@st.composite
def runs(draw: st.DrawFn) -> list[list[tuple[int, ...]]]:
    """Steps of a scheduler: tables grow, move up when one before them ends, and come anew."""
    blocks = st.integers(0, LIMITS.num_blocks - 1)
    live: list[tuple[int, ...]] = []
    steps = []
    for _ in range(draw(st.integers(1, 8))):
        live = [t for t in live if draw(st.booleans())]
        live = [(*t, draw(blocks)) if len(t) < 10 and draw(st.booleans()) else t for t in live]
        live += [tuple(draw(st.lists(blocks, min_size=1, max_size=3))) for _ in range(draw(st.integers(0, 3)))]
        steps.append(list(live))
    return steps


@settings(max_examples=100, deadline=None)
@given(runs(), st.integers(1, 3))
def test_kept_tables_follow_the_plans(steps: list[list[tuple[int, ...]]], sequences: int) -> None:
    tables = BlockTables(sequences, LIMITS)
    for step in steps:
        plan = plan_of(step)
        tables.update(plan)
        assert read(tables, plan) == step


def test_a_list_is_read_again_each_time() -> None:
    tables = BlockTables(1, LIMITS)
    blocks = [3]
    plan = StepPlan((SequenceSlice("a", [1], 0, blocks, True),))
    tables.update(plan)
    blocks[0] = 7
    tables.update(plan)
    assert read(tables, plan) == [(7,)]


def test_a_refused_table_leaves_nothing_behind() -> None:
    tables = BlockTables(1, LIMITS)
    good, bad = (1, 2), (1, 64)
    tables.update(plan_of([good]))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"request 0: block ids must be in 0\.\.63"):
            tables.update(plan_of([bad]))
    tables.update(plan_of([good]))
    assert read(tables, plan_of([good])) == [good]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.permutations(range(10)), st.integers(0, 39), st.integers(1, 40), st.booleans()),
        min_size=1,
        max_size=5,
    )
)
def test_slots_and_positions_of_any_slices(cases: list[tuple[list[int], int, int, bool]]) -> None:
    slices = tuple(
        SequenceSlice(str(i), [(start + j) % 30 for j in range(min(count, 40 - start))], start, blocks, sample)
        for i, (blocks, start, count, sample) in enumerate(cases)
    )
    flat = flatten(StepPlan(slices), LIMITS)
    expected = [
        (piece.token_ids[j], position, piece.block_ids[position // 4] * 4 + position % 4)
        for piece in slices
        for j, position in enumerate(range(piece.start, piece.start + len(piece.token_ids)))
    ]
    assert list(zip(flat.token_ids, flat.positions, flat.slots, strict=True)) == expected
    lengths = [len(s.token_ids) for s in slices]
    assert flat.query_start == [sum(lengths[:i]) for i in range(len(slices) + 1)]
    assert flat.rows == [sum(lengths[: i + 1]) - 1 for i, s in enumerate(slices) if s.sample]
    assert not flat.scored
    assert build_batch(StepPlan(slices), LIMITS).slot_mapping.tolist() == flat.slots


GROUPS = RuntimeLimits(num_blocks=64, block_size=4, max_model_len=40, vocab_size=30, windows=(0, 6, 6))


def of_groups(*more: tuple[int, ...], token_ids: tuple[int, ...] = (5, 6)) -> StepPlan:
    """Two tokens at 6 and 7 of "r", behind another request's."""
    other = SequenceSlice("a", [5], 0, (9,), False, more_block_ids=((10,), (11,)))
    return StepPlan((other, SequenceSlice("r", token_ids, 6, (1, 2), True, more_block_ids=more)))


@pytest.mark.parametrize("token_ids", [(5, 6), (5,)])
def test_every_group_has_slots_and_tables_of_its_own(token_ids: tuple[int, ...]) -> None:
    batch = build_batch(of_groups((64, 3), (64, 4), token_ids=token_ids), GROUPS)
    for group, (own, table, first) in enumerate([(9, [1, 2], 2), (10, [64, 3], 3), (11, [64, 4], 4)]):
        found = batch.of_group(group)
        expected = [own * 4, *(first * 4 + offset for offset in (2, 3)[: len(token_ids)])]
        assert found.slot_mapping.tolist() == expected
        assert found.block_tables.tolist() == [[own, -1], table]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (((64, 3),), "expected 3 block tables for 8 tokens"),
        (((64, 3), (64, 4), (64, 5)), "expected 3 block tables for 8 tokens"),
        (((64, 3), (4,)), "expected 3 block tables for 8 tokens"),
        (((64, 3), (4, 64)), "a token has the null block for its own"),
        (((64, 3), (4, 65)), r"block ids must be in 0\.\.63"),
    ],
)
def test_tables_of_groups_that_are_refused(more: tuple[tuple[int, ...], ...], said: str) -> None:
    with pytest.raises(ValueError, match=f"request r: {said}"):
        build_batch(of_groups(*more), GROUPS)


def fed(token_ids: list[int]) -> StepPlan:
    return StepPlan((SequenceSlice("a", [5, 6], 0, (0,), True), SequenceSlice("r", token_ids, 6, (1, 2, 3), True)))


def test_a_token_in_flight_stays_one_where_the_plan_may_feed() -> None:
    flat = flatten(fed([IN_FLIGHT]), LIMITS, may_feed=True)
    assert (flat.token_ids, flat.positions, flat.slots) == ([5, 6, IN_FLIGHT], [0, 1, 6], [0, 1, 10])
    assert build_batch(fed([IN_FLIGHT]), LIMITS, may_feed=True).token_ids.tolist() == flat.token_ids


@pytest.mark.parametrize(
    ("token_ids", "may_feed"), [([IN_FLIGHT], False), ([5, IN_FLIGHT], True), ([IN_FLIGHT, 5], True), ([-2], True)]
)
def test_a_token_in_flight_is_refused_elsewhere(token_ids: list[int], may_feed: bool) -> None:
    for make in (flatten, build_batch):
        with pytest.raises(ValueError, match=r"request r: token ids must be in 0\.\.29"):
            make(fed(token_ids), LIMITS, may_feed=may_feed)
