"""Weights packed for the native CPU kernels, in numpy. The layouts are those of ``native/gemm.h``.

Tiles of 32 outputs; a gated weight (gate rows first, up rows second) is interleaved so that every tile holds 16 gate
rows and the 16 up rows that go with them. Rows are padded with zero weights to whole tiles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmctl.checkpoint.nested import nested_map
from llmctl.graph.code_books import CODE_BOOKS
from llmctl.graph.graph import KVLayer
from llmctl.targets.cpu.abi import LANES, MAX_ACT_GROUP, TILE, kv_token_bytes
from llmctl.targets.fields import fields, joined

Bytes = NDArray[np.uint8]
INTEGER = ("w4", "w8", "w4_min", "w8_min")
"""The dtypes that meet int8 activations."""
BOOK_DTYPES = {8: "e4m3", 4: "book4"}
"""By the bits of a code book: float8_e4m3 is decoded by what it is, one of 4 bits through its table."""
FIELD_BITS = (2, 3, 5, 6)
"""Widths of codes that are stored by their bits, in fields of 4, 2 and 1; see ``native/fields.h``."""
_UNIT_COLUMNS = 16
_UNIT_CODES = _UNIT_COLUMNS * TILE


class ScaleRangeError(ValueError):
    """A weight's scales or minimums are beyond what they are stored in."""


@dataclass(frozen=True)
class NestedPlane:
    """Scales, or minimums, of integers [N, G], as ``(code - zero) * super``; see ``checkpoint.nested.NestedFloats``.

    ``bits``: width of the codes. ``zero``: 0, or their middle.
    """

    codes: Bytes
    supers: NDArray[np.float16]
    zero: int
    bits: int = 8


@dataclass(frozen=True)
class MappedPlane:
    """Scales of a code book [N, G], as ``nested_map()[code] * super + offset``; see ``checkpoint.nested.MappedFloats``.

    ``room``: supers that are stored, zeros behind those that there are; a row of padding has some of them.
    """

    codes: Bytes
    supers: NDArray[np.float32]
    offsets: NDArray[np.float32]
    starts: NDArray[np.int32]
    shared: int
    room: int


@dataclass(frozen=True)
class PackedLinear:
    """One linear weight in tiles.

    Attributes:
        dtype: one of ``abi.WEIGHT_BITS``.
        data: u8, the tiles. scales: [tiles, groups, 32], f16 of integers, else f32; of e4m3 [tiles, groups, 2] where
            scale_rows, the rows that share one, are 16 and not 1. zeros: u8 [tiles, groups, 32], or
            [32] of one zero for all, of w4 and w8. minimums: f16 [tiles, groups, 32], of w4_min and w8_min. book: f32
            [16], of book4. nested: how many groups' scales share a float; 0: each has its own. scale_codes, of
            integers: u8 [tiles, groups, P, 32], in place of scales and minimums (P = 2) or of scales whose sign is
            above 128 (P = 1): what they are the products of with scale_supers, f16 [tiles, groups / nested, P, 32].
            With nested_bits, their width, they are stored by their bits, u8 [tiles, bytes], a sign above the middle. Of
            book4: u8 [tiles, groups, 32], values of scale_map, f32 [256], which are multiplied by the first and added
            to the second of scale_supers, f32 [supers, 2]; group ``g`` of a row has number ``(start + g) // nested`` of
            those, of scale_starts, i32 [rows]. code_bits: of codes stored by their bits, ``FIELD_BITS``; else 0.
        rows: tiles * 32. columns: K, padded. group: columns a weight group. permutation: i32 [K], the input column
            that stored column k multiplies (act-order); None when they are in order.
    """

    dtype: str
    data: Bytes
    scales: NDArray[Any] | None
    zeros: Bytes | None
    rows: int
    columns: int
    group: int
    permutation: NDArray[np.int32] | None = None
    minimums: NDArray[np.uint16] | None = None
    book: NDArray[np.float32] | None = None
    scale_codes: Bytes | None = None
    scale_supers: NDArray[Any] | None = None
    scale_starts: NDArray[np.int32] | None = None
    nested: int = 0
    code_bits: int = 0
    nested_bits: int = 0
    scale_rows: int = 1

    @property
    def scale_map(self) -> NDArray[np.float32] | None:
        """What codes of nested scales of book4 stand for."""
        return None if self.scale_starts is None else nested_map()

    @property
    def nbytes(self) -> int:
        """Size of the codes, their scales and offsets."""
        nested = (self.scale_codes, self.scale_supers, self.scale_starts)
        scales = (self.scales, self.zeros, self.minimums, *nested)
        return self.data.nbytes + sum(plane.nbytes for plane in scales if plane is not None)

    @property
    def integer(self) -> bool:
        """Whether activations are quantised to int8 for it."""
        return self.dtype in INTEGER

    @property
    def one_zero(self) -> bool:
        """Whether all codes have the same zero."""
        return self.zeros is not None and self.zeros.ndim == 1

    @property
    def act_group(self) -> int:
        """Columns sharing one activation scale: the weight group, or a part of it when that is long."""
        return act_group(self.group)


