"""Memory of a process, and of one with its descendants."""

from __future__ import annotations

import psutil


def memory(process: psutil.Process) -> tuple[float, float]:
    """Private and resident memory, MiB."""
    info = process.memory_info()
    # Not USS: pages of shared libraries leave and enter it as other processes come and go.
    return (info.rss - getattr(info, "shared", 0)) / 2**20, info.rss / 2**20


def tree_memory(process: psutil.Process) -> tuple[float, float]:
    """The same of a process and its descendants together."""
    found = [memory(member) for member in (process, *process.children(recursive=True))]
    return round(sum(private for private, _ in found), 2), round(sum(resident for _, resident in found), 2)
