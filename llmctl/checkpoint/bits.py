"""Integer codes in 32-bit words: a little-endian bit stream, value j of a row at bits ``j*bits .. j*bits+bits-1``.

At 2, 4 and 8 bits that is 16, 8 or 4 values a word; at 3 bits, 32 values in three words with two values straddling a
word boundary, which is GPTQ's 3-bit layout.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

BITS = (2, 3, 4, 8)
assert sys.byteorder == "little", "words are viewed as bytes"


def values_per_period(bits: int) -> int:
    """How many values fill a whole number of 32-bit words: 16, 32, 8, 4 for 2, 3, 4, 8 bits.

    Raises:
        ValueError: another width.
    """
    if bits not in BITS:
        raise ValueError(f"bits: expected one of {BITS}, found {bits}")
    return 32 // math.gcd(bits, 32)


def pack_words(values: Tensor, bits: int) -> Tensor:
    """Pack uint8 [..., n] along the last axis into int32 [..., n*bits/32].

    Raises:
        ValueError: n is not a multiple of ``values_per_period``, or a value needs more than ``bits`` bits.
    """
    import torch

    period = values_per_period(bits)
    if values.shape[-1] % period:
        raise ValueError(f"{bits}-bit packing needs a multiple of {period} values, found {values.shape[-1]}")
    if values.numel() and int(values.max()) >> bits:
        raise ValueError(f"a value of {int(values.max())} does not fit in {bits} bits")
    if 8 % bits == 0:
        return _pack_bytes(values, bits)
    lanes = values.unflatten(-1, (-1, period))
    words = torch.zeros(*lanes.shape[:-1], period * bits // 32, dtype=torch.int64, device=values.device)
    for lane in range(period):
        word, shift = divmod(lane * bits, 32)
        value = lanes[..., lane].long()
        words[..., word] |= (value << shift) & 0xFFFFFFFF
        if shift + bits > 32:
            words[..., word + 1] |= value >> (32 - shift)
    signed = torch.where(words >= 1 << 31, words - (1 << 32), words)
    return signed.to(torch.int32).flatten(-2)


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """The inverse of ``pack_words``: int32 [..., m] -> uint8 [..., m*32/bits].

    Raises:
        ValueError: m is not a whole number of periods.
    """
    import torch

    period = values_per_period(bits)
    per_period = period * bits // 32
    if words.shape[-1] % per_period:
        raise ValueError(f"{bits}-bit packing needs a multiple of {per_period} words, found {words.shape[-1]}")
    if 8 % bits == 0:
        return _unpack_bytes(words, bits)
    unsigned = words.long().bitwise_and_(0xFFFFFFFF).unflatten(-1, (-1, per_period))
    lanes = torch.empty(*unsigned.shape[:-1], period, dtype=torch.uint8, device=words.device)
    mask = (1 << bits) - 1
    for lane in range(period):
        word, shift = divmod(lane * bits, 32)
        value = unsigned[..., word] >> shift
        if shift + bits > 32:
            value = value | (unsigned[..., word + 1] << (32 - shift))
        lanes[..., lane] = (value & mask).to(torch.uint8)
    return lanes.flatten(-2)


def _rows(values: Tensor) -> Tensor:
    """Rows one behind the other. A transposed single row counts as contiguous, whatever its step, and cannot be viewed
    as another type."""
    values = values.contiguous()
    return values if values.stride(-1) == 1 else values.flatten().view(values.shape)


def _pack_bytes(values: Tensor, bits: int) -> Tensor:
    """``pack_words`` for widths that divide a byte: whole bytes first, which a little-endian word is made of."""
    import torch

    lanes = values.unflatten(-1, (-1, 8 // bits))
    octets = lanes[..., 0].clone()
    for lane in range(1, 8 // bits):
        octets |= lanes[..., lane] << (lane * bits)
    return _rows(octets).view(torch.int32)


def _unpack_bytes(words: Tensor, bits: int) -> Tensor:
    """The inverse of ``_pack_bytes``."""
    import torch

    octets = _rows(words).view(torch.uint8)
    mask = (1 << bits) - 1
    lanes = [octets if bits == 8 else octets >> shift & mask for shift in range(0, 8, bits)]
    return lanes[0].clone() if bits == 8 else torch.stack(lanes, dim=-1).flatten(-2)