def padded_head(layer: KVLayer) -> int:
    """Columns of a head in the KV cache: whole vectors of ``LANES``."""
    return layer.head_dim + -layer.head_dim % LANES


def kv_layer_bytes(layer: KVLayer, dtype: str) -> int:
    """Bytes of one token's keys and values in one layer, scales included; ``dtype``: of ``abi.KV_TYPE``."""
    return 2 * layer.kv_heads * kv_token_bytes(padded_head(layer), dtype)


def act_group(group: int) -> int:
    """The largest divisor of ``group`` that is a multiple of 4 and at most ``MAX_ACT_GROUP``."""
    return max(d for d in range(4, MAX_ACT_GROUP + 1, 4) if group % d == 0)


def row_order(rows: int, gated: bool, experts: int = 1) -> NDArray[np.int64]:
    """Source row of every packed row, -1 for padding; each expert's rows are whole tiles."""
    if experts > 1:
        one = row_order(rows // experts, gated)
        first = np.arange(experts)[:, None] * (rows // experts)
        return np.where(one < 0, -1, one + first).reshape(-1)
    if not gated:
        order = np.arange(rows)
        return np.concatenate([order, np.full(-rows % TILE, -1)])
    half = rows // 2
    lanes = np.concatenate([np.arange(half), np.full(-half % LANES, -1)]).reshape(-1, LANES)
    up = np.where(lanes < 0, -1, lanes + half)
    return np.concatenate([lanes, up], axis=1).reshape(-1)


def padded_columns(columns: int, group: int) -> tuple[int, int]:
    """(K padded, columns a group) of an integer weight; ``group`` -1 is one group for the whole row.

    Raises:
        ValueError: a group size that the kernels cannot take.
    """
    if group == -1:
        padded = columns + -columns % 32
        return padded, padded
    if group % 4 or columns % group:
        raise ValueError(
            f"the CPU kernels need a group size that is a multiple of 4 and divides {columns}, found {group}"
        )
    return columns, group


def field_bits(bits: int, columns: int, group: int) -> int:
    """Width of codes of ``bits`` that are stored by their bits; 0 where they take 4 or 8.

    Args:
        columns, group: as ``padded_columns`` has them: activations meet whole units.
    """
    return bits if bits in FIELD_BITS and columns % _UNIT_COLUMNS == act_group(group) % _UNIT_COLUMNS == 0 else 0


def pack_int(
    codes: Bytes,
    scales: NDArray[Any] | NestedPlane,
    zeros: Bytes | None,
    *,
    bits: int,
    group: int,
    gated: bool,
    g_idx: NDArray[np.int32] | None = None,
    minimums: NDArray[Any] | NestedPlane | None = None,
    experts: int = 1,
) -> PackedLinear:
    """Pack integer codes. Scales and minimums are rounded to float16; nested ones are when they are read.

    Args:
        codes: u8 [N, K], one code each. scales: f16/f32 [N, G]. zeros: u8 [N, G]; None: 2^(bits - 1) for all.
            minimums: as the scales, nested where those are; in place of the zeros.
        bits: 2 to 6, or 8. group: columns a group, -1 = all.
        gated: rows are gate then up, to be interleaved.
        g_idx: i32 [K], each column's group (act-order): columns are sorted by group.
        experts: whose rows lie one below the other.

    Raises:
        ValueError: a group size that the kernels cannot take, or scales or minimums beyond float16.
    """
    rows, columns = codes.shape
    padded, size = padded_columns(columns, group)
    permutation = None
    if g_idx is not None:
        permutation = np.argsort(g_idx, kind="stable").astype(np.int32)
        codes = codes[:, permutation]
    order = row_order(rows, gated, experts)
    wide = np.zeros((len(order), padded), np.uint8)
    wide[order >= 0, :columns] = codes[order[order >= 0]]
    lines = wide.reshape(-1, 2, LANES, padded // 4, 4).transpose(0, 3, 1, 2, 4)  # [tile, k/4, half, lane, 4]
    stored = field_bits(bits, padded, size)
    data: NDArray[Any]
    bias = np.uint8(0) if minimums is not None else _bias(bits)
    if stored:
        data = _units(lines, stored)
    else:
        data = lines[:, :, 0] | lines[:, :, 1] << 4 if bits <= 4 else np.add(lines, bias, dtype=np.uint8)
    packed = PackedLinear(
        dtype=int_dtype(bits, minimum=minimums is not None),
        data=np.ascontiguousarray(data).reshape(-1),
        scales=None,
        zeros=None if minimums is not None else np.add(_zeros(zeros, bits, order), bias, dtype=np.uint8),
        rows=len(order),
        columns=padded,
        group=size,
        permutation=permutation,
        code_bits=stored,
    )
    floats = {"scales": scales, "minimums": minimums}
    nested = {what: plane for what, plane in floats.items() if isinstance(plane, NestedPlane)}
    if nested:
        return replace(packed, **_arrange_nested(nested, order))
    plain = {w: _arrange(_half(p, w), order) for w, p in floats.items() if isinstance(p, np.ndarray)}
    return replace(packed, scales=plain["scales"], minimums=plain.get("minimums"))


def _arrange_nested(parts: Mapping[str, NestedPlane], order: NDArray[np.int64]) -> dict[str, Any]:
    """Fields of a PackedLinear, by name.

    Raises:
        ScaleRangeError: as ``_half``, of what they multiply out to.
    """
    for what, part in parts.items():
        by_super = part.codes.reshape(*part.supers.shape, -1).astype(np.float32) - part.zero
        _half(np.abs(by_super).max(axis=-1) * part.supers.astype(np.float32), what)
    codes = np.stack([_arrange(part.codes, order, part.zero) for part in parts.values()], axis=2)
    supers = np.stack([_arrange(part.supers, order) for part in parts.values()], axis=2)
    nested, first = codes.shape[1] // supers.shape[1], next(iter(parts.values()))
    bits = scale_field_bits(first.bits, math.prod(codes.shape[1:]))
    if bits:
        codes = _units(codes, bits).reshape(len(codes), -1)
    elif first.zero:
        codes += np.uint8(128 - first.zero)
    return {"scale_codes": codes, "scale_supers": supers.view(np.uint16), "nested": nested, "nested_bits": bits}


def scale_field_bits(bits: int, count: int) -> int:
    """Width of nested codes that are stored by their bits, ``count`` of a tile; 0 where they take a byte each."""
    return bits if bits < 8 and count % _UNIT_CODES == 0 else 0


def _bias(bits: int) -> np.uint8:
    """What codes of 5 and 6 bits, and their zeros, have more as lines of 8: the middle is 128 there."""
    return np.uint8(128 - (1 << (bits - 1)) if bits > 4 else 0)


def _units(lines: Bytes, bits: int) -> Bytes:
    """Codes [tiles, …], whole units of a tile, by their bits, as ``native/fields.h`` has them."""
    tiles = lines.shape[0]
    units = lines.reshape(tiles, -1, 8, LANES * 4)  # eight lines of a byte a code
    found = []
    for width, part in fields(units, bits):
        by_byte = part.reshape(tiles, units.shape[1], width, 8 // width, LANES * 4)
        found.append(joined(by_byte, width))
    return np.concatenate(found, axis=2)


def _zeros(zeros: Bytes | None, bits: int, order: NDArray[np.int64]) -> Bytes:
    return np.full(TILE, 1 << (bits - 1), np.uint8) if zeros is None else _arrange(zeros, order)


def int_dtype(bits: int, *, minimum: bool) -> str:
    """The format of integer codes."""
    return ("w4" if bits <= 4 else "w8") + ("_min" if minimum else "")


def pack_book(
    codes: Bytes,
    scales: NDArray[np.float32] | MappedPlane,
    *,
    book: str,
    group: int,
    gated: bool,
    experts: int = 1,
    shared: int = 1,
) -> PackedLinear:
    """Pack codes of a code book.

    Args:
        codes: u8 [N, K]. scales: f32 [N, G], or nested. group: columns a group, -1 = all; the last may have fewer.
        shared: rows that have one scale, as ``scale_rows`` says it.
    """
    columns, order = codes.shape[1], row_order(len(codes), gated, experts)
    wide = np.zeros((len(order), columns), np.uint8)
    wide[order >= 0] = codes[order[order >= 0]]
    lines: Bytes = wide.reshape(-1, TILE, columns).transpose(0, 2, 1)
    values, dtype = book_values(book), BOOK_DTYPES[CODE_BOOKS[book].bits]
    if values is not None:
        lines = np.bitwise_or(lines[:, :, :LANES], np.left_shift(lines[:, :, LANES:], 4), dtype=np.uint8)
    data = np.ascontiguousarray(lines).reshape(-1)
    size = columns if group == -1 else group
    packed = PackedLinear(dtype, data, None, None, len(order), columns, size, book=values)
    if isinstance(scales, MappedPlane):
        return replace(packed, **_arrange_mapped(scales, order))
    return replace(packed, scales=np.ascontiguousarray(_arrange(scales, order)[:, :, ::shared]), scale_rows=shared)


def scale_rows(block_rows: int, rows: int, gated: bool, experts: int = 1) -> int:
    """How many rows of half a tile share their scales: all, where none has rows of two blocks, or 1."""
    part = rows // experts // (1 + gated)  # rows that follow one another in halves of tiles, from a whole one on
    return LANES if block_rows % LANES == 0 and (part % LANES == 0 or part == rows) else 1


def _arrange_mapped(part: MappedPlane, order: NDArray[np.int64]) -> dict[str, Any]:
    """Fields of a PackedLinear, by name: padding's scales are of zeros behind the supers."""
    count = len(part.supers)
    assert count + supers_of_padding(part.codes.shape[1], part.shared) <= part.room
    supers = np.zeros((part.room, 2), np.float32)
    supers[:count, 0], supers[:count, 1] = part.supers, part.offsets
    starts = np.where(order < 0, count * part.shared, part.starts[np.maximum(order, 0)]).astype(np.int32)
    codes = _arrange(part.codes, order)
    return {"scale_codes": codes, "scale_supers": supers, "scale_starts": starts, "nested": part.shared}


def supers_of_padding(groups: int, shared: int) -> int:
    """Of one row."""
    return -(-groups // shared)


def book_values(book: str) -> NDArray[np.float32] | None:
    """A code book of 4 bits, f32 [16]; None for any other."""
    return np.array(CODE_BOOKS[book].values, np.float32) if book and CODE_BOOKS[book].bits == 4 else None


def _arrange(plane: NDArray[Any], order: NDArray[np.int64], padding: int = 0) -> NDArray[Any]:
    """A plane [N, G] as [tiles, groups, 32], rows in ``order``."""
    picked = plane[np.maximum(order, 0)]
    picked[order < 0] = padding
    return np.ascontiguousarray(picked.reshape(-1, TILE, plane.shape[1]).transpose(0, 2, 1))


def _half(plane: NDArray[Any], what: str) -> NDArray[np.uint16]:
    """The bits of a plane in float16. ``what``: it holds, of a weight.

    Raises:
        ScaleRangeError: it does not fit.
    """
    with np.errstate(over="ignore"):
        half = plane.astype(np.float16)
    if not np.isfinite(half).all():
        largest = np.abs(plane).max()
        raise ScaleRangeError(f"expected {what} of at most 65504, for they are stored in float16, found {largest:g}")
    return half.view(np.uint16)


def pack_dense(weight: NDArray[Any], dtype: str, *, gated: bool, experts: int = 1) -> PackedLinear:
    """Pack a dense weight.

    Args:
        weight: [N, K]: f32 for ``dtype`` "f32", u16 holding bf16 bits for "bf16".
    """
    rows, columns = weight.shape
    step = 2 if dtype == "bf16" else 1
    padded = columns + -columns % step
    order = row_order(rows, gated, experts)
    wide = np.zeros((len(order), padded), weight.dtype)
    wide[order >= 0, :columns] = weight[order[order >= 0]]
    lines = wide.reshape(-1, TILE, padded // step, step).transpose(0, 2, 1, 3)
    data = np.ascontiguousarray(lines).reshape(-1).view(np.uint8)
    return PackedLinear(dtype, data, None, None, len(order), padded, padded)


def quantize_symmetric(weight: NDArray[np.float32], bits: int, group: int) -> tuple[Bytes, NDArray[np.float16]]:
    """Round-to-nearest codes of a dense weight [N, K] around the constant zero ``2**(bits-1)``.

    Args:
        group: columns a scale, dividing K; -1 = all.

    Returns:
        codes u8 [N, K], scales f16 [N, G].
    """
    rows, columns = weight.shape
    parts = weight.reshape(rows, -1, columns if group == -1 else group)
    middle = 2 ** (bits - 1)
    scales = (np.abs(parts).max(axis=2) / (middle - 1)).astype(np.float16)
    safe = np.where(scales == 0, np.float16(1), scales).astype(np.float32)
    codes = np.clip(np.rint(parts / safe[:, :, None]) + middle, 0, 2 * middle - 1)
    return codes.astype(np.uint8).reshape(rows, columns), scales


def pack_bias(bias: NDArray[np.float32], rows: int, gated: bool) -> NDArray[np.float32]:
    """A bias f32 [N] in the order of the packed rows, f32 [rows]."""
    order = row_order(len(bias), gated)
    assert len(order) == rows
    return np.where(order < 0, np.float32(0), bias[np.maximum(order, 0)]).astype(np.float32)
