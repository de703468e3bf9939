"""Sampling on the device: a step's logits to token ids, and to the log-probabilities that were asked for.

The rules are SamplingBatch's; kernels sampling.cu and logits.cu. Logits never leave the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmctl.engine.step import SamplingBatch, TokenLogprobs, TokenScores
from llmctl.graph.dtypes import BY_TORCH
from llmctl.targets.cuda.call import Machine
from llmctl.targets.cuda.inputs import InputArena
from llmctl.targets.cuda.program import Program, Recorder
from llmctl.targets.cuda.queue import Queue
from llmctl.targets.cuda.signatures import launch
from llmctl.targets.reference.logprobs import top_ids


@dataclass(frozen=True)
class Sampled:
    """What is on its way to the host: token ids i32 [R], and what was asked of them, a count a row (-1: nothing)."""

    tokens: Tensor
    counts: NDArray[np.int32] | None = None
    logprobs: Described | None = None

    def result(self) -> tuple[NDArray[np.int32], Sequence[TokenLogprobs | None] | None]:
        """Once the step's end is passed."""
        tokens = self.tokens.numpy().copy()
        if self.counts is None or self.logprobs is None:
            return tokens, None
        return tokens, self.logprobs.result().entries(self.counts.tolist())


@dataclass(frozen=True)
class Described:
    """``TokenScores`` on their way to the host."""

    columns: tuple[Tensor, ...]

    def result(self) -> TokenScores:
        """Once the step's end is passed."""
        return TokenScores(*(column.numpy() for column in self.columns))


