"""A SamplingBatch as the native sampler's struct, and its results back."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmctl.engine.step import SamplingBatch, TokenLogprobs, TokenScores
from llmctl.targets.cpu.abi import LogprobsOut, SamplingDesc

_FIELDS = {
    "temperature": np.float32,
    "seeds": np.uint64,
    "positions": np.int64,
    "top_k": np.int32,
    "top_p": np.float32,
    "min_p": np.float32,
    "repetition_penalty": np.float32,
    "presence_penalty": np.float32,
    "frequency_penalty": np.float32,
    "allowed_mask": np.uint32,
    "num_logprobs": np.int32,
}
_HISTORY = ("prompt_ids", "prompt_offsets", "output_ids", "output_offsets")
_BIAS = ("bias_ids", "bias_values", "bias_offsets")


class NativeSampling:
    """The native sampler's struct, kept from step to step: an array that comes again is not converted again."""

    def __init__(self, vocab: int) -> None:
        self._vocab = vocab
        self._desc = SamplingDesc()
        self._given: dict[str, NDArray[Any] | None] = dict.fromkeys(_FIELDS)
        self._keep: dict[str, NDArray[Any]] = {}
        self._token_ids = array("i")
        self._logprobs = TokenScores.zeros(0)

    def prepare(self, batch: SamplingBatch) -> SamplingDesc:
        """The struct for one step's batch, valid until the next call."""
        desc = self._desc
        for name, dtype in _FIELDS.items():
            value = batch.mask() if name == "allowed_mask" else getattr(batch, name)
            if value is not self._given[name]:
                self._given[name] = value
                self._point(name, None if value is None else np.ascontiguousarray(value, dtype))
        self._penalties(batch)
        self._bias(batch)
        desc.rows = len(batch.temperature)
        self._token_ids = array("i", bytes(4 * desc.rows))
        desc.token_ids = self._token_ids.buffer_info()[0]
        if batch.num_logprobs is not None:
            self._logprobs = TokenScores.zeros(desc.rows, min(int(batch.num_logprobs.max(initial=0)), self._vocab))
            desc.out = logprobs_out(self._logprobs)
        return desc

    def results(self) -> tuple[NDArray[np.int32], Sequence[TokenLogprobs | None] | None]:
        """Token ids of the step last prepared, and log-probabilities per row (None when no row asks)."""
        token_ids = np.frombuffer(self._token_ids, np.int32)
        counts = self._given["num_logprobs"]
        if counts is None or not (counts >= 0).any():
            return token_ids, None
        return token_ids, self._logprobs.entries(counts.tolist())

    def _point(self, name: str, values: NDArray[Any] | None) -> None:
        if values is None:
            self._keep.pop(name, None)
            setattr(self._desc, name, None)
        else:
            self._keep[name] = values
            setattr(self._desc, name, values.ctypes.data)

    def _penalties(self, batch: SamplingBatch) -> None:
        penalties = (batch.repetition_penalty, batch.presence_penalty, batch.frequency_penalty)
        if all(p is None for p in penalties):
            self._clear(_HISTORY)
            return
        for name, rows in (("prompt", batch.prompt_ids), ("output", batch.output_ids)):
            parts = rows if rows is not None else (np.zeros(0, np.int32),) * len(batch.temperature)
            self._point(f"{name}_ids", np.concatenate([*parts, np.zeros(1, np.int32)]).astype(np.int32))
            self._point(f"{name}_offsets", _offsets([len(p) for p in parts]))

    def _bias(self, batch: SamplingBatch) -> None:
        if batch.bias_rows is None or batch.bias_ids is None or batch.bias_values is None:
            self._clear(_BIAS)
            return
        order = np.argsort(batch.bias_rows, kind="stable")
        self._point("bias_ids", np.ascontiguousarray(batch.bias_ids[order], np.int32))
        self._point("bias_values", np.ascontiguousarray(batch.bias_values[order], np.float32))
        self._point("bias_offsets", _offsets(np.bincount(batch.bias_rows, minlength=len(batch.temperature))))

    def _clear(self, names: Sequence[str]) -> None:
        if names[0] in self._keep:
            for name in names:
                self._point(name, None)


def logprobs_out(scores: TokenScores) -> LogprobsOut:
    """Where native code writes log-probabilities: into ``scores``, which must outlive that."""
    columns = (scores.logprobs, scores.ranks, scores.top_ids, scores.top_logprobs)
    return LogprobsOut(scores.top_ids.shape[1], *(column.ctypes.data for column in columns))


def _offsets(lengths: ArrayLike) -> NDArray[np.int64]:
    """Where each of the consecutive pieces starts, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
