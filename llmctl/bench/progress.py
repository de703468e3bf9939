"""Progress and log lines on stderr: a rich bar on a terminal, a plain line now and then otherwise."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

_PLAIN_EVERY = 10.0


class Progress:
    """Counts steps of the current stage. ``advance`` costs little enough to be called for every request."""

    def __init__(self) -> None:
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None
        self._label = ""
        self._total = self._done = self._failed = 0
        self._last = 0.0

    def log(self, line: str) -> None:
        """One line of information."""
        if self._bar is not None:
            self._bar.console.print(line, highlight=False, markup=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def start(self, label: str, total: int) -> None:
        """Begin a stage of ``total`` steps, ending the one before."""
        self.stop()
        self._label, self._total, self._done, self._failed = label, total, 0, 0
        self._last = time.monotonic()
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(console=Console(stderr=True), transient=True, refresh_per_second=4)
            self._task = self._bar.add_task(label, total=total)
            self._bar.start()

    def advance(self, failed: bool = False) -> None:
        """One step is done."""
        self._done += 1
        self._failed += failed
        if self._bar is not None and self._task is not None:
            label = f"{self._label} ({self._failed} failed)" if self._failed else self._label
            self._bar.update(self._task, advance=1, description=label)
        elif time.monotonic() - self._last >= _PLAIN_EVERY:
            self._last = time.monotonic()
            tail = f", {self._failed} failed" if self._failed else ""
            self.log(f"{self._label}: {self._done}/{self._total}{tail}")

    def stop(self) -> None:
        """End the stage."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None
