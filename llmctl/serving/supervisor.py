"""The worker as a child process: started, given its settings on stdin, watched, and never left behind.

It is started before there is anything to tell it: its imports take as long as those of the API process, and run beside
them on another core.

The pipe to the worker's stdin stays open for as long as this process lives; its end is how the worker learns of our
death on every platform (on Linux the kernel kills it as well, see ``llmctl.serving.worker``).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator

import msgspec

from llmctl.config import SECRET_OPTIONS, EngineOptions
from llmctl.serving.transport import socket_pair

FOR_ITS_PARENT = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
"""Signals that a terminal and a service manager send to the whole group, and that no worker hears."""
_SECRET_VARIABLES = frozenset(f"LLMCTL_{name.upper()}" for name in SECRET_OPTIONS)


class WorkerSettings(msgspec.Struct, frozen=True):
    """One JSON line on the worker's stdin.

    ``channel`` is the descriptor of the worker's end of the channel; ``idle_seconds``: see ``EngineLoop``.
    """

    config: EngineOptions
    channel: int
    parent_pid: int
    log_level: str = "info"
    idle_seconds: float = 10.0


def describe_exit(code: int) -> str:
    """An exit status in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = "; the system may have run out of memory" if name == "SIGKILL" else ""
    return f"killed by {name}{hint}"


def exit_reason(code: int) -> str:
    """An exit status as one of few words, for a label: the signal's name, or ``exit``."""
    return describe_exit(code).removeprefix("killed by ").partition(";")[0] if code < 0 else "exit"


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
                env={name: value for name, value in os.environ.items() if name not in _SECRET_VARIABLES},
            )

    def tell(self, config: EngineOptions, log_level: str, idle_seconds: float) -> WorkerProcess:
        """Give it its settings; call in the event loop."""
        assert self.process.stdin is not None
        settings = WorkerSettings(config, self._end, os.getpid(), log_level, idle_seconds)
        with contextlib.suppress(ConnectionError):
            self.process.stdin.write(msgspec.json.encode(settings) + b"\n")
            self.process.stdin.flush()
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


class WorkerProcess:
    """A running worker."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        """Watch it; call in the event loop."""
        self._process = process
        self._ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        threading.Thread(target=self._watch, name="worker-watch", daemon=True).start()

    def _watch(self) -> None:
        code = self._process.wait()
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._ended.get_loop().call_soon_threadsafe(self._set_ended, code)

    def _set_ended(self, code: int) -> None:
        if not self._ended.done():
            self._ended.set_result(code)

    @property
    def pid(self) -> int | None:
        """Its number; None once it has ended, when another process may have it."""
        return self._process.pid if self._process.returncode is None else None

    async def wait(self) -> int:
        """The exit status: negative for a signal."""
        return await asyncio.shield(self._ended)

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        self._process.kill()

    async def stop(self, timeout: float) -> int:
        """Wait up to ``timeout`` seconds for it to leave by itself, then kill it."""
        try:
            return await asyncio.wait_for(self.wait(), timeout)
        except TimeoutError:
            self.kill()
            return await self.wait()
