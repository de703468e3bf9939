"""The machine that a process runs on, whatever the target: cores and memory. Asks the system; imports no torch."""

from __future__ import annotations

import os
from pathlib import Path

from llmctl.targets.base import MemoryBudget, StepLimits

HOST_SHARE = 0.7
"""Share of the machine's available memory that an engine plans to use when no budget is given."""


HOST_STEP = StepLimits(max_num_batched_tokens=512, max_num_seqs=64)
"""The largest step of an engine that runs on the machine's own processor."""


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def physical_cores() -> int:
    """Physical cores this process may run on (its affinity), at least 1."""
    import psutil  # type: ignore[import-untyped,unused-ignore]

    allowed = usable_cores()
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


def host_budget(note: str = "") -> MemoryBudget:
    """What an engine may take of the machine's memory. ``note``: more about where the budget comes from."""
    source = f"{HOST_SHARE:.0%} of the memory available now"
    return MemoryBudget(int(available_memory() * HOST_SHARE), f"{source}; {note}" if note else source, shared=True)


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
