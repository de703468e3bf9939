"""A worker process from its first moment until it is told what to do.

It is started before there is anything to tell it, and before this process has imported what it needs itself: the
worker's imports take as long, and run beside them on another core. So this module imports next to nothing.

The pipe to the worker's stdin stays open for as long as this process lives; its end is how the worker learns of our
death on every platform (on Linux the kernel kills it as well, see ``llmctl.serving.worker``).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from llmctl.secret_options import SECRET_VARIABLES
from llmctl.serving.transport import socket_pair

if TYPE_CHECKING:
    from llmctl.config import EngineOptions
    from llmctl.serving.supervisor import WorkerProcess
    from llmctl.serving.worker_settings import Processors

FOR_ITS_PARENT = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
"""Signals that a terminal and a service manager send to the whole group, and that no worker hears."""


@contextlib.contextmanager
def _held_back(signals: Iterable[signal.Signals]) -> Iterator[None]:
    """Signals to this thread wait meanwhile."""
    was = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, was)


class SpawnedWorker:
    """A ``python -m llmctl.serving.worker`` that imports, and waits for its settings.

    Attributes:
        channel: the API process's end of the channel to it.
    """

    def __init__(self) -> None:
        """Start it. Call from the main thread, whose death the kernel then reports to the worker."""
        self.channel, theirs = socket_pair()
        with theirs, _held_back(FOR_ITS_PARENT):  # in the child, which inherits it, until it can ignore them
            self._end = theirs.fileno()
            self.process = subprocess.Popen(
                [sys.executable, "-m", "llmctl.serving.worker"],
                stdin=subprocess.PIPE,
                stdout=sys.__stderr__.fileno() if sys.__stderr__ else None,
                pass_fds=[self._end],
                env={name: value for name, value in os.environ.items() if name not in SECRET_VARIABLES},
            )

    def tell(self, config: EngineOptions, log_level: str, idle_seconds: float, processors: Processors) -> None:
        """Give it its settings."""
        import msgspec

        from llmctl.serving.worker_settings import WorkerSettings

        assert self.process.stdin is not None
        settings = WorkerSettings(config, self._end, os.getpid(), log_level, idle_seconds, processors)
        with contextlib.suppress(ConnectionError):
            self.process.stdin.write(msgspec.json.encode(settings) + b"\n")
            self.process.stdin.flush()

    def watch(self) -> WorkerProcess:
        """Watch it from now on; call in the event loop."""
        from llmctl.serving.supervisor import WorkerProcess

        return WorkerProcess(self.process)


@contextlib.contextmanager
def early_worker() -> Iterator[SpawnedWorker]:
    """A worker for who will serve, ended at the latest when that is over."""
    spawned = SpawnedWorker()
    try:
        yield spawned
    finally:
        spawned.channel.close()
        if spawned.process.poll() is None:
            spawned.process.kill()
            spawned.process.wait()
