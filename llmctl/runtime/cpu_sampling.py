"""A SamplingBatch as the native sampler's struct, and its results back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmctl.engine.step import SamplingBatch, TokenLogprobs
from llmctl.runtime.cpu_abi import SamplingDesc

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


class SamplingCall:
    """One call's struct with the arrays it points into."""

    def __init__(self, batch: SamplingBatch, vocab: int) -> None:
        self.rows = len(batch.temperature)
        self.batch = batch
        self.desc = SamplingDesc(rows=self.rows)
        self._keep: list[NDArray[Any]] = []
        for name, dtype in _FIELDS.items():
            value = getattr(batch, name)
            if value is not None:
                setattr(self.desc, name, self._pointer(np.ascontiguousarray(value, dtype)))
        if (
            batch.repetition_penalty is not None
            or batch.presence_penalty is not None
            or batch.frequency_penalty is not None
        ):
            self._ragged("prompt", batch.prompt_ids)
            self._ragged("output", batch.output_ids)
        if batch.bias_rows is not None and batch.bias_ids is not None and batch.bias_values is not None:
            self._bias(batch.bias_rows, batch.bias_ids, batch.bias_values)
        self.token_ids = np.zeros(self.rows, np.int32)
        self.desc.token_ids = self._pointer(self.token_ids)
        self._most = 0
        if batch.num_logprobs is not None:
            self._logprob_outputs(min(int(batch.num_logprobs.max(initial=0)), vocab))

    def results(self) -> tuple[NDArray[np.int32], Sequence[TokenLogprobs | None] | None]:
        """Token ids, and log-probabilities per row (None when no row asks)."""
        counts = self.batch.num_logprobs
        if counts is None or not (counts >= 0).any():
            return self.token_ids, None
        ids, values = self.top_ids.tolist(), self.top_logprobs.tolist()
        return self.token_ids, [
            TokenLogprobs(float(self.logprobs[row]), int(self.ranks[row]), tuple(ids[row][:n]), tuple(values[row][:n]))
            if n >= 0
            else None
            for row, n in enumerate(int(n) for n in counts)
        ]

    def _pointer(self, array: NDArray[Any]) -> int:
        self._keep.append(array)
        return int(array.ctypes.data)

    def _ragged(self, name: str, rows: tuple[NDArray[np.int32], ...] | None) -> None:
        parts = rows if rows is not None else tuple(np.zeros(0, np.int32) for _ in range(self.rows))
        offsets = np.concatenate([[0], np.cumsum([len(p) for p in parts])]).astype(np.int64)
        flat = np.concatenate([*parts, np.zeros(1, np.int32)]).astype(np.int32)
        setattr(self.desc, f"{name}_ids", self._pointer(flat))
        setattr(self.desc, f"{name}_offsets", self._pointer(offsets))

    def _bias(self, rows: NDArray[np.int32], ids: NDArray[np.int32], values: NDArray[np.float32]) -> None:
        order = np.argsort(rows, kind="stable")
        counts = np.bincount(rows, minlength=self.rows)
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.desc.bias_ids = self._pointer(np.ascontiguousarray(ids[order], np.int32))
        self.desc.bias_values = self._pointer(np.ascontiguousarray(values[order], np.float32))
        self.desc.bias_offsets = self._pointer(offsets)

    def _logprob_outputs(self, most: int) -> None:
        self.logprobs = np.zeros(self.rows, np.float32)
        self.ranks = np.zeros(self.rows, np.int32)
        self.top_ids = np.zeros((self.rows, max(most, 1)), np.int32)
        self.top_logprobs = np.zeros((self.rows, max(most, 1)), np.float32)
        self.desc.max_logprobs = max(most, 1)
        for name in ("logprobs", "ranks", "top_ids", "top_logprobs"):
            setattr(self.desc, name, self._pointer(getattr(self, name)))


class NativeSampling:
    """Makes SamplingCalls for one vocabulary."""

    def __init__(self, vocab: int) -> None:
        self._vocab = vocab

    def prepare(self, batch: SamplingBatch) -> SamplingCall:
        """The struct for one step's batch."""
        return SamplingCall(batch, self._vocab)
