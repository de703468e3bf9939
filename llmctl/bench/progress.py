"""Progress and log lines on stderr: a rich bar on a terminal, a plain line now and then otherwise."""

from __future__ import annotations

import sys
import threading
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
        self._teller: threading.Thread | None = None
        self._ended = threading.Event()
        self._reset("", 0)

    def log(self, line: str) -> None:
        """One line of information."""
        if self._bar is not None:
            self._bar.console.print(line, highlight=False, markup=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def start(self, label: str, total: int) -> None:
        """Begin a stage of ``total`` steps, ending the one before."""
        self.stop()
        self._reset(label, total)
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(console=Console(stderr=True), transient=True, refresh_per_second=4)
            self._task = self._bar.add_task(label, total=total)
            self._bar.start()
        else:
            self._ended = threading.Event()
            self._teller = threading.Thread(target=self._tell, args=(self._ended,), name="progress", daemon=True)
            self._teller.start()

    def sent(self) -> None:
        """A step has begun that ends later, beside others: a request."""
        self._sent += 1
        self._update(0)

    def advance(self, failed: bool = False) -> None:
        """One step is done."""
        self._done += 1
        self._failed += failed
        self._update(1)

    def stop(self) -> None:
        """End the stage."""
        self._ended.set()
        if self._teller is not None:
            self._teller.join()
            self._teller = None
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None

    def _reset(self, label: str, total: int) -> None:
        self._label, self._total = label, total
        self._sent = self._done = self._failed = 0

    @property
    def _state(self) -> str:
        """``, 8 running, 1 failed``: what there is of both."""
        running = self._sent - self._done
        return (f", {running} running" if running > 0 else "") + (f", {self._failed} failed" if self._failed else "")

    def _update(self, steps: int) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=steps, description=self._label + self._state)

    def _tell(self, ended: threading.Event) -> None:
        """A line now and then, while nothing ends too."""
        while not ended.wait(_PLAIN_EVERY):
            sent = f"{self._sent} sent, " if self._sent else ""
            self.log(f"{self._label}: {sent}{self._done}/{self._total} done{self._state}")
