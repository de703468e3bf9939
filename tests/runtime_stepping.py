"""Drives a ReferenceRuntime by hand: sequences in pieces of chosen sizes over shuffled KV blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from llmctl.engine.step import SamplingBatch, SequenceSlice, StepPlan
from llmctl.targets.reference.runtime import ReferenceRuntime

# (step, sequence, tokens left) -> tokens of that sequence in that step; 0 leaves it out.
Pieces = Callable[[int, int, int], int]


def greedy(rows: int) -> SamplingBatch:
    """Greedy sampling of some rows."""
    return SamplingBatch(np.zeros(rows, np.float32), np.zeros(rows, np.uint64), np.zeros(rows, np.int64))


def shuffled_blocks(runtime: ReferenceRuntime, lengths: Sequence[int], rng: np.random.Generator) -> list[list[int]]:
    """A block table for every length, from a random permutation of all the runtime's blocks."""
    order = rng.permutation(runtime.limits.num_blocks).tolist()
    return [[order.pop() for _ in range(-(-n // runtime.limits.block_size))] for n in lengths]


def poison(runtime: ReferenceRuntime) -> None:
    """Fill the KV cache with NaN, so that a read of anything not written shows."""
    for cache in runtime.cache.values():
        cache.fill_(torch.nan)


def paged_logits(
    runtime: ReferenceRuntime, sequences: Sequence[Sequence[int]], pieces: Pieces, seed: int = 0
) -> list[torch.Tensor]:
    """Logits f32 [len, vocab] of every sequence, computed in ``pieces``."""
    rng = np.random.default_rng(seed)
    poison(runtime)
    tables = shuffled_blocks(runtime, [len(s) for s in sequences], rng)
    done = [0] * len(sequences)
    found: list[list[torch.Tensor]] = [[] for _ in sequences]
    step = 0
    while any(d < len(s) for d, s in zip(done, sequences, strict=True)):
        plan, owners = [], []
        for i in rng.permutation(len(sequences)).tolist():
            take = min(pieces(step, i, len(sequences[i]) - done[i]), len(sequences[i]) - done[i])
            if take:
                plan.append(SequenceSlice(str(i), sequences[i][done[i] : done[i] + take], done[i], tables[i], True))
                owners.append((i, take))
        step += 1
        if not plan:
            continue
        rows = runtime.logits(StepPlan(tuple(plan)), all_rows=True).split([take for _, take in owners])
        for (i, take), logits in zip(owners, rows, strict=True):
            found[i].append(logits)
            done[i] += take
    return [torch.cat(parts) for parts in found]
