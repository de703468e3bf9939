"""What is staged for a step: every array, padding included, at its place on the device, whatever was there before."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runtime_stepping import greedy

from llmctl.engine.step import RuntimeLimits, SequenceSlice, StepPlan
from llmctl.targets.batch import flatten, further_slots
from llmctl.targets.cuda import buckets
from llmctl.targets.cuda.buckets import context_width, padded, sequence_buckets
from llmctl.targets.cuda.inputs import InputArena, Staging, StepShape

LIMITS = RuntimeLimits(num_blocks=9, block_size=4, max_model_len=24, vocab_size=50)
GROUPS = replace(LIMITS, windows=(0, 7, 5))
TOKENS, SEQUENCES, WIDTH = 16, 4, 6


def _staging(arena: InputArena) -> Staging:
    """One full of what earlier steps left."""
    tables = torch.full((arena.tables.numel(),), 77, dtype=torch.int32)
    return Staging(arena, torch.full((arena.size,), 0x55, dtype=torch.uint8), tables)


def _further(rng: np.random.Generator, length: int, start: int) -> tuple[int, ...]:
    """A table of another KV group, which has let go of blocks before ``start``."""
    gone = int(rng.integers(0, start + 1))
    return (GROUPS.null_block,) * gone + tuple(rng.integers(0, 9, length - gone).tolist())


def _plan(rng: np.random.Generator, tables: list[Any], further: int = 0) -> StepPlan:
    """Up to four slices; each has one of the tables, and so many of further KV groups."""
    slices, left = [], TOKENS
    for i in range(int(rng.integers(1, SEQUENCES + 1))):
        table = tables[int(rng.integers(len(tables)))]
        count = int(rng.integers(1, min(4, left - SEQUENCES + i) + 1)) if rng.random() < 0.5 else 1
        start = int(rng.integers(0, len(table) * LIMITS.block_size - count + 1))
        left -= count
        ids = rng.integers(0, 50, count).tolist()
        more = tuple(_further(rng, len(table), start // LIMITS.block_size) for _ in range(further))
        slices.append(SequenceSlice(str(i), ids, start, table, bool(rng.random() < 0.7), more_block_ids=more))
    return StepPlan(tuple(slices))


def _shape(plan: StepPlan, rng: np.random.Generator) -> StepShape:
    tokens = sum(len(piece.token_ids) for piece in plan.slices)
    longest = max(piece.start + len(piece.token_ids) for piece in plan.slices)
    width = int(rng.integers(-(-longest // LIMITS.block_size), WIDTH + 1))
    seats = int(rng.integers(len(plan.slices), SEQUENCES + 1))
    return StepShape(int(rng.integers(tokens, TOKENS + 1)), seats, width, True, True)


def _filled(values: Any, size: int, padding: int) -> list[int]:
    return [*values, *[padding] * (size - len(values))]


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([LIMITS, GROUPS]))
def test_arrays_of_tokens_and_sequences(seed: int, limits: RuntimeLimits) -> None:
    """Padding is token 0 at position 0, stores nothing, and belongs to sequences of no rows and no context."""
    rng = np.random.default_rng(seed)
    arena = InputArena(TOKENS, SEQUENCES, limits, "cpu")
    staging = _staging(arena)
    tables = [tuple(rng.integers(0, 9, rng.integers(1, 7)).tolist()) for _ in range(4)]
    tables += [list(tables[0])]
    for _ in range(4):
        plan = _plan(rng, tables, len(limits.windows) - 1)
        tables[-1] = list(tables[int(rng.integers(4))])
        shape, flat = _shape(plan, rng), flatten(plan, limits)
        further = further_slots(plan, limits, flat.slots)
        count, seats = len(flat.token_ids), shape.sequences
        source = {0: 3} if len(plan.slices[0].token_ids) == 1 else {}
        adapters = rng.integers(-1, 3, count).tolist() if rng.random() < 0.5 else []
        staging.block_tables(shape, plan)
        staging.tokens(shape, flat, further, source, adapters)
        staging.send(shape)
        found = {name: view.tolist() for name, view in arena.views(shape).items()}
        expected = {
            "ids": _filled([0] * len(source) + flat.token_ids[len(source) :], shape.tokens, 0),
            "positions": _filled(flat.positions, shape.tokens, 0),
            "slots": [_filled(own, shape.tokens, -1) for own in (flat.slots, *further)],
            "source": _filled([3] * len(source), shape.tokens, -1),
            "adapters": _filled(adapters, shape.tokens, -1),
            "seq_lens": _filled([p.start + len(p.token_ids) for p in plan.slices], seats, 0),
            "query_start": _filled(flat.query_start, seats + 1, count),
        }
        rows = found.pop("block_tables")
        assert found == expected
        for groups, piece in zip(rows, plan.slices, strict=False):
            used = min(shape.width, len(piece.block_ids))
            assert [row[:used] for row in groups] == [list(table[:used]) for table in piece.tables]


def test_a_list_that_grows_is_read_again() -> None:
    """A tuple stands for itself; another kind of table may change."""
    arena = InputArena(TOKENS, SEQUENCES, LIMITS, "cpu")
    staging, shape, blocks = _staging(arena), StepShape(1, 1, WIDTH, False, True), [3]
    for expected in ([3], [3, 5]):
        staging.block_tables(shape, StepPlan((SequenceSlice("a", [1], 0, blocks, True),)))
        staging.send(shape)
        assert arena.views(shape)["block_tables"][0, 0, : len(expected)].tolist() == expected
        blocks.append(5)


@pytest.mark.parametrize("between", [(1, 99), [5, 6]], ids=["refused", "a list"])
def test_a_table_that_comes_back_is_written_again(between: Any) -> None:
    arena = InputArena(TOKENS, SEQUENCES, LIMITS, "cpu")
    staging, shape = _staging(arena), StepShape(1, 1, WIDTH, False, True)
    good = (1, 2)
    for table in (good, between, good):
        plan = StepPlan((SequenceSlice("a", [1], 0, table, True),))
        if max(table) > 8:
            with pytest.raises(ValueError, match=r"request a: block ids must be in 0\.\.8"):
                staging.block_tables(shape, plan)
        else:
            staging.block_tables(shape, plan)
    staging.send(shape)
    assert arena.views(shape)["block_tables"][0, 0, :2].tolist() == [1, 2]


def test_tables_are_sent_when_they_change() -> None:
    """And what was staged and never sent, because the step was refused, is sent with the next."""
    arena = InputArena(TOKENS, SEQUENCES, LIMITS, "cpu")
    stagings, shape = [_staging(arena) for _ in range(2)], StepShape(2, 2, WIDTH, False, True)
    first, second, third = (1, 2), (3,), (4, 5)

    def step(turn: int, *tables: tuple[int, ...], sent: bool = True) -> list[list[int]]:
        slices = tuple(SequenceSlice(str(i), [1], 0, table, True) for i, table in enumerate(tables))
        arena.tables.fill_(-5)
        stagings[turn].block_tables(shape, StepPlan(slices))
        if sent:
            stagings[turn].send(shape)
        rows = arena.views(shape)["block_tables"][:, 0].tolist()
        return [row[: len(table)] for row, table in zip(rows, tables, strict=False)]

    nothing = [[-5, -5], [-5]]
    assert step(0, first, second) == [[1, 2], [3]]
    assert step(1, first, second) == nothing  # are there already
    assert step(0, first) == nothing[:1]
    assert step(1, second, first) == [[3], [1, 2]]
    assert step(0, third, first, sent=False) == [[-5, -5]] * 2
    assert step(1, second, first) == [[-5], [-5, -5]]  # what is there is still that
    assert step(0, third, first, sent=False) == [[-5, -5]] * 2
    assert step(0, third, first) == [[4, 5], [1, 2]]


def test_rows_that_ask_for_nothing_fill_up() -> None:
    arena = InputArena(TOKENS, SEQUENCES, LIMITS, "cpu")
    staging, shape = _staging(arena), StepShape(4, 4, WIDTH, True, True)
    plan = StepPlan(tuple(SequenceSlice(name, [1, 2], 0, (i,), True) for i, name in enumerate("ab")))
    staging.rows(flatten(plan, LIMITS), greedy(2), 4)
    staging.send(shape)
    found = {name: arena.row_view(name, 4).tolist() for name in arena.row_regions}
    assert found == {
        "rows": [1, 3, 0, 0], "seeds": [0] * 4, "sample_positions": [0] * 4, "temperature": [0] * 4, "top_p": [1] * 4,
        "min_p": [0] * 4, "top_k": [0] * 4,
    }  # fmt: skip
    assert staging.sent_rows(4).tolist() == [1, 3, 0, 0]


@given(st.integers(1, 40), st.integers(1, 9), st.sampled_from([LIMITS, GROUPS]))
def test_arrays_lie_apart_and_aligned(tokens: int, sequences: int, limits: RuntimeLimits) -> None:
    """Of any shape, in the same memory; those of sampled rows where they are in every step."""
    arena = InputArena(40, 9, limits, "cpu")
    regions = [*arena.row_regions.values(), *arena.step_regions(tokens, sequences).values()]
    assert all(region.start % 16 == 0 for region in regions)
    ordered = sorted(regions, key=lambda region: region.start)
    assert all(a.stop <= b.start for a, b in pairwise(ordered))
    assert ordered[-1].stop == arena.step_bytes(StepShape(tokens, sequences, 1, True, True)) <= arena.size


# -- buckets -------------------------------------------------------------------------------------------------------


@given(st.integers(1, 600), st.data())
def test_sequence_buckets_hold_every_number(most: int, data: st.DataObject) -> None:
    sizes = sequence_buckets(most)
    assert list(sizes) == sorted(set(sizes))
    assert sizes[-1] == most
    count = data.draw(st.integers(1, most))
    assert count <= padded(count, sizes) <= max(2 * count, 1)


@given(st.integers(1, 10**6))
def test_padding_of_tokens_wastes_little(count: int) -> None:
    assert 0 <= padded(count) - count < max(8, count / 16 + 1)
    assert padded(padded(count)) == padded(count)


def test_few_numbers_of_tokens() -> None:
    assert len({padded(n) for n in range(1, 2049)}) == 80


def test_widths_grow_fourfold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "GRAPH_CONTEXT", 64)
    limits = RuntimeLimits(100, 16, 500, 10)
    found = [context_width(n, limits) for n in (1, 64, 65, 128, 129, 257, 500)]
    assert found == [4, 4, 16, 16, 16, 32, 32]  # 500 tokens need no more than 32 blocks
