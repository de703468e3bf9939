"""The worker as a child process that runs: watched, ended, and what its end says."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import threading


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
