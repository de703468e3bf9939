"""The lock between processes that build, or remove, one engine of the cache."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def build_lock(folder: Path, *, wait: bool = True) -> Iterator[Path]:
    """Hold the lock of an engine's folder; the system releases it if this process dies.

    Yields:
        The lock's file. Who holds the lock may remove it: who waits for it then makes another.

    Raises:
        BlockingIOError: not ``wait``, and another process holds it.
    """
    path = folder.with_name(f"{folder.name}.lock")
    while True:
        with path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if _is_at(file, path):
                yield path
                return


def is_locked(folder: Path) -> bool | None:
    """Whether a process holds it; None: nobody ever locked this folder, so that it has no lock's file."""
    try:
        with folder.with_name(f"{folder.name}.lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return None
    except BlockingIOError:
        return True
    return False


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
