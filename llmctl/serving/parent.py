"""A process that ends with the one that started it, whatever ends that: on Linux the kernel sees to it.

Run as a script, ``parent.py PID COMMAND…`` becomes a command that gets SIGTERM when process PID, its parent, is gone.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with_parent(number: int, parent_pid: int) -> bool:
    """Have this process sent a signal when the thread that started it ends; on Linux only.

    It outlives ``exec``, and is not for children of this process.

    Returns:
        Whether the parent lived when that was settled: one that died before sends nothing.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
    return os.getppid() == parent_pid


def ending_with_this(command: list[str]) -> list[str]:
    """The command, to be started by this thread, which SIGTERM ends when this thread is gone; on Linux only."""
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command]


def main() -> None:
    """Become the command of ``sys.argv``."""
    parent_pid, command = int(sys.argv[1]), sys.argv[2:]
    if not end_with_parent(signal.SIGTERM, parent_pid):
        sys.exit(1)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"error: {command[0]}: {error.strerror}")


if __name__ == "__main__":
    main()
