"""The machine that a process runs on, whatever the target: cores and memory. Asks the system; imports no torch."""

from __future__ import annotations

import os
import resource

from llmctl.errors import UsageError
from llmctl.targets.base import MemoryBudget, StepLimits
from llmctl.targets.control_group import cpu_quota, memory_left

HOST_SHARE = 0.7
"""Share of the machine's available memory that an engine plans to use when no budget is given."""

HOST_STEP = StepLimits(max_num_batched_tokens=512, max_num_seqs=64)
"""The largest step of an engine that runs on the machine's own processor."""
HOST_NICENESS = 5
"""``Target.niceness`` of such engines."""


def usable_cores() -> int:
    """Cores that this process may keep busy: by its affinity, and by a quota of its control group; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return cores if quota is None else max(1, min(cores, int(quota)))


def physical_cores() -> int:
    """Physical cores this process may keep busy, at least 1."""
    import psutil  # type: ignore[import-untyped,unused-ignore]

    allowed = usable_cores()
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


def check_threads(threads: int | None) -> None:
    """Refuse more threads than this machine has processors: they would only wait for each other.

    Raises:
        UsageError: below 1, or more than there are processors.
    """
    most = os.cpu_count() or 1
    if threads is not None and not 1 <= threads <= most:
        raise UsageError(
            f"--threads: expected 1 to {most}, this machine's processors, found {threads}",
            fix="leave it out for the target's own choice",
            param="threads",
        )


SPACE_ASIDE = 384 << 20
"""Of an address space with a limit, for stacks of threads and the allocator's arenas, which reserve tens of MiB each:
without it a server was ready, and aborted when its threads started."""


def host_budget(note: str = "") -> MemoryBudget:
    """What an engine may take of the machine's memory. ``note``: more about where the budget comes from."""
    source = f"{HOST_SHARE:.0%} of the memory available now"
    return MemoryBudget(int(available_memory() * HOST_SHARE), f"{source}; {note}" if note else source, shared=True)


def available_memory() -> int:
    """Bytes of memory this process may still take: the machine's, its control group's or its own limit's, the least."""
    import psutil

    available = int(psutil.virtual_memory().available)
    space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if space != resource.RLIM_INFINITY:
        available = min(available, max(0, space - psutil.Process().memory_info().vms - SPACE_ASIDE))
    left = memory_left()
    return available if left is None else min(available, left)
