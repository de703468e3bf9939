"""Memory that the API process freed goes back to the system: what one large body needed is not kept for ever.

glibc raises the size from which a block is its own mapping to the largest that was ever freed, up to 32 MiB, and twice
that is what each of its arenas (one for every few threads) keeps at its end. Measured beside the same long prompts,
floods of stop words and bodies of 33 MB, over and over: 258 to 315 MiB private, by which threads they fell to; with
limits that stay, 179 to 183.
"""

from __future__ import annotations

import ctypes
import os

LARGE_BYTES = 1 << 20
"""Blocks from this size on are mappings of their own; as much may be kept at the end of an arena."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_OF_OPERATORS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")
_TUNABLES = ("glibc.malloc.trim_threshold", "glibc.malloc.mmap_threshold")


def give_freed_memory_back() -> bool:
    """Settle for this process what its allocator keeps; before it has threads.

    Returns:
        Whether that was done: not where the C library has no such limits, nor where an operator has set his own by
        ``MALLOC_TRIM_THRESHOLD_`` or ``MALLOC_MMAP_THRESHOLD_`` (see mallopt(3)), or as ``GLIBC_TUNABLES``.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if any(name in os.environ for name in _OF_OPERATORS) or any(name in tunables for name in _TUNABLES):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(
        mallopt(limit, LARGE_BYTES) == 1 for limit in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD)
    )
