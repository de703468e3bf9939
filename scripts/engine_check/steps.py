"""Steps made by hand for a runtime: sequences over shuffled KV blocks, sampled greedily or with a seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llmctl.engine.step import SamplingBatch, SequenceSlice, StepPlan


def greedy(rows: int) -> SamplingBatch:
    """Greedy sampling of so many rows."""
    return SamplingBatch(np.zeros(rows, np.float32), np.zeros(rows, np.uint64), np.zeros(rows, np.int64))


def seeded(positions: Sequence[int], temperature: float = 1.0) -> SamplingBatch:
    """Sampling at a temperature, row i by seed 100 + i for the token at ``positions[i]``."""
    rows = len(positions)
    return SamplingBatch(
        np.full(rows, temperature, np.float32),
        np.arange(100, 100 + rows, dtype=np.uint64),
        np.asarray(positions, np.int64),
    )


class Sequences:
    """Token sequences with a block table each, and how far they are computed.

    Args:
        texts: the tokens of each. blocks: KV blocks of the runtime, enough for all texts.
    """

    def __init__(self, texts: Sequence[Sequence[int]], blocks: int, block_size: int, seed: int = 0):
        needed = [-(-len(text) // block_size) for text in texts]
        if sum(needed) > blocks:
            raise ValueError(f"{len(texts)} sequences need {sum(needed)} blocks of {blocks}")
        order = np.random.default_rng(seed).permutation(blocks).tolist()
        self.texts = [list(text) for text in texts]
        self.tables = [tuple(order.pop() for _ in range(count)) for count in needed]
        self.done = [0] * len(texts)

    def plan(self, counts: Sequence[int]) -> tuple[StepPlan, list[int]]:
        """The next ``counts[i]`` tokens of every sequence (0: it sits out), all sampled; and who is in the step."""
        slices, members = [], []
        for i, count in enumerate(counts):
            if count:
                start = self.done[i]
                tokens = self.texts[i][start : start + count]
                if len(tokens) != count:
                    raise ValueError(f"sequence {i} has {len(self.texts[i]) - start} tokens left, {count} wanted")
                slices.append(SequenceSlice(str(i), tokens, start, self.tables[i], True))
                members.append(i)
                self.done[i] = start + count
        return StepPlan(tuple(slices)), members

    def left(self, i: int) -> int:
        """Tokens of a sequence that are not computed."""
        return len(self.texts[i]) - self.done[i]


def prompt(tokens: int, vocab: int, seed: int = 0) -> list[int]:
    """Random token ids."""
    return [int(i) for i in np.random.default_rng(seed).integers(0, vocab, tokens)]


def one_slice(text: Sequence[int], block_size: int, request: str = "a", first_block: int = 0) -> StepPlan:
    """A whole prompt in one step, over blocks in a row."""
    blocks = tuple(range(first_block, first_block - (-len(text) // block_size)))
    return StepPlan((SequenceSlice(request, list(text), 0, blocks, True),))
