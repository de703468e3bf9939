#!/usr/bin/env python3
"""What the page costs a server: output tokens per second of its streams with an open page and without, in turns.

    python scripts/ui_cost.py --model ./engine
    python scripts/ui_cost.py --model ./engine --streams 32 --seconds 30 --rounds 6 -- --threads 2

An open page is played by what it asks and how often (``/metrics``, ``/requests``, ``/ready``; the intervals are read
from its own files), so that no browser takes the machine's time. Every round is a window without the page and one with
it, their order changing from round to round; a ratio is one within a round. Exit code 1: the median is below
``--least``. Options after ``--`` are the server's.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from statistics import median

import aiohttp
from md_table import print_table
from served import Server, client_session, prompts, serving, stream

from llmctl.serving.page import FOLDER

PROMPT_TOKENS, OUTPUT_TOKENS = 64, 256
SETTLE_SECONDS = 3.0
TOKENS = "generation_tokens_total"


def interval(file: str, name: str) -> float:
    """The seconds that a constant of the page's files has."""
    (found,) = re.findall(rf"^const {name} = ([\d.]+);", (FOLDER / file).read_text(), re.MULTILINE)
    return float(found)


def asked() -> dict[str, float]:
    """What a page in its live view asks for, and every how many seconds."""
    return {
        "/metrics": interval("live.js", "METRICS_SECONDS"),
        "/requests": interval("live.js", "REQUEST_SECONDS"),
        "/ready": interval("app.js", "STATUS_SECONDS"),
    }


async def keep_streaming(session: aiohttp.ClientSession, server: Server, prompt: Sequence[int], first: int) -> None:
    """One stream after another, until cancelled; the ``first`` tokens of the first one, so that they do not all end at
    once."""
    tokens = first
    while True:
        await stream(session, server, prompt, tokens)
        tokens = OUTPUT_TOKENS


async def poll(session: aiohttp.ClientSession, url: str, seconds: float) -> None:
    """Ask as the page does: now, and so many seconds after each answer."""
    while True:
        async with session.get(url) as answer:
            answer.raise_for_status()
            await answer.read()
        await asyncio.sleep(seconds)


@asynccontextmanager
async def running(*work: asyncio.Task[None]) -> AsyncIterator[None]:
    """These while it lasts; one that ends by itself has failed."""
    try:
        yield
        for task in work:
            if task.done():
                task.result()
    finally:
        for task in work:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)


async def rate(server: Server, seconds: float) -> float:
    """Output tokens per second of the next ``seconds``."""
    await asyncio.sleep(SETTLE_SECONDS)
    began, before = time.perf_counter(), (await asyncio.to_thread(server.metrics))[TOKENS]
    await asyncio.sleep(seconds)
    after, ended = (await asyncio.to_thread(server.metrics))[TOKENS], time.perf_counter()
    return (after - before) / (ended - began)


async def measure(server: Server, streams: int, seconds: float, rounds: int) -> list[tuple[float, float]]:
    """Rates (without, with) of each round."""
    found: list[tuple[float, float]] = []
    async with client_session(headers=server.headers) as session, client_session(headers=server.headers) as page:
        work = [
            asyncio.create_task(keep_streaming(session, server, prompt, 1 + OUTPUT_TOKENS * i // streams))
            for i, prompt in enumerate(prompts(streams, PROMPT_TOKENS))
        ]
        async with running(*work):
            await rate(server, seconds)  # warms up
            for turn in range(rounds):
                rates: dict[bool, float] = {}
                for is_open in (turn % 2 == 1, turn % 2 == 0):
                    polls = asked() if is_open else {}
                    async with running(*(asyncio.create_task(poll(page, server.url + p, s)) for p, s in polls.items())):
                        rates[is_open] = await rate(server, seconds)
                found.append((rates[False], rates[True]))
                print(f"round {turn + 1}: {rates[False]:.1f} without, {rates[True]:.1f} with", file=sys.stderr)
    return found


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="an engine, or what serve makes one of")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=20.0, help="of a window")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--least", type=float, default=0.99, help="of the median ratio; below it the exit code is 1")
    parser.add_argument("options", nargs="*", help="of the server, after --")
    args = parser.parse_args()
    with serving(args.model, args.options) as server:
        found = asyncio.run(measure(server, args.streams, args.seconds, args.rounds))
    ratios = [with_page / without for without, with_page in found]
    rows = [
        [str(i + 1), f"{a:.1f}", f"{b:.1f}", f"{r:.4f}"]
        for i, ((a, b), r) in enumerate(zip(found, ratios, strict=True))
    ]
    rows.append(
        ["median", f"{median(a for a, _ in found):.1f}", f"{median(b for _, b in found):.1f}", f"{median(ratios):.4f}"]
    )
    print_table(["round", "tok/s without the page", "with it", "ratio"], rows)
    said = ", ".join(f"{path} every {seconds:g} s" for path, seconds in asked().items())
    print(f"\n{args.streams} streams, windows of {args.seconds:g} s; the page: {said}")
    return int(median(ratios) < args.least)


if __name__ == "__main__":
    sys.exit(main())
