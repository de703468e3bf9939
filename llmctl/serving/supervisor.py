"""The worker as a child process: started with its settings on stdin, watched, and never left behind.

The pipe to the worker's stdin stays open for as long as this process lives; its end is how the worker learns of our
death on every platform (on Linux the kernel kills it as well, see ``llmctl.serving.worker``).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys

import msgspec

from llmctl.config import SECRET_OPTIONS, EngineOptions

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


class WorkerProcess:
    """A running ``python -m llmctl.serving.worker``."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls, settings: WorkerSettings, end: socket.socket) -> WorkerProcess:
        """Start the worker, which inherits its ``end`` of the channel.

        Call from the main thread, whose death the kernel then reports to the worker.
        """
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "llmctl.serving.worker"),
            stdin=asyncio.subprocess.PIPE,
            stdout=sys.__stderr__.fileno() if sys.__stderr__ else None,
            pass_fds=[end.fileno()],
            env={name: value for name, value in os.environ.items() if name not in _SECRET_VARIABLES},
        )
        assert process.stdin is not None
        with contextlib.suppress(ConnectionError):
            process.stdin.write(msgspec.json.encode(settings) + b"\n")
            await process.stdin.drain()
        return cls(process)

    @property
    def pid(self) -> int | None:
        """Its number; None once it has ended, when another process may have it."""
        return self._process.pid if self._process.returncode is None else None

    async def wait(self) -> int:
        """The exit status: negative for a signal."""
        return await self._process.wait()

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        with contextlib.suppress(ProcessLookupError):
            if self._process.returncode is None:
                self._process.kill()

    async def stop(self, timeout: float) -> int:
        """Wait up to ``timeout`` seconds for it to leave by itself, then kill it."""
        try:
            return await asyncio.wait_for(asyncio.shield(self.wait()), timeout)
        except TimeoutError:
            self.kill()
            return await self.wait()
