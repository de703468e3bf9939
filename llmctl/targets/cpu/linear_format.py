"""How one linear weight is stored for the native CPU kernels: which planes an engine has of it, and of what shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from llmctl.checkpoint.nested import mapped_supers
from llmctl.targets.cpu.abi import TILE, WEIGHT_BITS
from llmctl.targets.cpu.layout import (
    INTEGER,
    PackedLinear,
    book_values,
    field_bits,
    padded_columns,
    row_order,
    scale_field_bits,
    supers_of_padding,
)


@dataclass(frozen=True)
class LinearFormat:
    """How one linear weight [N, K] is stored for the CPU kernels.

    Attributes:
        dtype: one of ``abi.WEIGHT_BITS``. shape: (N, K), logical. gated: interleaved gate and up rows.
        group: columns a weight group, -1 = all; meaningless for dense formats. permuted: columns sorted by group.
        book: its code book. experts: whose rows lie one below the other. one_zero: all codes have the same zero.
        nested: groups whose scales and minimums share a float; 0: each has its own. parts: tensors of the checkpoint
            that it is made of. bits: of integer codes, where they are not ``abi.WEIGHT_BITS``'; else 0. nested_bits: of
            the codes of nested scales. scale_rows: as ``PackedLinear`` has it.
    """

    dtype: str
    shape: tuple[int, int]
    gated: bool
    group: int = -1
    permuted: bool = False
    book: str = ""
    experts: int = 1
    one_zero: bool = False
    nested: int = 0
    parts: int = 1
    bits: int = 0
    nested_bits: int = 8
    scale_rows: int = 1

    @property
    def integer(self) -> bool:
        """Whether activations are quantised to int8 for it."""
        return self.dtype in INTEGER

    @property
    def rows(self) -> int:
        """N in whole tiles."""
        return len(row_order(self.shape[0], self.gated, self.experts))

    @property
    def columns(self) -> int:
        """K, padded."""
        if self.integer:
            return padded_columns(self.shape[1], self.group)[0]
        return self.shape[1] + (self.shape[1] % 2 if self.dtype == "bf16" else 0)

    @property
    def code_bits(self) -> int:
        """``PackedLinear.code_bits``."""
        return field_bits(self.bits, *padded_columns(self.shape[1], self.group)) if self.integer else 0

    @property
    def scale_code_bits(self) -> int:
        """``PackedLinear.nested_bits``."""
        if not (self.integer and self.nested):
            return 0
        groups = self.columns // padded_columns(self.shape[1], self.group)[1]
        return scale_field_bits(self.nested_bits, groups * (1 + self.dtype.endswith("_min")) * TILE)

    def planes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Stored planes: suffix -> (safetensors dtype, shape)."""
        size = (self.code_bits or WEIGHT_BITS[self.dtype]) * self.rows * self.columns // 8
        planes: dict[str, tuple[str, tuple[int, ...]]] = {"tiles": ("U8", (size,))}
        if self.integer:
            shape = (self.rows // TILE, self.columns // padded_columns(self.shape[1], self.group)[1], TILE)
            minimum = self.dtype.endswith("_min")
            if self.nested:
                codes = (*shape[:2], 1 + minimum, TILE)
                packed = math.prod(codes[1:]) * self.scale_code_bits // 8
                planes["tile_scale_codes"] = ("U8", (codes[0], packed) if packed else codes)
                planes["tile_scale_supers"] = ("F16", (shape[0], shape[1] // self.nested, 1 + minimum, TILE))
            else:
                planes["tile_scales"] = ("F16", shape)
            if minimum and not self.nested:
                planes["tile_minimums"] = ("F16", shape)
            if not minimum:
                planes["tile_zeros"] = ("U8", (TILE,) if self.one_zero else shape)
        if self.book:
            size = self.columns if self.group == -1 else self.group
            planes |= self._book_scales((self.rows // TILE, -(-self.columns // size), TILE))
        if self.permuted:
            planes["permutation"] = ("I32", (self.shape[1],))
        return planes

    def room(self, groups: int) -> int:
        """Supers that are stored of nested scales of a code book, for rows of ``groups``."""
        supers = mapped_supers(self.shape[0], groups, self.nested, self.parts)
        return supers + supers_of_padding(groups, self.nested)

    def _book_scales(self, shape: tuple[int, int, int]) -> dict[str, tuple[str, tuple[int, ...]]]:
        if not self.nested:
            return {"tile_scales": ("F32", (*shape[:2], TILE // self.scale_rows))}
        return {
            "tile_scale_codes": ("U8", shape),
            "tile_scale_supers": ("F32", (self.room(shape[1]), 2)),
            "tile_scale_starts": ("I32", (self.rows,)),
        }

    def from_planes(self, planes: Mapping[str, NDArray[Any]]) -> PackedLinear:
        """The packed weight over stored planes (suffix -> array)."""
        group = self.columns if self.group == -1 or self.dtype in ("bf16", "f32") else self.group
        return PackedLinear(
            self.dtype,
            planes["tiles"],
            planes.get("tile_scales"),
            planes.get("tile_zeros"),
            self.rows,
            self.columns,
            group,
            planes.get("permutation"),
            planes.get("tile_minimums"),
            book_values(self.book),
            planes.get("tile_scale_codes"),
            planes.get("tile_scale_supers"),
            planes.get("tile_scale_starts"),
            self.nested,
            self.code_bits,
            self.scale_code_bits,
            self.scale_rows,
        )


def to_planes(packed: PackedLinear) -> dict[str, NDArray[Any]]:
    """The planes to store, by suffix."""
    planes: dict[str, NDArray[Any]] = {"tiles": packed.data}
    found = {
        "tile_scales": packed.scales,
        "tile_zeros": packed.zeros,
        "tile_minimums": packed.minimums,
        "tile_scale_codes": packed.scale_codes,
        "tile_scale_supers": packed.scale_supers,
        "tile_scale_starts": packed.scale_starts,
        "permutation": packed.permutation,
    }
    return planes | {suffix: plane for suffix, plane in found.items() if plane is not None}
