"""Philox4x32-10, a counter-based random generator: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).

A draw depends on (seed, position) alone, so that a request's tokens do not depend on what else is in the batch, and
every runtime can compute the same draw in one kernel.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_MULTIPLIER = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)
_ROUNDS = 10


def philox4x32(counter: NDArray[np.uint32], key: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Ten rounds of Philox4x32: counter u32 [..., 4], key u32 [..., 2] -> u32 [..., 4]."""
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = key[..., 0].astype(np.uint64), key[..., 1].astype(np.uint64)
    for _ in range(_ROUNDS):
        p0, p1 = _MULTIPLIER[0] * c0, _MULTIPLIER[1] * c2
        c0, c1, c2, c3 = (p1 >> _32) ^ c1 ^ k0, p1 & _MASK, (p0 >> _32) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + np.uint64(_WEYL[0])) & _MASK, (k1 + np.uint64(_WEYL[1])) & _MASK
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def uniform(seeds: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """One uniform in [0, 1) per row, with 53 random bits.

    The key is the seed (low word first), the counter is (position low, position high, 0, 0); the draw is the top 53
    bits of output words 1 and 0.

    Args:
        seeds: u64 [R]. positions: i64 [R].

    Returns:
        f64 [R].
    """
    seed, position = seeds.astype(np.uint64), positions.astype(np.int64).view(np.uint64)
    zero = np.zeros_like(seed)
    counter = np.stack([position & _MASK, position >> _32, zero, zero], axis=-1).astype(np.uint32)
    key = np.stack([seed & _MASK, seed >> _32], axis=-1).astype(np.uint32)
    words = philox4x32(counter, key).astype(np.uint64)
    bits = (words[..., 1] << _32) | words[..., 0]
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
