"""The dense tensors that a checkpoint is written with: a source's, some of them replaced, floats in one dtype."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING

from llmctl.checkpoint.reader import Checkpoint
from llmctl.checkpoint.safetensors_io import TensorSpec, torch_dtype_name
from llmctl.errors import CheckpointError
from llmctl.graph.dtypes import DTYPES, FLOAT_DTYPES

if TYPE_CHECKING:
    from torch import Tensor

_STORED_FLOATS = tuple(DTYPES[name].safetensors for name in FLOAT_DTYPES)
_FLOATS = tuple(f"torch.{DTYPES[name].torch}" for name in FLOAT_DTYPES)


class DenseTensors:
    """Values of dense tensors, made when their turn comes.

    Args:
        replaced: tensor -> what it has instead of the source's values.
        dtype: of floats; None: every tensor in its own.
    """

    def __init__(self, source: Checkpoint, replaced: Mapping[str, Tensor], dtype: str | None) -> None:
        self._source, self._replaced, self._dtype = source, replaced, dtype

    def spec(self, name: str) -> TensorSpec:
        """A tensor as ``write_safetensors`` takes it."""
        replacement = self._replaced.get(name)
        if replacement is not None:
            stored, shape = torch_dtype_name(replacement.dtype), tuple(replacement.shape)
        else:
            info = self._source.describe(name)
            stored, shape = info.dtype, info.shape
        if stored in _STORED_FLOATS and self._dtype is not None:
            stored = DTYPES[self._dtype].safetensors
        return (stored, shape, functools.partial(self.value, name))

    def value(self, name: str) -> Tensor:
        """A tensor's values.

        Raises:
            CheckpointError: not finite, or too large for the dtype.
        """
        import torch

        value = self._replaced.get(name)
        tensor = self._source.weight(name) if value is None else value
        assert isinstance(tensor, torch.Tensor)
        if str(tensor.dtype) not in _FLOATS:
            return tensor
        cast = tensor if self._dtype is None else tensor.to(getattr(torch, self._dtype))
        if not bool(cast.isfinite().all()):
            found = "not finite" if not bool(tensor.isfinite().all()) else f"too large for {self._dtype}"
            raise CheckpointError(f"{self._source.path}: tensor '{name}' has values that are {found}")
        return cast
