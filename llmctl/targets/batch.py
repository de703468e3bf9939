"""A StepPlan as flat arrays: the one translation from the engine's plain data that all runtimes share.

Lists and the array module rather than numpy: a decode step has a few dozen numbers, and it finds the processor's caches
full of weights, so that what costs is the code that must be fetched.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from llmctl.engine.step import IN_FLIGHT, RuntimeLimits, SequenceSlice, StepPlan

Ints = NDArray[np.int64]


class PooledRows(NamedTuple):
    """Rows ``start .. end-1`` of a step, whose hidden states a request wants added up."""

    request_id: str
    start: int
    end: int


@dataclass(frozen=True)
class Batch:
    """T tokens of S sequences, packed in plan order.

    Attributes:
        token_ids: i64 [T]; ``IN_FLIGHT`` (-1) only where the plan may feed. positions: i64 [T], index of each token in
            its sequence.
        slot_mapping: i64 [T], KV slot of each token (``block_id * block_size + offset``) in the first KV group; -1 is
            padding.
        query_start_loc: i64 [S + 1], where each sequence's tokens start.
        seq_lens: i64 [S], tokens of the sequence in the KV cache after this step.
        block_tables: i64 [S, max blocks], of the first KV group, rows padded with -1.
        logits_indices: i64 [R], rows whose logits are sampled, in SamplingBatch order.
        block_size: tokens a block.
        pooled: of each slice with ``pool_rows``.
        more: slots and block tables of each further KV group.
    """

    token_ids: Ints
    positions: Ints
    slot_mapping: Ints
    query_start_loc: Ints
    seq_lens: Ints
    block_tables: Ints
    logits_indices: Ints
    block_size: int
    pooled: tuple[PooledRows, ...] = ()
    more: tuple[tuple[Ints, Ints], ...] = ()

    def of_group(self, group: int) -> Batch:
        """The same batch with a KV group's slots and block tables in place of the first's."""
        if not group:
            return self
        slots, tables = self.more[group - 1]
        return replace(self, slot_mapping=slots, block_tables=tables, more=())

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.token_ids)

    @property
    def num_sequences(self) -> int:
        """S."""
        return len(self.seq_lens)

    def context_slots(self, sequence: int, start: int = 0) -> Ints:
        """KV slots of positions ``start .. seq_len-1`` of a sequence, i64."""
        positions = np.arange(start, self.seq_lens[sequence])
        return self.block_tables[sequence, positions // self.block_size] * self.block_size + positions % self.block_size


class FlatPlan(msgspec.Struct, frozen=True):
    """T tokens of S sequences, packed in plan order; see ``Batch``.

    Attributes:
        token_ids, positions, slots: [T]; a token id is ``IN_FLIGHT`` (-1) only where the plan may feed.
        query_start: [S + 1].
        rows: [R], rows whose logits are sampled.
        scored: whether any slice has score targets.
        pooled: of each slice with ``pool_rows``.
    """

    token_ids: list[int]
    positions: list[int]
    slots: list[int]
    query_start: list[int]
    rows: list[int]
    scored: bool
    pooled: list[PooledRows]


def flatten(plan: StepPlan, limits: RuntimeLimits, *, may_feed: bool = False) -> FlatPlan:
    """Flatten a plan. Block ids are checked by whoever reads the tables: ``build_batch``, ``BlockTables``.

    Args:
        may_feed: the runtime can feed a sampled token to the next step: the only token of a slice may be
            ``IN_FLIGHT``, and stays so in ``token_ids``. Otherwise it is an id out of range.

    Raises:
        ValueError: an empty slice, token ids out of range, a block table too short, a sequence too long, or more
            score targets or pooled rows than tokens; the message names the request.
    """
    size = limits.block_size
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    query_start, rows, scored = [0], [], False
    pooled: list[PooledRows] = []
    for piece in plan.slices:
        start, count, blocks = piece.start, len(piece.token_ids), piece.block_ids
        end = start + count
        if piece.score_targets is not None:
            scored = True
            _check_slice(piece, limits, may_feed)
        elif not 0 <= start < end <= min(limits.max_model_len, len(blocks) * size):
            _check_slice(piece, limits, may_feed)
        token_ids += piece.token_ids
        if count == 1:
            positions.append(start)
            slots.append(blocks[start // size] * size + start % size)
        else:
            if may_feed:
                _check_slice(piece, limits, may_feed)
            positions += range(start, end)
            slots += _slots(blocks, start, end, size)
        query_start.append(len(token_ids))
        if piece.sample:
            rows.append(len(token_ids) - 1)
        if piece.pool_rows:
            _check_slice(piece, limits, may_feed)
            pooled.append(PooledRows(piece.request_id, len(token_ids) - piece.pool_rows, len(token_ids)))
    lowest = IN_FLIGHT if may_feed else 0
    if token_ids and not lowest <= min(token_ids) <= max(token_ids) < limits.vocab_size:
        for piece in plan.slices:
            _check_slice(piece, limits, may_feed)
    return FlatPlan(token_ids, positions, slots, query_start, rows, scored, pooled)


def further_slots(plan: StepPlan, limits: RuntimeLimits, first: Sequence[int]) -> list[list[int]]:
    """The slots [T] of every KV group but the first, whose slots ``flatten`` gave.

    Raises:
        ValueError: a table too few or too short, or a token without a block of its own; the message names the request.
    """
    if limits.windows == (0,):
        return []
    size, end = limits.block_size, limits.num_blocks * limits.block_size
    found: list[list[int]] = [[] for _ in limits.windows[1:]]
    for piece in plan.slices:
        start, count, tables = piece.start, len(piece.token_ids), piece.more_block_ids
        if len(tables) != len(found) or min(map(len, tables), default=count + start) * size < start + count:
            raise ValueError(
                f"request {piece.request_id}: expected {len(limits.windows)} block tables for {start + count} tokens"
            )
        index, offset = divmod(start, size)
        for slots, blocks in zip(found, tables, strict=True):
            if count == 1:
                slots.append(blocks[index] * size + offset)
            else:
                slots += _slots(blocks, start, start + count, size)
    for own in (first, *found):
        if own and (highest := max(own)) >= end:
            raise ValueError(f"{_request_at(plan, own.index(highest))}: a token has the null block for its own")
    return found


def _request_at(plan: StepPlan, row: int) -> str:
    """Whose token a row of a step is."""
    names = (f"request {piece.request_id}" for piece in plan.slices for _ in piece.token_ids)
    return next(itertools.islice(names, row, None))


def token_adapters(plan: StepPlan) -> list[int]:
    """Each token's adapter slot, -1 for none; empty: no token has one."""
    if all(piece.adapter < 0 for piece in plan.slices):
        return []
    return [piece.adapter for piece in plan.slices for _ in piece.token_ids]


