#!/usr/bin/env python3
"""What the server path costs beside the model, and what waiting requests cost those that run.

    python scripts/profile_server.py --model ENGINE [--streams 1,8,32] [--output-len 256] [--json]
    python scripts/profile_server.py --model ENGINE --streams 8 --queued 256 [--rounds 5] [--window 2] [--json]

Starts ``llmctl serve`` on an engine, runs N streams at once for each N, and reads processor times from the system and
the engine's own counters from /metrics. The API process counts with all its threads. The worker's Python is the wall
time of its steps less that in which the model computed; on a machine that does other work too it is overstated.

With ``--queued`` it compares steps while nothing waits with steps while that many requests wait (``server_queue.py``
says how), on a server of its own for each N, with N seats.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

import aiohttp
import psutil
from md_table import print_table
from served import Server, client_session, prompts, serving, stream
from server_queue import BUSY, COMPUTE, STEPS, TIMES, QueueRow, play_round

Found = TypeVar("Found", "Row", QueueRow)


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


class Clocks:
    """Wall time, and processor time of a server's two processes."""

    def __init__(self, server: Server) -> None:
        self._api = psutil.Process(server.pid)
        (self._worker,) = self._api.children()

    def read(self) -> list[float]:
        """(wall, API process, worker), seconds."""
        return [time.perf_counter(), *(sum(p.cpu_times()[:2]) for p in (self._api, self._worker))]


async def run_streams(server: Server, streams: int, prompt_tokens: int, output_tokens: int) -> None:
    """N streams at once, each with a prompt of its own."""
    async with client_session() as session:
        await asyncio.gather(*[stream(session, server, p, output_tokens) for p in prompts(streams, prompt_tokens)])


def measure(server: Server, streams: int, prompt_tokens: int, output_tokens: int) -> Row:
    """One row of the table."""
    clocks = Clocks(server)
    counted, began = server.metrics(), clocks.read()  # in this order: asking for the metrics costs time as well
    asyncio.run(run_streams(server, streams, prompt_tokens, output_tokens))
    wall, api, worker = (b - a for a, b in zip(began, clocks.read(), strict=True))
    found = server.metrics()
    steps, busy, compute = (found[name] - counted[name] for name in (STEPS, BUSY, COMPUTE))
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


def show_streams(rows: list[Row]) -> None:
    """What streams cost."""
    head = ("streams", "tok/s", "API of a core", "us/token", "Python of worker", "us/step", "whole step, us")
    lines = [
        (
            *(str(r.streams), f"{r.tokens_per_second:.0f}", f"{r.api_share:.1%}", f"{r.api_us_per_token:.0f}"),
            *(f"{r.worker_python_share:.1%}", f"{r.worker_python_us_per_step:.0f}", f"{r.step_us:.0f}"),
            f"{r.worker_cores:.2f}",
        )
        for r in rows
    ]
    print_table((*head, "worker cores"), lines, "---:")


def show_queue(rows: list[QueueRow]) -> None:
    """What a queue costs."""
    head = ("running", "waiting", "time", "none waits, us", "they wait, us", "ratio", "range", "ratio at submission")
    lines = [
        (
            *(str(r.running), str(r.waiting), TIMES[r.time], f"{r.alone:.0f}", f"{r.queued:.0f}", f"{r.ratio:.3f}"),
            *("{:.3f} to {:.3f}".format(*r.ratio_range), f"{r.submission_ratio:.2f}"),
        )
        for r in rows
    ]
    print_table(head, lines, "---:")


def profile(args: argparse.Namespace, counts: Sequence[int], extra: list[str]) -> list[Row]:
    """What so many streams cost."""
    with serving(args.model, extra) as server:
        asyncio.run(run_streams(server, max(counts), args.prompt_len, 8))  # warm-up
        return [measure(server, n, args.prompt_len, args.output_len) for n in counts]


def profile_queue(args: argparse.Namespace, counts: Sequence[int], extra: list[str]) -> list[QueueRow]:
    """What ``args.queued`` waiting requests cost so many running ones."""
    rows, sizes = [], (args.queued, args.prompt_len, args.window)
    for count in counts:
        with serving(args.model, ["--max-num-seqs", str(count), *extra]) as server:
            asyncio.run(run_streams(server, count, args.prompt_len, 8))  # warm-up
            rounds = [asyncio.run(play_round(server, count, *sizes)) for _ in range(args.rounds)]
        rows += [QueueRow.of(count, args.queued, time, rounds) for time in TIMES]
    return rows


def report(rows: list[Found], show: Callable[[list[Found]], None], as_json: bool) -> None:
    """The rows on stdout."""
    if as_json:
        print(json.dumps([asdict(row) for row in rows]))
    else:
        show(rows)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="What serving costs beside the model, and what a queue costs.")
    parser.add_argument("--model", required=True, help="an engine, or anything that llmctl serve takes")
    parser.add_argument("--streams", default="1,8,32", help="numbers of streams, comma-separated (1,8,32)")
    parser.add_argument("--prompt-len", type=int, default=32, help="tokens of each prompt (32)")
    parser.add_argument("--output-len", type=int, default=256, help="tokens of each answer (256)")
    parser.add_argument("--queued", type=int, help="measure steps while so many requests wait, against none")
    parser.add_argument("--rounds", type=int, default=5, help="with --queued: repeats (5)")
    parser.add_argument("--window", type=float, default=2.0, help="with --queued: seconds of each window (2)")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    args, extra = parser.parse_known_args()  # the rest is for llmctl serve
    counts = [int(n) for n in args.streams.split(",")]
    try:
        if args.queued:
            report(profile_queue(args, counts, extra), show_queue, args.json)
        else:
            report(profile(args, counts, extra), show_streams, args.json)
    except (RuntimeError, OSError, aiohttp.ClientError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
