"""Weights packed for the CUDA GEMM kernels, in numpy. The layout is that of ``native/dequant.cuh``.

Tiles of 32 rows by chunks of 32 columns, stored in the order in which the lanes of a warp take them as ``mma.sync``
operands, 16 bytes a lane. The same bytes serve every kernel: streaming, tensor-core, int8 and dequantising. A gated
weight (gate rows first, up rows second) is interleaved by eights. Rows are padded to whole tiles and columns to whole
steps of 128; padded groups have the scale 0. Codes may be integers, those of a code book of 16 values, or
float8's, whose scales are stored times ``scale_factor``. Integers in groups of 16, or with a float minimum a group,
have the columns of a chunk in another order: its halves are the k-steps.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmctl.graph.code_books import CODE_BOOKS

TILE = 32
STEP = 128
_EIGHT = 8
_PARTS = (16, 32)
"""Columns a group of what is in the other order of columns."""

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class CudaFormat:
    """How one weight [N, K] of codes is stored for the CUDA kernels.

    Attributes:
        bits: width of a code, 4 or 8. shape: (N, K), logical. gated: interleaved gate and up rows.
        group: columns a group, -1 = all. symmetric: every zero is ``2**(bits-1)``, and not stored.
        permuted: columns are sorted by group (act-order). book: what codes stand for; "" for integers.
        experts: whose rows lie one below the other, each padded, and interleaved, by itself.
        minimum: a float a group is added in place of a zero.
    """

    bits: int
    shape: tuple[int, int]
    gated: bool = False
    group: int = -1
    symmetric: bool = False
    permuted: bool = False
    book: str = ""
    experts: int = 1
    minimum: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for what the kernels cannot take."""
        reason = refuse_format(self)
        if reason:
            raise ValueError(reason)

    @property
    def kind(self) -> str:
        """What the codes are, as entry points and their files begin."""
        if self.book and self.bits == 8:
            return "fp8"
        return f"{'book' if self.book else 'k' if self.by_halves else 'w'}{self.bits}"

    @property
    def by_halves(self) -> bool:
        """Columns 16 s .. 16 s + 15 of a chunk are k-step s."""
        return self.minimum or self.group == _PARTS[0]

    @functools.cached_property
    def rows(self) -> int:
        """N in whole tiles."""
        return len(self.order())

    def order(self) -> NDArray[np.int64]:
        """Source row of every packed row, -1 for padding."""
        return row_order(self.shape[0], self.gated, self.experts)

    @property
    def columns(self) -> int:
        """K in whole steps."""
        return self.shape[1] + -self.shape[1] % STEP

    @property
    def group_size(self) -> int:
        """Columns a group as the kernels count them: all of the padded ones when there is one group."""
        return self.columns if self.group == -1 else self.group

    @property
    def groups(self) -> int:
        """Groups a row, padding included."""
        return -(-self.columns // self.group_size)

    def planes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Stored planes: suffix -> (safetensors dtype, shape)."""
        shape = (self.rows // TILE, self.groups, TILE)
        planes: dict[str, tuple[str, tuple[int, ...]]] = {
            "tiles": ("U8", (self.rows * self.columns * self.bits // 8,)),
            "tile_scales": ("F16", shape),
        }
        if self.minimum:
            planes["tile_minimums"] = ("F16", shape)
        elif not self.symmetric:
            planes["tile_zeros"] = ("U8", shape)
        if self.kind == "book4":
            planes["tile_book"] = ("F32", (16,))
        if self.permuted:
            planes["permutation"] = ("I32", (self.shape[1],))
        return planes


def refuse_format(fmt: CudaFormat) -> str | None:
    """Why the kernels cannot read a weight so stored; None when they can."""
    rows, columns = fmt.shape
    group = fmt.group
    if fmt.bits not in (4, 8):
        return f"{fmt.bits}-bit codes; the kernels read 4 or 8 bits"
    if fmt.book and not fmt.symmetric:
        return f"zeros beside the code book {fmt.book}, which has its own"
    if fmt.book and fmt.group == _PARTS[0]:
        return f"groups of {group} of the code book {fmt.book}; the kernels take 32, 64, and multiples of {STEP}"
    if fmt.minimum and (fmt.book or fmt.symmetric):
        return "a minimum beside a zero"
    if fmt.by_halves and not (fmt.minimum or fmt.symmetric):
        return f"groups of {group} with zeros; the kernels take them symmetric, or with minimums"
    if fmt.minimum and group not in _PARTS:
        return f"minimums in groups of {group}; the kernels take them in groups of 16 and 32"
    if columns % 8:
        return f"{columns} columns are not a multiple of 8 (one 16-byte load of activations)"
    if group not in (-1, 16, 32, 64) and (group <= 0 or group % STEP):
        return f"groups of {group}; the kernels take 16, 32, 64, multiples of {STEP}, and whole rows"
    if rows % fmt.experts:
        return f"{rows} rows are not those of {fmt.experts} experts"
    if fmt.gated and rows // fmt.experts % 2:
        return f"{rows // fmt.experts} rows are not gate and up rows"
    return None


@dataclass(frozen=True)
class CudaLinear:
    """One packed weight.

    Attributes:
        tiles: u8, the codes. scales: u16 holding f16 bits [tiles, groups, 32]. zeros: u8, likewise; None if symmetric.
        permutation: i32 [K], the input column that stored column k multiplies; None when they are in order.
        minimums: as scales; None without.
    """

    format: CudaFormat
    tiles: Bytes
    scales: NDArray[np.uint16]
    zeros: Bytes | None = None
    permutation: NDArray[np.int32] | None = None
    minimums: NDArray[np.uint16] | None = None

    def planes(self) -> dict[str, NDArray[Any]]:
        """The planes to store, by suffix."""
        planes: dict[str, NDArray[Any]] = {"tiles": self.tiles, "tile_scales": self.scales}
        if self.zeros is not None:
            planes["tile_zeros"] = self.zeros
        if self.minimums is not None:
            planes["tile_minimums"] = self.minimums
        if self.format.kind == "book4":
            planes["tile_book"] = np.array(CODE_BOOKS[self.format.book].values, np.float32)
        if self.permutation is not None:
            planes["permutation"] = self.permutation
        return planes


def from_planes(fmt: CudaFormat, planes: Mapping[str, NDArray[Any]]) -> CudaLinear:
    """The packed weight over stored planes (suffix -> array)."""
    further = (planes.get(suffix) for suffix in ("tile_zeros", "permutation", "tile_minimums"))
    return CudaLinear(fmt, planes["tiles"], planes["tile_scales"], *further)


def row_order(rows: int, gated: bool, experts: int = 1) -> NDArray[np.int64]:
    """Source row of every packed row, -1 for padding."""
    if experts > 1:
        one = row_order(rows // experts, gated)
        first = np.arange(experts)[:, None] * (rows // experts)
        return np.where(one < 0, -1, one + first).reshape(-1)
    if not gated:
        return np.concatenate([np.arange(rows), np.full(-rows % TILE, -1)])
    half = rows // 2
    gate = np.concatenate([np.arange(half), np.full(-half % (TILE // 2), -1)]).reshape(-1, _EIGHT)
    return np.concatenate([gate, np.where(gate < 0, -1, gate + half)], axis=1).reshape(-1)


def pack(
    codes: Bytes, scales: NDArray[Any], zeros: Bytes | None, fmt: CudaFormat, g_idx: NDArray[np.int32] | None = None,
    minimums: NDArray[Any] | None = None,
) -> CudaLinear:  # fmt: skip
    """Pack codes.

    Args:
        codes: u8 [N, K], one code each. scales: f16/f32 [N, G], rounded to f16 times ``scale_factor``.
        zeros: u8 [N, G]; None when symmetric. minimums: as scales, exactly when the format has them.
        g_idx: i32 [K], each column's group, with act-order: columns are sorted by group.

    Raises:
        ValueError: scales or minimums beyond float16, or act-order groups that are not ``fmt.group`` columns each.
    """
    permutation = None
    if g_idx is not None:
        permutation = _permutation(g_idx, fmt.group)
        codes = codes[:, permutation]
    assert fmt.minimum == (minimums is not None)
    order = fmt.order()
    wide = _placed(codes, order, fmt.columns)
    return CudaLinear(
        fmt,
        _interleave(_by_halves(wide) if fmt.by_halves else wide, fmt.bits),
        _arrange(_half("scales", scales, scale_factor(fmt)), order, fmt.groups),
        None if fmt.symmetric or fmt.minimum or zeros is None else _arrange(zeros, order, fmt.groups),
        permutation,
        None if minimums is None else _arrange(_half("minimums", minimums, 1), order, fmt.groups),
    )


def _half(called: str, values: NDArray[Any], factor: int) -> NDArray[np.uint16]:
    """The bits of values times a factor, in float16."""
    with np.errstate(over="ignore"):
        half = (values.astype(np.float32) * factor).astype(np.float16)
    if not np.isfinite(half).all():
        most, largest = 65504 / factor, float(np.abs(values).max())
        raise ValueError(f"expected {called} of at most {most:g}, for they are stored in float16, found {largest:g}")
    return half.view(np.uint16)


def _by_halves(wide: Bytes) -> Bytes:
    """Columns as ``CudaFormat.by_halves`` has them: position 8t + 4s + i of a chunk is column 16 s + 4t + i."""
    chunks = wide.reshape(len(wide), -1, 2, 4, 4)  # row, chunk, s, t, i
    return np.ascontiguousarray(chunks.transpose(0, 1, 3, 2, 4)).reshape(wide.shape)


def _from_halves(wide: Bytes) -> Bytes:
    """The inverse of ``_by_halves``."""
    chunks = wide.reshape(len(wide), -1, 4, 2, 4)  # row, chunk, t, s, i
    return np.ascontiguousarray(chunks.transpose(0, 1, 3, 2, 4)).reshape(wide.shape)


def scale_factor(fmt: CudaFormat) -> int:
    """What scales are multiplied by as they are stored: kernels make float8's values 2^8 times too small."""
    return 256 if fmt.kind == "fp8" else 1


def unpack(linear: CudaLinear) -> tuple[Bytes, NDArray[np.float16], Bytes, NDArray[np.float16] | None]:
    """(codes u8 [N, K], scales f16 [N, groups], zeros u8 [N, groups], minimums f16 [N, groups]) in logical rows and,
    of act-order, packed column order.

    Zeros of a code book, and beside minimums, are 0; minimums are None without. ``groups`` counts padding; stored
    column k belongs to group ``k // format.group_size``.
    """
    fmt = linear.format
    order = fmt.order()
    place = np.argsort(order[order >= 0])
    packed_row = np.flatnonzero(order >= 0)[place]
    wide = _deinterleave(linear.tiles, fmt)
    codes = (_from_halves(wide) if fmt.by_halves else wide)[packed_row, : fmt.shape[1]]

    def natural(plane: NDArray[Any]) -> NDArray[Any]:
        lanes = plane.reshape(-1, fmt.groups, _EIGHT, 4).transpose(0, 3, 2, 1)  # [tile, j, g, group]
        return np.ascontiguousarray(lanes.reshape(fmt.rows, fmt.groups)[packed_row])

    middle = 0 if fmt.book or fmt.minimum else 2 ** (fmt.bits - 1)
    zeros = np.full_like(linear.scales, middle, np.uint8) if linear.zeros is None else linear.zeros
    scales = natural(linear.scales).view(np.float16) / np.float16(scale_factor(fmt))
    minimums = None if linear.minimums is None else natural(linear.minimums).view(np.float16)
    return codes, scales, natural(zeros), minimums


def _permutation(g_idx: NDArray[np.int32], group: int) -> NDArray[np.int32]:
    permutation = np.argsort(g_idx, kind="stable").astype(np.int32)
    size = len(g_idx) if group == -1 else group
    if not np.array_equal(g_idx[permutation], np.arange(len(g_idx)) // size):
        raise ValueError(f"act-order groups are not of {size} columns each")
    return permutation


def _placed(plane: NDArray[Any], order: NDArray[np.int64], columns: int) -> NDArray[Any]:
    """A plane's rows in packed order, padded with zeros to ``columns``."""
    if columns == plane.shape[1] and (order >= 0).all():
        return plane[order]
    wide = np.zeros((len(order), columns), plane.dtype)
    wide[order >= 0, : plane.shape[1]] = plane[order[order >= 0]]
    return wide


def _interleave(wide: Bytes, bits: int) -> Bytes:
    """Codes [rows, columns] to the order of the lanes."""
    rows, columns = wide.shape
    # row = 32 tile + 16 r + 8 h + g; column = 32 chunk + 8 t + 4 s + 2 p + b
    if bits == 8:
        pairs = wide.view("<u4").reshape(rows // TILE, 2, 2, 8, columns // 32, 4, 2)  # tile, r, h, g, chunk, t, s: p, b
        return np.ascontiguousarray(pairs.transpose(0, 4, 1, 3, 5, 6, 2)).view(np.uint8).reshape(-1)
    halves = wide.reshape(rows // 16, 2, 8, columns)
    # Nibble 4b + 2p + h of a lane's word: h first, then b and p change places among the four bytes of an s.
    joined = (halves[:, 0] | halves[:, 1] << 4).view("<u8")
    middle = joined & 0x00FF_FF00_00FF_FF00
    joined ^= middle
    joined |= (middle & 0x0000_FF00_0000_FF00) << 8
    joined |= middle >> 8 & 0x0000_FF00_0000_FF00
    lanes = joined.reshape(rows // TILE, 2, 8, columns // 32, 4)  # tile, r, g, chunk, t: s, b, p, h
    return np.ascontiguousarray(lanes.transpose(0, 3, 2, 4, 1)).view(np.uint8).reshape(-1)


def _deinterleave(tiles: Bytes, fmt: CudaFormat) -> Bytes:
    """The inverse of ``_interleave``."""
    count, chunks = fmt.rows // TILE, fmt.columns // 32
    if fmt.bits == 8:
        lanes = tiles.reshape(count, chunks, 2, 8, 4, 2, 2, 2, 2).transpose(0, 2, 6, 3, 1, 4, 5, 7, 8)
    else:
        nibbles = np.stack([tiles & 15, tiles >> 4], axis=-1)
        lanes = nibbles.reshape(count, chunks, 8, 4, 2, 2, 2, 2, 2).transpose(0, 4, 8, 2, 1, 3, 5, 7, 6)
    return np.ascontiguousarray(lanes).reshape(fmt.rows, fmt.columns)


def _arrange(plane: NDArray[Any], order: NDArray[np.int64], groups: int) -> NDArray[Any]:
    """A plane [N, G] as [tiles, groups, 32], a lane's rows (g + 8 j) side by side."""
    lanes = _placed(plane, order, groups).reshape(-1, 4, _EIGHT, groups).transpose(0, 3, 2, 1)  # tile, group, g, j
    return np.ascontiguousarray(lanes).reshape(-1, groups, TILE)
