"""The worker killed and stopped under load."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from functools import partial

import psutil
from served import Server

from hostile.arena import Arena
from hostile.connections import stream_of
from hostile.wire import Answer, request

BACK_SECONDS = 120.0
POLL_SECONDS = 0.05
STOP_SECONDS = 5.0


def worker_of(server: Server) -> int | None:
    """Process id of the present worker; None while there is none."""
    for child in psutil.Process(server.pid).children():
        try:
            if child.status() != psutil.STATUS_ZOMBIE:
                return int(child.pid)
        except psutil.NoSuchProcess:
            continue
    return None


async def _ready(arena: Arena) -> Answer:
    return (await arena.address.exchange([request("GET", "/ready", {})]))[0]


async def _until_ready(arena: Arena, what: str) -> None:
    end = time.monotonic() + BACK_SECONDS
    while (found := await _ready(arena)).status != 200:
        if time.monotonic() > end:
            arena.tally.fault(f"{what}: /ready is not 200 within {BACK_SECONDS:g} s: {found.body!r}")
            return
        await asyncio.sleep(POLL_SECONDS)


async def kill(arena: Arena) -> None:
    """kill -9 while streams run and requests wait; another worker must come."""
    work = asyncio.create_task(arena.crowd([partial(arena.exchange, stream_of(arena, 60))] * 60, 60))
    await asyncio.sleep(1.0)
    worker = worker_of(arena.server)
    if worker is None:
        arena.tally.fault("there was no worker to kill")
    else:
        arena.kills.begin(time.monotonic())
        os.kill(worker, signal.SIGKILL)
        while psutil.pid_exists(worker) and worker_of(arena.server) == worker:
            await asyncio.sleep(POLL_SECONDS)
        while (await _ready(arena)).status == 200 and worker_of(arena.server) is None:
            await asyncio.sleep(POLL_SECONDS)
        await _until_ready(arena, "after a kill")
        arena.kills.end(time.monotonic())
    await work


async def stop(arena: Arena) -> None:
    """SIGSTOP for longer than --stall-timeout, and SIGCONT: /ready says so meanwhile, and nothing is lost."""
    work = asyncio.create_task(arena.crowd([partial(arena.exchange, stream_of(arena, 30))] * 30, 30))
    await asyncio.sleep(0.5)
    worker = worker_of(arena.server)
    if worker is None:
        arena.tally.fault("there was no worker to stop")
    else:
        os.kill(worker, signal.SIGSTOP)
        try:
            await asyncio.sleep(STOP_SECONDS)
            found = await _ready(arena)
            if found.status != 503 or (found.document() or {}).get("status") != "stalled":
                arena.tally.fault(f"stopped for {STOP_SECONDS:g} s: expected stalled, found {found.body!r}")
        finally:
            os.kill(worker, signal.SIGCONT)
        await _until_ready(arena, "after SIGCONT")
    await work
