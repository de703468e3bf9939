"""Integer codes stored by their bits: cut into fields of 8, 4, 2 and 1 bits, of those that their width is the sum of.

The lowest bits are in the widest field. Fields of one width lie together, the first in a byte's lowest bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


def field_widths(bits: int) -> tuple[int, ...]:
    """Widths of the fields that a code is cut into."""
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def fields(codes: Bytes, bits: int) -> Iterator[tuple[int, Bytes]]:
    """The fields of codes, in codes' shape, each with its width."""
    at = 0
    for width in field_widths(bits):
        yield width, codes >> np.uint8(at) & np.uint8((1 << width) - 1)
        at += width


def joined(parts: Bytes, width: int) -> Bytes:
    """Fields [..., 8 / width, M] side by side in bytes [..., M]."""
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    return np.bitwise_or.reduce(parts << shifts, axis=-2)
