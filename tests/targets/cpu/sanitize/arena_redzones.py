"""A pytest plugin for AddressSanitizer runs: activations of the CPU runtime no longer share memory, and the bytes
between them are poisoned.

All activations lie in one allocation, where the sanitizer would see nothing wrong with a kernel that writes past its
buffer into the next one. Loaded by ``scripts/sanitize.py`` with ``-p``; needs a process with libasan preloaded.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmctl.targets.cpu import runtime as cpu

_GAP = 256
_poison = ctypes.CDLL(None)["__asan_poison_memory_region"]
_poison.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_plan, _allocate = cpu.plan_arena, cpu.aligned
_gaps: list[tuple[int, int]] = []  # of the arena that is being planned: offset, bytes


def _plan_apart(storages: list[Any], max_tokens: int, max_rows: int) -> int:
    _plan(storages, max_tokens, max_rows)
    # What another graph of the runtime has there stays apart, too.
    end = sum(_gaps[-1]) - _GAP if _gaps else 0
    for storage in storages:
        storage.offset = end + _GAP
        used = storage.offset + storage.bytes(max_tokens, max_rows)
        end = -(-used // 64) * 64
        _gaps.append((used, end + _GAP - used))
    return end + _GAP


def _allocate_poisoned(size: int) -> NDArray[np.uint8]:
    memory = _allocate(size)
    start = int(memory.ctypes.data)
    if _gaps and size == sum(_gaps[-1]):
        _poison(start, _GAP)
        for offset, count in _gaps:
            _poison(start + offset, count)
        _gaps.clear()
    elif memory.base is not None:
        end = int(memory.base.ctypes.data) + memory.base.nbytes  # type: ignore[union-attr]
        _poison(start + size, end - start - size)
    return memory


cpu.plan_arena = _plan_apart
cpu.aligned = _allocate_poisoned
