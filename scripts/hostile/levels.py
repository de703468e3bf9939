"""What a server's two processes hold: memory, open files, threads; and what its engine does."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import psutil
from process_memory import memory
from served import Server

from hostile.workers import worker_of

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Levels:
    """An idle moment. Memory: MiB, private."""

    api_mib: float
    worker_mib: float
    api_fds: int
    worker_fds: int
    api_threads: int
    worker_threads: int
    running: int
    waiting: int
    kv_share: float

    @property
    def idle(self) -> bool:
        """Whether the engine has nothing."""
        return not (self.running or self.waiting or self.kv_share)


def levels(server: Server) -> Levels:
    """Now.

    Raises:
        RuntimeError: there is no worker.
    """
    pid = worker_of(server)
    if pid is None:
        raise RuntimeError("the server has no worker")
    api, worker = psutil.Process(server.pid), psutil.Process(pid)
    found = server.metrics()
    return Levels(
        api_mib=round(memory(api)[0], 1),
        worker_mib=round(memory(worker)[0], 1),
        api_fds=api.num_fds(),
        worker_fds=worker.num_fds(),
        api_threads=api.num_threads(),
        worker_threads=worker.num_threads(),
        running=int(found["num_requests_running"]),
        waiting=int(found["num_requests_waiting"]),
        kv_share=found["kv_cache_usage_perc"],
    )


async def settled(server: Server, patience: float, most_fds: int | None = None) -> Levels:
    """The levels once the engine is idle and connections are closed (at most ``most_fds`` open), or after
    ``patience`` seconds."""
    end = time.monotonic() + patience
    while True:
        found = await asyncio.to_thread(levels, server)
        if (found.idle and (most_fds is None or found.api_fds <= most_fds)) or time.monotonic() > end:
            return found
        await asyncio.sleep(POLL_SECONDS)


class Peak:
    """The most memory that the API process was seen with."""

    def __init__(self, server: Server) -> None:
        self.api_mib = 0.0
        self._process = psutil.Process(server.pid)

    async def watch(self) -> None:
        """For ever."""
        while True:
            self.api_mib = max(self.api_mib, round(memory(self._process)[0], 1))
            await asyncio.sleep(POLL_SECONDS)
