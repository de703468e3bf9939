"""The machine that a process runs on, whatever the target: cores and memory. Asks the system; imports no torch."""

from __future__ import annotations

import os
from pathlib import Path

HOST_SHARE = 0.7
"""Share of the machine's available memory that an engine plans to use when no budget is given."""


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def physical_cores() -> int:
    """Physical cores this process may run on (its affinity), at least 1."""
    import psutil  # type: ignore[import-untyped,unused-ignore]

    allowed = usable_cores()
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


def host_budget() -> int:
    """Bytes of the machine's memory that an engine may plan with when no budget is given."""
    return int(available_memory() * HOST_SHARE)


def available_memory() -> int:
    """Bytes of memory this process may still take: the machine's, or its control group's where that is less."""
    import psutil

    available = int(psutil.virtual_memory().available)
    limit, used = _cgroup_number("memory.max"), _cgroup_number("memory.current")
    if limit is not None and used is not None:
        available = min(available, max(0, limit - used))
    return available


def _cgroup_number(name: str) -> int | None:
    try:
        return int((Path("/sys/fs/cgroup") / name).read_text())
    except (OSError, ValueError):
        return None
