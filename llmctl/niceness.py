"""Processors go to the API process first where the worker computes on them.

Two threads that compute leave a machine of two processors no idle moment: what answers clients takes its time from
theirs. Of equals a scheduler gives each its share, after some milliseconds; the nicer ones wait (measured on two
processors that share a core, five minutes of ``scripts/soak.py --hostile``: 99th percentile of /health 52 ms and 2,356
answers without, 43 ms and 2,728 with a niceness of 5).
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from pathlib import Path

_THREADS = Path("/proc/self/task")


def be_nice(more: int) -> None:
    """Make all threads of this process, and those they start later, so much nicer than they were.

    Linux has it by thread; where there is no list of them, the process is asked for.
    """
    if not more:
        return
    for thread in [int(task.name) for task in _THREADS.iterdir()] if _THREADS.is_dir() else [0]:
        with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
            _add(thread, more)


def be_a_nice_thread(more: int) -> None:
    """Make the calling thread so much nicer than it is, where threads have a niceness of their own."""
    if sys.platform == "linux":
        _add(threading.get_native_id(), more)


def _add(thread: int, more: int) -> None:
    os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + more)  # at most 19
