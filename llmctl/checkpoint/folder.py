"""Publish a folder or a file atomically: built beside its final name, every file fsynced, then renamed into place."""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmctl.errors import UsageError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def check_parent(output: Path) -> None:
    """Refuse an ``--output`` below something that is no folder.

    Raises:
        UsageError: naming it.
    """
    for parent in output.absolute().parents:
        if parent.is_dir():
            return
        if parent.exists() or parent.is_symlink():
            raise UsageError(f"--output {output}: {parent} is not a folder", fix="name another folder", param="output")


def writer_lives(temporary: Path) -> bool:
    """Whether the process whose number ends a temporary's name lives, as far as the system says; False without one."""
    pid = temporary.name.rpartition("-")[2]
    return pid.isdigit() and (Path(f"/proc/{pid}").exists() or not Path("/proc").exists())


@contextmanager
def published_folder(final: Path) -> Iterator[Path]:
    """A new folder to fill; on success it takes the place of ``final``, on any error it is removed.

    The caller has checked that whatever is at ``final`` may be replaced. Nobody ever sees a half-written ``final``.
    """
    with _beside(final) as temporary:
        yield temporary
        _sync_tree(temporary)
        _move_into_place(temporary, final)
        _sync(final.parent)


@contextmanager
def published_file(final: Path) -> Iterator[Path]:
    """As ``published_folder``, for one file: the path to write it to, which has ``final``'s name."""
    with _beside(final) as temporary:
        yield temporary / final.name
        _sync_tree(temporary)
        os.rename(temporary / final.name, final)
        _sync(final.parent)


@contextmanager
def _beside(final: Path) -> Iterator[Path]:
    """A temporary folder beside ``final``, removed in the end; leftovers of processes that are gone go first."""
    final.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(final)
    temporary = final.with_name(f".{final.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
    except OSError as error:
        if error.errno in _NO_ROOM and error.filename is None:  # written to an open file: it does not say where
            error.filename = str(final)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move_into_place(temporary: Path, final: Path) -> None:
    if not final.exists():
        os.rename(temporary, final)
    elif not _exchange(temporary, final):
        # Without an atomic exchange there is an instant at which nothing is at `final`; never something half written.
        old = final.with_name(f".{final.name}.old-{os.getpid()}")
        os.rename(final, old)
        try:
            os.rename(temporary, final)
        except OSError:
            os.rename(old, final)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step (Linux's renameat2); False where the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return int(rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)) == 0


def _remove_abandoned(final: Path) -> None:
    """Remove what a build that was killed left beside ``final``; put back what it had moved aside."""
    for old in _abandoned(final, "old"):
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(old, final)
    for temporary in _abandoned(final, "tmp"):
        shutil.rmtree(temporary, ignore_errors=True)


def _abandoned(final: Path, kind: str) -> Iterator[Path]:
    """Folders of processes that are gone, as far as the system says which are."""
    for path in sorted(final.parent.glob(f".{glob.escape(final.name)}.{kind}-*")):
        if path.name.rpartition("-")[2].isdigit() and not writer_lives(path):
            yield path


def _sync_tree(folder: Path) -> None:
    for parent, _, files in os.walk(folder, topdown=False):
        for name in files:
            _sync(Path(parent, name))
        _sync(Path(parent))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
