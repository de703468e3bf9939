"""The canonical form of a quantized linear weight, whatever layout it has on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from llmctl.checkpoint.nested import NestedParts, nested_fault, stack_nested, take_nested
from llmctl.graph.code_books import CODE_BOOKS
from llmctl.graph.graph import QuantScheme

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A linear weight ``[N, K]`` (out, in) as codes: ``w[n, k] = value(codes[n, k]) * scales[b, g] + minimums[b, g]``.

    ``value`` is ``code - zeros[b, g]``, or the entry of the scheme's code book. ``b`` is ``n // block_rows``; ``g`` is
    ``g_idx[k]`` with act-order, ``k // group_size`` without, 0 for group size -1; B blocks and G groups in all.

    Attributes:
        codes: uint8 [N, K], values 0 .. 2**bits-1.
        scales: float16 or float32 [B, G].
        zeros: uint8 [B, G], true zero points (no format's offset); constant ``2**(bits-1)`` when integers are
            symmetric, 0 where there is a code book or a minimum.
        scheme: how the codes are to be read.
        g_idx: int32 [K], given exactly when ``scheme.act_order``.
        minimums: as ``scales``, given exactly when ``scheme.minimum``.
        nested: what ``scales`` and ``minimums`` are the floats of, to the bit, given exactly when ``scheme.nested``.

    Raises:
        ValueError: shapes, dtypes or nested scales that contradict one another.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    scheme: QuantScheme
    g_idx: Tensor | None = None
    minimums: Tensor | None = None
    nested: NestedParts | None = None

    def __post_init__(self) -> None:
        if self.codes.ndim != 2:
            raise ValueError(f"codes: expected a matrix [N, K], found shape {tuple(self.codes.shape)}")
        rows, columns = self.codes.shape
        expected = (self.scheme.row_blocks(rows), self.scheme.groups(columns))
        floats = ("torch.float16", "torch.float32")
        planes = [("scales", self.scales, floats), ("zeros", self.zeros, ("torch.uint8",))]
        if self.scheme.minimum != (self.minimums is not None):
            raise ValueError(f"minimums must be given exactly when the scheme has them; it says {self.scheme.minimum}")
        if self.minimums is not None:
            planes.append(("minimums", self.minimums, floats))
        for name, plane, _ in planes:
            if tuple(plane.shape) != expected:
                raise ValueError(f"{name}: expected shape {expected}, found {tuple(plane.shape)}")
        for name, plane, dtypes in (("codes", self.codes, ("torch.uint8",)), *planes):
            if str(plane.dtype) not in dtypes:
                raise ValueError(f"{name}: expected dtype {' or '.join(dtypes)}, found {plane.dtype}")
        self._check_g_idx(columns)
        self._check_nested()

    def _check_nested(self) -> None:
        if bool(self.scheme.nested) != (self.nested is not None):
            raise ValueError(f"nested must be given exactly when the scheme is; it says {self.scheme.nested}")
        if self.nested is not None:
            floats = (self.scales,) if self.minimums is None else (self.scales, self.minimums)
            fault = nested_fault(self.nested, floats, self.scheme)
            if fault is not None:
                raise ValueError(f"nested: {fault}")

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

    def by_row(self) -> QuantizedWeight:
        """The same weight with a scale (and zero) for every row."""
        if self.scheme.block_rows == 1:
            return self
        rows = self.codes.shape[0]
        scales, zeros = (
            plane.repeat_interleave(self.scheme.block_rows, 0)[:rows] for plane in (self.scales, self.zeros)
        )
        return replace(self, scales=scales, zeros=zeros, scheme=replace(self.scheme, block_rows=1))

    def take_rows(self, rows: slice | Tensor) -> QuantizedWeight:
        """Some rows, in any order; each then has its own scale."""
        all_rows = self.by_row()
        minimums = None if all_rows.minimums is None else all_rows.minimums[rows]
        nested = all_rows.nested and take_nested(all_rows.nested, rows)
        return replace(
            all_rows,
            codes=all_rows.codes[rows],
            scales=all_rows.scales[rows],
            zeros=all_rows.zeros[rows],
            minimums=minimums,
            nested=nested,
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [N, K], in float32, then cast to ``dtype`` (None: float32)."""
        import torch

        weight, group = self.by_row(), self.group_index()
        if self.scheme.book:
            values = torch.tensor(CODE_BOOKS[self.scheme.book].values, device=self.codes.device)
            result = values[weight.codes.int()]
        else:
            result = weight.codes.to(torch.float32)
            result -= weight.zeros.to(torch.float32)[:, group]
        result *= weight.scales.to(torch.float32)[:, group]
        if weight.minimums is not None:
            result += weight.minimums.to(torch.float32)[:, group]
        return result if dtype is None else result.to(dtype)


def in_eight_bits(weight: QuantizedWeight) -> QuantizedWeight:
    """The same numbers in codes of 8 bits, for what has none of 5 and 6; itself where it has."""
    if weight.scheme.bits == 8:
        return weight
    added = 0 if not weight.scheme.symmetric or weight.scheme.book else 128 - (1 << (weight.scheme.bits - 1))
    scheme = replace(weight.scheme, bits=8)
    return replace(weight, codes=weight.codes + added, zeros=weight.zeros + added, scheme=scheme)


def stack_rows(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Weights one below the other; blocks of rows are kept where no seam cuts one.

    Raises:
        ValueError: they differ in scheme or in the groups of their columns.
    """
    import torch

    first = parts[0]
    for part in parts[1:]:
        same = part.g_idx is first.g_idx is None or (
            part.g_idx is not None and first.g_idx is not None and torch.equal(part.g_idx, first.g_idx)
        )
        if part.scheme != first.scheme or not same:
            raise ValueError("weights with different schemes or column groups cannot be stacked")
    if any(part.shape[0] % part.scheme.block_rows for part in parts[:-1]):
        parts = [part.by_row() for part in parts]
    names = ("codes", "scales", "zeros", *(("minimums",) if first.scheme.minimum else ()))
    planes = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    nested = [part.nested for part in parts if part.nested is not None]
    return replace(parts[0], **planes, nested=stack_nested(nested) if nested else None)
