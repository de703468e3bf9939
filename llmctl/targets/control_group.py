"""What this process's control groups allow it (cgroup v2): containers, and services with limits.

A limit of any group from the process's own up to the root of what it can see holds. Formats: the kernel's
Documentation/admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def memory_left() -> int | None:
    """Bytes that the tightest memory limit leaves; None: no limit. Cached file pages that were not used lately count as
    free, because the kernel drops them first (the working set, as Kubernetes reckons it)."""
    left = [_memory_left(group) for group in _groups()]
    return min((one for one in left if one is not None), default=None)


def cpu_quota() -> float | None:
    """Processors' worth of time that the tightest quota allows; None: no quota."""
    quotas = [_quota(group) for group in _groups()]
    return min((one for one in quotas if one is not None), default=None)


def _groups() -> Iterator[Path]:
    """The folders of the process's group and those above it, within what it can see of them."""
    try:
        lines = MEMBERSHIP.read_text().splitlines()
    except OSError:
        return
    own = next((line[3:] for line in lines if line.startswith("0::")), None)
    if own is None or ".." in Path(own).parts:
        own = "/"
    group = ROOT / own.lstrip("/")
    while group != ROOT:
        yield group
        group = group.parent
    yield ROOT


def _memory_left(group: Path) -> int | None:
    limit, used = _number(group / "memory.max"), _number(group / "memory.current")
    if limit is None or used is None:
        return None
    return max(0, limit - max(0, used - _inactive_file(group)))


def _inactive_file(group: Path) -> int:
    try:
        lines = (group / "memory.stat").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
    except (OSError, ValueError, IndexError, StopIteration):
        return 0


def _quota(group: Path) -> float | None:
    try:
        quota, period = (group / "cpu.max").read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # "max": none
        return None


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # "max": none
        return None
