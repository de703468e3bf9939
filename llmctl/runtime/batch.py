"""A StepPlan as flat numpy arrays: the one translation from the engine's plain data that all runtimes share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmctl.engine.step import RuntimeLimits, SequenceSlice, StepPlan

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """T tokens of S sequences, packed in plan order.

    Attributes:
        token_ids: i64 [T]. positions: i64 [T], index of each token in its sequence.
        slot_mapping: i64 [T], KV slot of each token (``block_id * block_size + offset``); -1 is padding.
        query_start_loc: i64 [S + 1], where each sequence's tokens start.
        seq_lens: i64 [S], tokens of the sequence in the KV cache after this step.
        block_tables: i64 [S, max blocks], rows padded with -1.
        logits_indices: i64 [R], rows whose logits are sampled, in SamplingBatch order.
        block_size: tokens a block.
    """

    token_ids: Ints
    positions: Ints
    slot_mapping: Ints
    query_start_loc: Ints
    seq_lens: Ints
    block_tables: Ints
    logits_indices: Ints
    block_size: int

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


def build_batch(plan: StepPlan, limits: RuntimeLimits) -> Batch:
    """Flatten a plan.

    Raises:
        ValueError: an empty slice, token or block ids out of range, a block table too short, a sequence too long, or
            more score targets than tokens; the message names the request.
    """
    for piece in plan.slices:
        _check_slice(piece, limits)
    counts = np.array([len(s.token_ids) for s in plan.slices], dtype=np.int64)
    starts = np.array([s.start for s in plan.slices], dtype=np.int64)
    query_start = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    owner = np.repeat(np.arange(len(counts)), counts)
    positions = np.arange(query_start[-1]) - query_start[:-1][owner] + starts[owner]
    tables = _block_tables(plan.slices)
    blocks = tables[owner, positions // limits.block_size]
    sampled = np.array([s.sample for s in plan.slices], dtype=bool)
    return Batch(
        token_ids=_concatenate([s.token_ids for s in plan.slices]),
        positions=positions,
        slot_mapping=blocks * limits.block_size + positions % limits.block_size,
        query_start_loc=query_start,
        seq_lens=starts + counts,
        block_tables=tables,
        logits_indices=query_start[1:][sampled] - 1,
        block_size=limits.block_size,
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


def _check_slice(piece: SequenceSlice, limits: RuntimeLimits) -> None:
    count, end = len(piece.token_ids), piece.start + len(piece.token_ids)
    who = f"request {piece.request_id}"
    if count == 0 or piece.start < 0:
        raise ValueError(f"{who}: a slice needs at least one token and a start >= 0, found {count} at {piece.start}")
    if end > limits.max_model_len:
        raise ValueError(f"{who}: {end} tokens exceed max_model_len {limits.max_model_len}")
    if min(piece.token_ids) < 0 or max(piece.token_ids) >= limits.vocab_size:
        raise ValueError(f"{who}: token ids must be in 0..{limits.vocab_size - 1}")
    if len(piece.block_ids) * limits.block_size < end:
        raise ValueError(f"{who}: {len(piece.block_ids)} blocks of {limits.block_size} cannot hold {end} tokens")
    if min(piece.block_ids) < 0 or max(piece.block_ids) >= limits.num_blocks:
        raise ValueError(f"{who}: block ids must be in 0..{limits.num_blocks - 1}")
    targets = piece.score_targets or ()
    if len(targets) > count:
        raise ValueError(f"{who}: {len(targets)} score targets for {count} tokens")
    if targets and (min(targets) < 0 or max(targets) >= limits.vocab_size):
        raise ValueError(f"{who}: score targets must be in 0..{limits.vocab_size - 1}")


def _block_tables(slices: Sequence[SequenceSlice]) -> Ints:
    widest = max((len(s.block_ids) for s in slices), default=0)
    tables = np.full((len(slices), widest), -1, dtype=np.int64)
    for row, piece in zip(tables, slices, strict=True):
        row[: len(piece.block_ids)] = piece.block_ids
    return tables


def _concatenate(token_ids: Sequence[Sequence[int]]) -> Ints:
    return (
        np.concatenate([np.asarray(ids, dtype=np.int64) for ids in token_ids]) if token_ids else np.zeros(0, np.int64)
    )
