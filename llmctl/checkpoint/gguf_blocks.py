"""ggml's quantized blocks as codes with a float scale, and perhaps a float minimum, a group of 16 or 32 columns.

Nothing is rounded: a K type's scales are those of its super-block as they are (``QuantScheme.nested``).
``w = (code - 2**(bits-1)) * scale`` or ``w = code * scale + minimum``.

Source: ggml-common.h (block_q4_0 … block_q6_K), ggml-quants.c (dequantize_row_*), gguf-py's quants.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmctl.graph.graph import QuantScheme

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class SuperBlock:
    """Scales, or minimums: u8 [n, groups of a block], less ``nested_zero``, times the block's float16 [n, 1]."""

    codes: Bytes
    super_scale: NDArray[np.float16]


Decoded = tuple[Bytes, "NDArray[Any] | SuperBlock", "NDArray[Any] | SuperBlock | None"]
"""Codes [n, columns of a block], scales [n, groups of a block], minimums likewise."""


@dataclass(frozen=True)
class BlockFormat:
    """One block type.

    Attributes:
        scheme: how its codes are read. scales: safetensors dtype of its scales and minimums.
        decode: stored blocks u8 [n, bytes of a block] -> Decoded.
    """

    scheme: QuantScheme
    scales: str
    decode: Callable[[Bytes], Decoded]


def _half(column: Bytes) -> NDArray[np.float16]:
    return np.ascontiguousarray(column).view(np.float16)


def _nibbles(packed: Bytes) -> Bytes:
    """Low nibbles of each run of bytes [n, runs, bytes], then its high ones, [n, all]."""
    return np.concatenate([packed & np.uint8(15), packed >> np.uint8(4)], axis=-1).reshape(len(packed), -1)


def _fifth_bits(packed: Bytes) -> Bytes:
    """Bits of 32 codes, u8 [n, 4] -> 0 or 16 [n, 32]."""
    return np.unpackbits(np.ascontiguousarray(packed), axis=-1, bitorder="little") << np.uint8(4)


def _q4_0(blocks: Bytes) -> Decoded:
    return _nibbles(blocks[:, None, 2:]), _half(blocks[:, :2]), None


def _q4_1(blocks: Bytes) -> Decoded:
    return _nibbles(blocks[:, None, 4:]), _half(blocks[:, :2]), _half(blocks[:, 2:4])


def _q5_0(blocks: Bytes) -> Decoded:
    codes = _nibbles(blocks[:, None, 6:]) | _fifth_bits(blocks[:, 2:6])
    return codes, _half(blocks[:, :2]), None


def _q5_1(blocks: Bytes) -> Decoded:
    codes = _nibbles(blocks[:, None, 8:]) | _fifth_bits(blocks[:, 4:8])
    return codes, _half(blocks[:, :2]), _half(blocks[:, 2:4])


def _q8_0(blocks: Bytes) -> Decoded:
    return blocks[:, 2:] ^ np.uint8(128), _half(blocks[:, :2]), None


def _pairs(packed: Bytes, run: int) -> Bytes:
    """Codes of two bits: of each run of bytes first the lowest two of all, …, [n, all]."""
    runs = packed.reshape(len(packed), -1, 1, run) >> np.array([0, 2, 4, 6], np.uint8)[:, None]
    return (runs & np.uint8(3)).reshape(len(packed), -1)


def _q2_k(blocks: Bytes) -> Decoded:
    scales = SuperBlock(blocks[:, :16] & np.uint8(15), _half(blocks[:, 80:82]))
    return _pairs(blocks[:, 16:80], 32), scales, SuperBlock(blocks[:, :16] >> np.uint8(4), -_half(blocks[:, 82:84]))


def _q3_k(blocks: Bytes) -> Decoded:
    """2 low bits, a mask of high bits, and 16 scales of 6 bits: low nibbles of 8 bytes, high pairs of 4."""
    packed = blocks[:, 96:108]
    scales = _nibbles(packed[:, None, :8]) | _pairs(packed[:, 8:], 4) << np.uint8(4)
    masks = blocks[:, None, :32] >> np.arange(8, dtype=np.uint8)[:, None]
    codes = _pairs(blocks[:, 32:96], 32) | (masks & np.uint8(1)).reshape(len(blocks), -1) << np.uint8(2)
    return codes, SuperBlock(scales, _half(blocks[:, 108:110])), None


def _k_scales(blocks: Bytes) -> tuple[SuperBlock, SuperBlock]:
    """Scales and minimums of Q4_K's and Q5_K's 8 groups: 6 bits each in 12 bytes."""
    low, middle, high = np.split(blocks[:, 4:16], 3, axis=1)
    scales = np.concatenate([low & 63, high & 15 | low >> 2 & 48], axis=1)
    minimums = np.concatenate([middle & 63, high >> 4 | middle >> 2 & 48], axis=1)
    return SuperBlock(scales, _half(blocks[:, :2])), SuperBlock(minimums, -_half(blocks[:, 2:4]))


def _q4_k(blocks: Bytes) -> Decoded:
    return _nibbles(blocks[:, 16:].reshape(-1, 4, 32)), *_k_scales(blocks)


def _q5_k(blocks: Bytes) -> Decoded:
    masks = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]
    high = (masks & np.uint8(1)).reshape(len(blocks), -1) << np.uint8(4)
    return _nibbles(blocks[:, 48:].reshape(-1, 4, 32)) | high, *_k_scales(blocks)


def _q6_k(blocks: Bytes) -> Decoded:
    codes = _nibbles(blocks[:, :128].reshape(-1, 2, 64)) | _pairs(blocks[:, 128:192], 32) << np.uint8(4)
    scales = SuperBlock(blocks[:, 192:208] ^ np.uint8(128), _half(blocks[:, 208:210]))
    return codes, scales, None


def _symmetric(bits: int, group: int, nested: int = 0, of: int = 8) -> QuantScheme:
    return QuantScheme(bits, group, symmetric=True, nested=nested, nested_bits=of)


def _with_minimums(bits: int, group: int, nested: int = 0, of: int = 8) -> QuantScheme:
    return QuantScheme(bits, group, symmetric=False, minimum=True, nested=nested, nested_bits=of)


BLOCK_FORMATS: Mapping[str, BlockFormat] = {
    "Q4_0": BlockFormat(_symmetric(4, 32), "F16", _q4_0),
    "Q4_1": BlockFormat(_with_minimums(4, 32), "F16", _q4_1),
    "Q5_0": BlockFormat(_symmetric(5, 32), "F16", _q5_0),
    "Q5_1": BlockFormat(_with_minimums(5, 32), "F16", _q5_1),
    "Q8_0": BlockFormat(_symmetric(8, 32), "F16", _q8_0),
    "Q2_K": BlockFormat(_with_minimums(2, 16, 16, 4), "F32", _q2_k),
    "Q3_K": BlockFormat(_symmetric(3, 16, 16, 6), "F32", _q3_k),
    "Q4_K": BlockFormat(_with_minimums(4, 32, 8, 6), "F32", _q4_k),
    "Q5_K": BlockFormat(_with_minimums(5, 32, 8, 6), "F32", _q5_k),
    "Q6_K": BlockFormat(_symmetric(6, 16, 16, 8), "F32", _q6_k),
}
"""By ggml's name."""
