#!/usr/bin/env python3
"""What the server path costs beside the model: the share of a core that the API process and the worker's Python take.

    python scripts/profile_server.py --model ENGINE [--streams 1,8,32] [--output-len 128] [--json]

Starts ``llmctl serve`` on an engine, runs N streams at once for each N, and reads processor times from the system and
the engine's own counters from /metrics. The API process counts with all its threads. The worker's Python is the wall
time of its steps less that in which the model computed; on a machine that does other work too it is overstated.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import IO, Any

import aiohttp
import psutil
from rich.console import Console
from rich.table import Table

READY_SECONDS = 180
STOP_SECONDS = 30
COUNTERS = ("engine_steps_total", "engine_busy_seconds_total", "engine_compute_seconds_total")


@dataclass(frozen=True)
class Row:
    """What N streams cost. Shares are of one core; times in microseconds."""

    streams: int
    tokens: int
    tokens_per_second: float
    api_share: float
    api_us_per_token: float
    worker_python_share: float
    worker_python_us_per_step: float
    step_us: float
    worker_cores: float


class Server:
    """A running ``llmctl serve``: its address and its two processes."""

    def __init__(self, url: str, process: subprocess.Popen[bytes]) -> None:
        self.url = url
        self._api = psutil.Process(process.pid)
        (self._worker,) = self._api.children()
        self.model = json.loads(get(url + "/v1/models"))["data"][0]["id"]

    def clocks(self) -> list[float]:
        """Wall time, and processor time of the two processes, seconds."""
        return [time.perf_counter(), *(sum(p.cpu_times()[:2]) for p in (self._api, self._worker))]

    def counters(self) -> list[float]:
        """COUNTERS, as /metrics has them."""
        values = {}
        for line in get(self.url + "/metrics").decode().splitlines():
            name = line.partition("{")[0].removeprefix("llmctl:")
            if name in COUNTERS:
                values[name] = float(line.rsplit(" ", 1)[1])
        return [values[name] for name in COUNTERS]


def get(url: str) -> bytes:
    """A body; raises OSError unless the status is 200."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        return bytes(answer.read())


@contextlib.contextmanager
def serving(model: str, extra: list[str]) -> Iterator[Server]:
    """``llmctl serve`` on a free port, ready."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = [sys.executable, "-m", "llmctl.cli.main", "serve", "--model", model, "--port", str(port), *extra]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            wait_ready(f"http://127.0.0.1:{port}", process, log)
            yield Server(f"http://127.0.0.1:{port}", process)
        finally:
            stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the server; one that does not end in time is killed with its children."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        print(f"the server did not end within {STOP_SECONDS} s of SIGTERM: killed", file=sys.stderr)
        for member in (*psutil.Process(process.pid).children(recursive=True), process):
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()


def wait_ready(url: str, process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
    """Until /ready answers 200; exits with the server's words when it ends first."""
    end = time.monotonic() + READY_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            log.seek(0)
            sys.exit(log.read().decode().strip())
        try:
            get(url + "/ready")
            return
        except OSError:
            time.sleep(0.05)
    sys.exit(f"the server was not ready within {READY_SECONDS} s")


async def run_streams(server: Server, streams: int, prompt_tokens: int, output_tokens: int) -> None:
    """N streams at once, each with a prompt of its own; what they answer is read and thrown away."""
    ids = random.Random(streams)
    body: dict[str, Any] = {"model": server.model, "max_tokens": output_tokens, "ignore_eos": True}
    body |= {"temperature": 0, "stream": True}

    async def one(session: aiohttp.ClientSession) -> None:
        prompt = [ids.randrange(1000, 10_000) for _ in range(prompt_tokens)]
        async with session.post(server.url + "/v1/completions", json={**body, "prompt": prompt}) as answer:
            answer.raise_for_status()
            tail = b""
            async for data in answer.content.iter_any():
                tail = (tail + data)[-64:]
            if b"[DONE]" not in tail:
                sys.exit("a stream ended early")

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:
        await asyncio.gather(*[one(session) for _ in range(streams)])


def measure(server: Server, streams: int, prompt_tokens: int, output_tokens: int) -> Row:
    """One row of the table."""
    counters, clocks = server.counters(), server.clocks()  # in this order: asking for the metrics costs time as well
    asyncio.run(run_streams(server, streams, prompt_tokens, output_tokens))
    wall, api, worker = (b - a for a, b in zip(clocks, server.clocks(), strict=True))
    steps, busy, compute = (b - a for a, b in zip(counters, server.counters(), strict=True))
    tokens, python = streams * output_tokens, busy - compute
    return Row(
        streams=streams,
        tokens=tokens,
        tokens_per_second=tokens / wall,
        api_share=api / wall,
        api_us_per_token=1e6 * api / tokens,
        worker_python_share=python / wall,
        worker_python_us_per_step=1e6 * python / steps,
        step_us=1e6 * busy / steps,
        worker_cores=worker / wall,
    )


def show(rows: list[Row]) -> None:
    """The rows as a table."""
    table = Table()
    names = (
        "streams",
        "tok/s",
        "API of a core",
        "us/token",
        "Python of worker",
        "us/step",
        "whole step",
        "worker cores",
    )
    for name in names:
        table.add_column(name, justify="right")
    for r in rows:
        table.add_row(
            *(str(r.streams), f"{r.tokens_per_second:.0f}", f"{r.api_share:.1%}", f"{r.api_us_per_token:.0f}"),
            *(f"{r.worker_python_share:.1%}", f"{r.worker_python_us_per_step:.0f}", f"{r.step_us:.0f}"),
            f"{r.worker_cores:.2f}",
        )
    Console(width=120).print(table)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Share of a core that serving costs beside the model.")
    parser.add_argument("--model", required=True, help="an engine, or anything that llmctl serve takes")
    parser.add_argument("--streams", default="1,8,32", help="numbers of streams, comma-separated (1,8,32)")
    parser.add_argument("--prompt-len", type=int, default=32, help="tokens of each prompt (32)")
    parser.add_argument("--output-len", type=int, default=256, help="tokens of each answer (256)")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    args, extra = parser.parse_known_args()  # the rest is for llmctl serve
    counts = [int(n) for n in args.streams.split(",")]
    with serving(args.model, extra) as server:
        asyncio.run(run_streams(server, max(counts), args.prompt_len, 8))  # warm-up
        rows = [measure(server, n, args.prompt_len, args.output_len) for n in counts]
    if args.json:
        print(json.dumps([asdict(row) for row in rows]))
    else:
        show(rows)


if __name__ == "__main__":
    main()