class DeviceSampler:
    """Samples the rows of every step.

    Attributes:
        tokens: i32 [most rows], what the last step sampled, by row; a step's program may read it.
    """

    def __init__(self, queue: Queue, arena: InputArena, rows: int, vocab: int) -> None:
        """``rows``: of the largest step."""
        self._queue, self._arena, self._vocab = queue, arena, vocab
        self.tokens = torch.zeros(rows, dtype=torch.int32, device=queue.device)
        self._wide = torch.empty(rows * vocab, dtype=torch.float32, device=queue.device)
        self._own = torch.zeros(rows, dtype=torch.float32, device=queue.device)
        self._ranks = torch.zeros(rows, dtype=torch.int32, device=queue.device)
        self._plain: dict[int, Program] = {}

    def start(self, batch: SamplingBatch, logits: Tensor, to: Tensor) -> Sampled:
        """Sample one token a row, with the parameters that ``Staging.rows`` has sent.

        Args:
            logits: [padded rows, vocab], half precision or f32; not changed.
            to: i32 [R or more], page-locked, where the tokens go; nobody else's until the step's end is passed.
        """
        rows = len(batch.temperature)
        if not _adjusts(batch) and not batch.masked:
            self._sample_plain(logits)
        else:
            self._sample_adjusted(batch, logits, rows)
        counts, logprobs = batch.num_logprobs, None
        if counts is not None and (counts >= 0).any():
            logprobs = self.describe(logits, self.tokens[:rows], int(counts.max()))
        return Sampled(to[:rows].copy_(self.tokens[:rows], non_blocking=True), counts, logprobs)

    def describe(self, logits: Tensor, tokens: Tensor, top: int) -> Described:
        """What the raw distribution of each row says of its token.

        Args:
            logits: [n or more, vocab], half precision or f32. tokens: i32 [n]. top: how many of the most likely tokens
                are wanted.
        """
        n = len(tokens)
        wide, own, ranks = self._widened(logits, n), self._own[:n], self._ranks[:n]
        launch(self._queue.machine, "logprobs", logits=wide, tokens=tokens, logprob=own, rank=ranks)
        ids = top_ids(wide, top)
        # What log-softmax takes off a logit is the same for all tokens of a row. A token that is among the most likely
        # ones must have the very same log-probability there: clients compare the two.
        top_logprobs = own[:, None] + (wide.gather(1, ids) - wide.gather(1, tokens[:, None].long()))
        return Described(tuple(self._queue.download(t) for t in (own, ranks, ids.int(), top_logprobs)))

    def _sample_plain(self, logits: Tensor) -> None:
        padded = len(logits)
        if padded not in self._plain:
            recorder = Recorder(self._queue.machine)
            self._sample(recorder, logits, padded, None)
            self._plain[padded] = recorder.program()
        self._plain[padded]()

    def _sample_adjusted(self, batch: SamplingBatch, logits: Tensor, rows: int) -> None:
        machine, upload = self._queue.machine, self._queue.upload
        adjusted = logits[:rows]
        if _adjusts(batch):
            adjusted = self._widened(logits, rows)
        if batch.bias_rows is not None and batch.bias_ids is not None and batch.bias_values is not None:
            launch(machine, "add_bias", logits=adjusted, bias_rows=upload(batch.bias_rows),
                   bias_ids=upload(batch.bias_ids), bias_values=upload(batch.bias_values))  # fmt: skip
        if _penalises(batch):
            self._penalise(batch, adjusted, rows)
        mask = batch.mask()  # the model's kernels run meanwhile
        allowed = None if mask is None else upload(mask.view(np.int32))
        self._sample(machine, adjusted, rows, allowed)

    def _sample(self, machine: Machine, logits: Tensor, rows: int, allowed: Tensor | None) -> None:
        row = self._arena.row_view
        launch(
            machine, f"sample_{BY_TORCH[str(logits.dtype).removeprefix('torch.')].tag}", logits=logits, allowed=allowed,
            temperature=row("temperature", rows), top_k=row("top_k", rows), top_p=row("top_p", rows),
            min_p=row("min_p", rows), seeds=row("seeds", rows), positions=row("sample_positions", rows),
            tokens=self.tokens[:rows],
        )  # fmt: skip

    def _penalise(self, batch: SamplingBatch, logits: Tensor, rows: int) -> None:
        starts, ids, counts = _histories(batch, rows)
        upload = self._queue.upload

        def column(values: NDArray[np.float32] | None, off: float) -> Tensor:
            return upload(np.full(rows, off, np.float32) if values is None else values.astype(np.float32))

        launch(
            self._queue.machine, "penalise", logits=logits, starts=upload(starts), ids=upload(ids),
            counts=upload(counts), repetition=column(batch.repetition_penalty, 1),
            presence=column(batch.presence_penalty, 0), frequency=column(batch.frequency_penalty, 0),
        )  # fmt: skip

    def _widened(self, logits: Tensor, rows: int) -> Tensor:
        wide = self._wide[: rows * self._vocab].view(rows, self._vocab)
        return wide.copy_(logits[:rows])


def _penalises(batch: SamplingBatch) -> bool:
    penalties = (batch.repetition_penalty, batch.presence_penalty, batch.frequency_penalty)
    return any(penalty is not None for penalty in penalties)


def _adjusts(batch: SamplingBatch) -> bool:
    """Whether some row's logits are changed before sampling."""
    return _penalises(batch) or batch.bias_rows is not None


def _histories(batch: SamplingBatch, rows: int) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """(starts [R + 1], ids [n], counts [n]): each row's distinct tokens, and how often its output has them."""
    empty = np.zeros(0, np.int32)
    starts, ids, counts = [0], [empty], [empty]
    for row in range(rows):
        output = empty if batch.output_ids is None else batch.output_ids[row]
        prompt = empty if batch.prompt_ids is None else batch.prompt_ids[row]
        seen, times = np.unique(output, return_counts=True)
        others = np.setdiff1d(prompt, seen)
        ids += [seen.astype(np.int32), others.astype(np.int32)]
        counts += [times.astype(np.int32), np.zeros(len(others), np.int32)]
        starts.append(starts[-1] + len(seen) + len(others))
    return np.array(starts, np.int32), np.concatenate(ids), np.concatenate(counts)
