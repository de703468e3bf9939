"""How far a command is: a bar for each thing that it counts, or plain lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from llmctl.artifact.memory import human_bytes

if TYPE_CHECKING:
    from rich.progress import TaskID

_IN_BYTES = "weights"
_COUNTED = frozenset({"kernels"})

Show = Callable[[str, str, int, int], None]
"""Shows how far something is: (what is counted, the one just done, done, in all); ``weights`` are counted in bytes."""


@contextmanager
def step_progress() -> Iterator[Show]:
    """A bar on a terminal, a line at each tenth otherwise; on stderr."""
    if not sys.stderr.isatty():
        yield PlainProgress()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[size]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[name]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def show(what: str, name: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total, name=name, size="")
            counted = (human_bytes(done), human_bytes(total)) if what == _IN_BYTES else (done, total)
            bar.update(tasks[what], completed=done, name=name, size="{} of {}".format(*counted))

        yield show


class PlainProgress:
    """A line when something begins and each time another tenth of it is done; what begins anew is counted anew."""

    def __init__(self) -> None:
        self._tenths: dict[str, int] = {}
        self._started: dict[str, tuple[float, int]] = {}

    def __call__(self, what: str, name: str, done: int, total: int) -> None:
        tenth = 10 * done // max(1, total)
        before, self._tenths[what] = self._tenths.get(what, 0), tenth
        begins = what not in self._started or tenth < before
        if begins:
            self._started[what] = (time.monotonic(), done)
        if begins or tenth > before:
            started, first = self._started[what]
            left = (time.monotonic() - started) * (total - done) / max(1, done - first)
            print(f"{what} {_share(what, done, total)} ({name}{time_left(left)})", file=sys.stderr, flush=True)


def _share(what: str, done: int, total: int) -> str:
    """``60%``, or ``3/20`` of what takes long a piece."""
    return f"{done}/{total}" if what in _COUNTED else f"{100 * done // max(1, total)}%"


def time_left(seconds: float) -> str:
    """``, 40 s left`` of a line; nothing under a second."""
    if seconds < 1:
        return ""
    return f", {seconds:.0f} s left" if seconds < 90 else f", {seconds / 60:.0f} min left"
