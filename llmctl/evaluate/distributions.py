"""The next-token distributions of a model over windows of text, some rows at a time, whatever runs it.

Distributions are an iterable of f32 tensors ``[rows, vocab]`` of log-probabilities, one tensor for each of ``pieces``
of the windows, in order. Two models over the same windows can be walked side by side, a piece in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from llmctl.checkpoint.assemble import checkpoint_graph
from llmctl.checkpoint.reader import Checkpoint
from llmctl.engine.step import Runtime, SamplingBatch, SequenceSlice, StepPlan
from llmctl.errors import UsageError
from llmctl.graph.passes import apply_passes
from llmctl.targets.reference.layerwise import LayerwisePass

Window = tuple[Sequence[int], int]
"""Token ids, and how many of the last of them are scored."""
OnProgress = Callable[[int, int], None]

ROWS = 64
"""Rows of a piece: 64 of 150k tokens are 40 MB."""


def pieces(windows: Sequence[Window]) -> Iterator[tuple[int, range]]:
    """(window, positions of scored tokens in it), at most ``ROWS`` of one window at a time, in text order."""
    for index, (tokens, scored) in enumerate(windows):
        for start in range(len(tokens) - scored, len(tokens), ROWS):
            yield index, range(start, min(start + ROWS, len(tokens)))


def targets_of(window: Window, positions: range) -> Tensor:
    """The tokens at those positions, i64."""
    return torch.tensor(window[0][positions.start : positions.stop], dtype=torch.int64)


class CheckpointDistributions:
    """Of a checkpoint in f32: all windows go through one decoder layer after another, then the head by pieces.

    One layer's weights are in memory at a time, beside the windows' activations, the embeddings and the head.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        windows: Sequence[Window],
        on_progress: OnProgress | None = None,
        *,
        passes: Sequence[str] = (),
    ) -> None:
        """Run the layers.

        Args:
            on_progress: told how many are done.
            passes: of the graph, those that change what is computed (``int8_activations``).

        Raises:
            CheckpointError: as ``checkpoint_graph`` and ``assemble``.
            UsageError: tokens that the model does not have.
        """
        graph = apply_passes(checkpoint_graph(checkpoint), passes)
        _check_tokens(windows, graph.vocab_size)
        self._windows = windows
        self._pass = LayerwisePass(graph, checkpoint, [tokens for tokens, _ in windows])
        hidden = self._pass.enter()
        self._pass.forget(-1)
        for layer in range(graph.num_layers):
            hidden = self._pass.run(layer, hidden)
            self._pass.forget(layer)
            if on_progress is not None:
                on_progress(layer + 1, graph.num_layers)
            checkpoint.release()
        rows = _scored_rows(windows)
        self._hidden = {name: value[rows] for name, value in hidden.items()}

    def __iter__(self) -> Iterator[Tensor]:
        at = 0
        for _, positions in pieces(self._windows):
            rows = slice(at, at := at + len(positions))
            yield self._pass.logits({name: value[rows] for name, value in self._hidden.items()}).log_softmax(dim=-1)


class RuntimeDistributions:
    """Of whatever a runtime executes, in its own arithmetic: every token's log-probability is asked for."""

    def __init__(self, runtime: Runtime, windows: Sequence[Window]) -> None:
        """Windows are at most the runtime's ``max_model_len`` long; its steps take ``ROWS`` tokens at least.

        Raises:
            UsageError: tokens that the model does not have.
        """
        _check_tokens(windows, runtime.limits.vocab_size)
        self._runtime, self._windows = runtime, windows

    def __iter__(self) -> Iterator[Tensor]:
        for index, positions in pieces(self._windows):
            tokens, scored = self._windows[index]
            if positions.start == len(tokens) - scored:
                self._read(tokens, positions.start - 1)
            yield self._log_probs(tokens, positions)

    def _read(self, tokens: Sequence[int], count: int) -> None:
        """Put the context of a window's first scored token in the KV cache, but for the token before it."""
        for start in range(0, count, ROWS):
            piece = tokens[start : min(start + ROWS, count)]
            self._runtime.execute(self._plan(tokens, piece, start), _NOTHING_SAMPLED).result()

    def _log_probs(self, tokens: Sequence[int], positions: range) -> Tensor:
        targets = tokens[positions.start : positions.stop]
        fed = tokens[positions.start - 1 : positions.stop - 1]
        plan = self._plan(tokens, fed, positions.start - 1, targets)
        scores = self._runtime.execute(plan, _NOTHING_SAMPLED).result().scores["window"]
        found = torch.empty(len(targets), self._runtime.limits.vocab_size)
        return found.scatter_(
            1, torch.from_numpy(scores.top_ids.astype(np.int64)), torch.from_numpy(scores.top_logprobs)
        )

    def _plan(
        self, tokens: Sequence[int], fed: Sequence[int], start: int, targets: Sequence[int] | None = None
    ) -> StepPlan:
        limits = self._runtime.limits
        blocks = tuple(range(-(-len(tokens) // limits.block_size)))
        top = 0 if targets is None else limits.vocab_size
        return StepPlan((SequenceSlice("window", fed, start, blocks, False, score_targets=targets, score_top=top),))


_NOTHING_SAMPLED = SamplingBatch(np.zeros(0, np.float32), np.zeros(0, np.uint64), np.zeros(0, np.int64))


def _check_tokens(windows: Sequence[Window], vocab_size: int) -> None:
    largest = max((max(tokens) for tokens, _ in windows), default=0)
    if largest >= vocab_size:
        raise UsageError(f"the tokenizer gives id {largest}, the model has {vocab_size}")


def _scored_rows(windows: Sequence[Window]) -> Tensor:
    """Rows, of all windows' tokens one after another, that the scored tokens are predicted in."""
    starts = accumulate((len(tokens) for tokens, _ in windows), initial=0)
    rows = [
        start + position - 1
        for start, (tokens, scored) in zip(starts, windows, strict=False)
        for position in range(len(tokens) - scored, len(tokens))
    ]
    return torch.tensor(rows, dtype=torch.int64)
