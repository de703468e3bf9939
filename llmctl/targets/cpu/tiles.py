"""Whether the system lets this process use AMX tiles: the question that a library asks when it is loaded
(``native/amx.h``), for who loads none."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import sys

from llmctl.targets.cpu.toolchain import VARIANTS

AMX, NEXT = (variant.name.rpartition("-")[2] for variant in VARIANTS[:2])
"""The variant whose code needs tiles, and the one whose code runs where they are refused."""
_REFUSED = "AMX: the system refused the use of tiles"
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18  # x86-64; ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA


def tile_refusal() -> str:
    """Why tiles are refused, in the words of ``amx.h``; "" where they are granted, as they are from now on to every
    thread of this process."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"{_REFUSED}: it is not x86-64 Linux"
    if ctypes.CDLL(None, use_errno=True).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0:
        return ""
    number = ctypes.get_errno()
    why = (
        "a thread's alternative signal stack is below AT_MINSIGSTKSZ" if number == errno.ENOSPC else os.strerror(number)
    )
    return f"{_REFUSED}: {why}"
