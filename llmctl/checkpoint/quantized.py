"""The canonical form of an integer-quantized linear weight, whatever layout it has on disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmctl.graph.graph import QuantScheme

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A linear weight ``[N, K]`` (out, in) as integer codes: ``w[n, k] = (codes[n, k] - zeros[n, g]) * scales[n, g]``.

    ``g`` is ``g_idx[k]`` with act-order, ``k // group_size`` without, 0 for group size -1; G groups in all.

    Attributes:
        codes: uint8 [N, K], values 0 .. 2**bits-1.
        scales: float16 or float32 [N, G].
        zeros: uint8 [N, G], true zero points (no format's offset); constant ``2**(bits-1)`` when symmetric.
        scheme: how the codes are to be read.
        g_idx: int32 [K], given exactly when ``scheme.act_order``.

    Raises:
        ValueError: shapes or dtypes that contradict one another.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    scheme: QuantScheme
    g_idx: Tensor | None = None

    def __post_init__(self) -> None:
        if self.codes.ndim != 2:
            raise ValueError(f"codes: expected a matrix [N, K], found shape {tuple(self.codes.shape)}")
        rows, columns = self.codes.shape
        expected = (rows, self.scheme.groups(columns))
        for name, plane in (("scales", self.scales), ("zeros", self.zeros)):
            if tuple(plane.shape) != expected:
                raise ValueError(f"{name}: expected shape {expected}, found {tuple(plane.shape)}")
        for name, plane, dtypes in (
            ("codes", self.codes, ("torch.uint8",)),
            ("zeros", self.zeros, ("torch.uint8",)),
            ("scales", self.scales, ("torch.float16", "torch.float32")),
        ):
            if str(plane.dtype) not in dtypes:
                raise ValueError(f"{name}: expected dtype {' or '.join(dtypes)}, found {plane.dtype}")
        self._check_g_idx(columns)

    def _check_g_idx(self, columns: int) -> None:
        if self.scheme.act_order != (self.g_idx is not None):
            raise ValueError(
                f"g_idx must be given exactly when act_order is true; act_order is {self.scheme.act_order}"
            )
        if self.g_idx is not None and (tuple(self.g_idx.shape), str(self.g_idx.dtype)) != ((columns,), "torch.int32"):
            raise ValueError(f"g_idx: expected int32 [{columns}], found {self.g_idx.dtype} {tuple(self.g_idx.shape)}")

    @property
    def shape(self) -> tuple[int, int]:
        """Logical shape (N, K)."""
        return (self.codes.shape[0], self.codes.shape[1])

    def group_index(self) -> Tensor:
        """The group of each input column, int64 [K]."""
        import torch

        if self.g_idx is not None:
            return self.g_idx.long()
        columns = self.codes.shape[1]
        size = columns if self.scheme.group_size == -1 else self.scheme.group_size
        return torch.arange(columns, device=self.codes.device) // size

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [N, K]: ``(code - zero) * scale`` in float32, then cast to ``dtype`` (None: float32)."""
        import torch

        group = self.group_index()
        weight = self.codes.to(torch.float32)
        weight -= self.zeros.to(torch.float32)[:, group]
        weight *= self.scales.to(torch.float32)[:, group]
        return weight if dtype is None else weight.to(dtype)
