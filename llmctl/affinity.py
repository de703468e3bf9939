"""Which processors a process runs on: a list as taskset(1) and cpuset(7) write it, and this process kept to it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

from llmctl.errors import UsageError

_THREADS = Path("/proc/self/task")
_PART = re.compile(r"([0-9]{1,6})(?:-([0-9]{1,6}))?")


def parse_cpus(text: str, param: str) -> tuple[int, ...]:
    """The processors of a list such as ``0-3,8``, each once, in order. ``param``: whose value it is.

    Raises:
        UsageError: it is no such list, a range runs backwards, or this system keeps no process to processors.
    """
    option = f"--{param.replace('_', '-')}"
    if not hasattr(os, "sched_setaffinity"):
        raise UsageError(f"{option}: {sys.platform} keeps no process to processors; Linux does", param=param)
    parts = [_PART.fullmatch(part.strip()) for part in text.split(",")]
    ranges = [(int(part[1]), int(part[2] or part[1])) for part in parts if part is not None]
    if len(ranges) < len(parts) or any(first > last for first, last in ranges):
        raise UsageError(
            f"{option}: expected processors as numbers and ranges such as 0-3,8, found '{text}'", param=param
        )
    # Numbers of processors may have gaps, so that there are fewer than the last one says.
    end = max((os.cpu_count() or 1) - 1, *os.sched_getaffinity(0))
    if (most := max(last for _, last in ranges)) > end:
        raise UsageError(
            f"{option}: expected 0 to {end}, this machine's processors, found {most}",
            fix="lscpu --extended lists them",
            param=param,
        )
    return tuple(sorted({cpu for first, last in ranges for cpu in range(first, last + 1)}))


def written(cpus: Iterable[int]) -> str:
    """``parse_cpus``'s list of these processors, as short as it gets."""
    return ",".join(_ranges(sorted(cpus)))


def _ranges(cpus: list[int]) -> Iterator[str]:
    for _, run in groupby(enumerate(cpus), lambda pair: pair[1] - pair[0]):
        numbers = [cpu for _, cpu in run]
        yield str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"


def run_on(cpus: tuple[int, ...], param: str) -> None:
    """Keep all threads of this process, and those they start later, to these processors; none: leave them as they are.

    Raises:
        UsageError: some of them are not this process's to use (a container's cpuset).
    """
    if not cpus:
        return
    threads = [int(task.name) for task in _THREADS.iterdir()]
    refused = False
    for thread in threads:
        try:
            os.sched_setaffinity(thread, cpus)
        except ProcessLookupError:  # it ended meanwhile
            continue
        except OSError:  # EINVAL: not one of them
            refused = True
    # The kernel leaves out, in silence, what a cpuset does not allow.
    if refused or os.sched_getaffinity(0) != set(cpus):
        option = f"--{param.replace('_', '-')}"
        raise UsageError(
            f"{option} {written(cpus)}: this process may not use all of them (cpuset)",
            fix="cat /sys/fs/cgroup/cpuset.cpus.effective says which",
            param=param,
        )