def _slots(blocks: Sequence[int], start: int, end: int, size: int) -> list[int]:
    """KV slots of positions ``start .. end-1``."""
    slots: list[int] = []
    for index in range(start // size, -(-end // size)):
        first = blocks[index] * size
        slots += range(first + max(start - index * size, 0), first + min(end - index * size, size))
    return slots


class BlockTables:
    """Block tables of one KV group as native code reads them, i32 [sequences, width]; beyond a sequence's blocks
    anything may stand.

    A row is written only when the table of its sequence has changed: tables grow with the context, and a decode step
    changes one in ``block_size`` of them.
    """

    def __init__(self, sequences: int, limits: RuntimeLimits, group: int = 0) -> None:
        self.width = -(-limits.max_model_len // limits.block_size)
        self._limits, self._group = limits, group
        self._table = array("i", bytes(4 * sequences * self.width))
        self._rows: list[Sequence[int] | None] = [None] * sequences

    @property
    def address(self) -> int:
        """Where the table lies, until the next ``update``."""
        return self._table.buffer_info()[0]

    def update(self, plan: StepPlan) -> None:
        """Bring the first rows up to the plan's slices.

        Raises:
            ValueError: a block id out of range; the message names the request.
        """
        while len(plan.slices) > len(self._rows):
            self._table.extend(array("i", bytes(4 * self.width)))
            self._rows.append(None)
        for row, table in enumerate(_tables(plan, self._group)):
            if self._rows[row] is not table:
                self._write(row, plan.slices[row], table)

    def _write(self, row: int, piece: SequenceSlice, table: Sequence[int]) -> None:
        self._rows[row] = None
        check_blocks(piece, self._limits, self._group)
        blocks = array("i", table[: self.width])
        self._table[row * self.width : row * self.width + len(blocks)] = blocks
        if isinstance(table, tuple):  # another kind might change and still be the same object
            self._rows[row] = table


def build_batch(plan: StepPlan, limits: RuntimeLimits, *, may_feed: bool = False) -> Batch:
    """A plan in numpy arrays; ``may_feed`` as in ``flatten``.

    Raises:
        ValueError: as ``flatten``, or block ids out of range.
    """
    for piece in plan.slices:
        for group in range(min(len(piece.tables), len(limits.windows))):  # as many as must be: further_slots says it
            check_blocks(piece, limits, group)
    flat = flatten(plan, limits, may_feed=may_feed)
    slots = further_slots(plan, limits, flat.slots)
    return Batch(
        token_ids=np.array(flat.token_ids, np.int64),
        positions=np.array(flat.positions, np.int64),
        slot_mapping=np.array(flat.slots, np.int64),
        query_start_loc=np.array(flat.query_start, np.int64),
        seq_lens=np.array([s.start + len(s.token_ids) for s in plan.slices], np.int64),
        block_tables=_block_tables(_tables(plan, 0)),
        logits_indices=np.array(flat.rows, np.int64),
        block_size=limits.block_size,
        pooled=tuple(flat.pooled),
        more=tuple(
            (np.array(own, np.int64), _block_tables(_tables(plan, group))) for group, own in enumerate(slots, 1)
        ),
    )


def packed_batch(token_ids: Sequence[Sequence[int]], block_size: int = 16) -> Batch:
    """Whole sequences from position 0, with blocks of their own numbered from 0: one pass over a scratch cache.

    The cache needs ``batch.block_tables.max() + 1`` blocks. Every sequence's last row is in ``logits_indices``.
    """
    slices, used = [], 0
    for i, ids in enumerate(token_ids):
        blocks = -(-len(ids) // block_size)
        slices.append(SequenceSlice(str(i), ids, 0, range(used, used + blocks), sample=True))
        used += blocks
    longest = max((len(ids) for ids in token_ids), default=0)
    vocab = max((max(ids) for ids in token_ids if len(ids)), default=0) + 1
    return build_batch(StepPlan(tuple(slices)), RuntimeLimits(used, block_size, longest, vocab))


def _check_slice(piece: SequenceSlice, limits: RuntimeLimits, may_feed: bool) -> None:
    count, end = len(piece.token_ids), piece.start + len(piece.token_ids)
    who = f"request {piece.request_id}"
    if count == 0 or piece.start < 0:
        raise ValueError(f"{who}: a slice needs at least one token and a start >= 0, found {count} at {piece.start}")
    if end > limits.max_model_len:
        raise ValueError(f"{who}: {end} tokens exceed max_model_len {limits.max_model_len}")
    lowest = IN_FLIGHT if may_feed and count == 1 else 0
    if min(piece.token_ids) < lowest or max(piece.token_ids) >= limits.vocab_size:
        raise ValueError(f"{who}: token ids must be in 0..{limits.vocab_size - 1}")
    if len(piece.block_ids) * limits.block_size < end:
        raise ValueError(f"{who}: {len(piece.block_ids)} blocks of {limits.block_size} cannot hold {end} tokens")
    targets = piece.score_targets or ()
    if len(targets) > count:
        raise ValueError(f"{who}: {len(targets)} score targets for {count} tokens")
    if not 0 <= piece.pool_rows <= count:
        raise ValueError(f"{who}: {piece.pool_rows} rows to pool of {count} tokens")
    if targets and (min(targets) < 0 or max(targets) >= limits.vocab_size):
        raise ValueError(f"{who}: score targets must be in 0..{limits.vocab_size - 1}")


def check_blocks(piece: SequenceSlice, limits: RuntimeLimits, group: int = 0) -> None:
    """Refuse block ids out of range in the table of a KV group, which a window lets have null blocks.

    Raises:
        ValueError: naming the request.
    """
    table = piece.tables[group]
    last = limits.null_block if limits.windows[group] else limits.num_blocks - 1
    if table and not 0 <= min(table) <= max(table) <= last:
        raise ValueError(f"request {piece.request_id}: block ids must be in 0..{limits.num_blocks - 1}")


def _tables(plan: StepPlan, group: int) -> list[Sequence[int]]:
    """The tables of a KV group; those of the first without a tuple of all, which a step has no time for."""
    return [piece.tables[group] for piece in plan.slices] if group else [piece.block_ids for piece in plan.slices]


def _block_tables(given: Sequence[Sequence[int]]) -> Ints:
    tables = np.full((len(given), max(map(len, given), default=0)), -1, dtype=np.int64)
    for row, blocks in zip(tables, given, strict=True):
        row[: len(blocks)] = blocks
    return tables
