#!/usr/bin/env python3
"""What the page costs a server: how long its streams take with an open page and without, in turns.

    python scripts/ui_cost.py --model ./engine
    python scripts/ui_cost.py --model ./engine --pages 1 --streams 32 --tokens 320 --rounds 24 -- --threads 2

An open page is played by what it asks and how often (``/metrics``, ``/requests``, ``/ready``; the intervals are read
from its own files), so that no browser takes the machine's time. One page's share is far below a machine's noise:
several are open at once (``--pages``), and what one costs is that root of the ratio. A window is the same streams from
their start to the end of the last one, so that nothing but their pace differs. Every round is three of them, in an
order that changes: two without pages, whose ratio shows what the machine's noise alone does, and one with them, held
against the mean of the two. Ratios are of output tokens per second, with their 95% intervals by ``bench compare``'s
statistics. Exit code 5: the interval of one page lies below ``--least``; 6: it reaches below, so that more rounds or a
quieter machine are wanted. Options after ``--`` are the server's.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import re
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from statistics import median, stdev

import aiohttp
from md_table import print_table
from served import Server, client_session, prompts, serving, stream

from llmctl.bench.ratios import Decision, Ratio, Tails, Worsening, paired_ratio
from llmctl.errors import ExitCode
from llmctl.serving.page import FOLDER

PROMPT_TOKENS = 64
WARM_UP = 2  # windows; their prompts are in the prefix cache from the first one on
CONFIDENCE = 0.95
ORDERS = (("without", "open", "again"), ("open", "without", "again"), ("without", "again", "open"))


@dataclass(frozen=True)
class Round:
    """Output tokens per second of three windows: without pages, without it once more, and with pages."""

    without: float
    again: float
    open: float

    @property
    def cost(self) -> float:
        """The logarithm of with / without."""
        return math.log(self.open) - (math.log(self.without) + math.log(self.again)) / 2

    @property
    def noise(self) -> float:
        """The logarithm of again / without."""
        return math.log(self.again / self.without)


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


async def poll(session: aiohttp.ClientSession, url: str, seconds: float, delay: float) -> None:
    """Ask as the page does: after ``delay``, and so many seconds after each answer."""
    await asyncio.sleep(delay)
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


async def window(session: aiohttp.ClientSession, server: Server, streams: int, tokens: int) -> float:
    """Output tokens per second of so many streams begun at once, until the last one has ended."""
    began = time.perf_counter()
    await asyncio.gather(*(stream(session, server, prompt, tokens) for prompt in prompts(streams, PROMPT_TOKENS)))
    return streams * tokens / (time.perf_counter() - began)


async def measure(server: Server, pages: int, streams: int, tokens: int, rounds: int) -> list[Round]:
    """Rates of each round."""
    found: list[Round] = []
    async with client_session(headers=server.headers) as session, client_session(headers=server.headers) as page:
        for _ in range(WARM_UP):
            await window(session, server, streams, tokens)
        for turn in range(rounds):
            rates: dict[str, float] = {}
            for kind in ORDERS[turn % len(ORDERS)]:
                polls = [
                    asyncio.create_task(poll(page, server.url + path, seconds, i / pages * seconds))
                    for path, seconds in asked().items()
                    for i in range(pages if kind == "open" else 0)
                ]
                async with running(*polls):
                    rates[kind] = await window(session, server, streams, tokens)
            found.append(Round(rates["without"], rates["again"], rates["open"]))
            print(f"round {turn + 1}/{rounds}: {pages} pages / without {math.exp(found[-1].cost):.4f}", file=sys.stderr)
    return found


def verdict(cost: Ratio, least: float) -> ExitCode:
    """What the interval of the ratio says of the least that is wanted."""
    decision = Worsening.of(cost, higher_is_better=True).decide(1 - least)
    return {Decision.PASS: ExitCode.OK, Decision.REGRESSION: ExitCode.REGRESSION}.get(decision, ExitCode.INCONCLUSIVE)


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="an engine, or what serve makes one of")
    parser.add_argument("--pages", type=int, default=20, help="open at once")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=320, help="of each stream")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--least", type=float, default=0.99, help="of the ratio of one page")
    parser.add_argument("options", nargs="*", help="of the server, after --")
    args = parser.parse_args()
    if args.rounds < 2 or args.pages < 1:
        parser.error("expected at least 2 rounds, which differ, and 1 page")
    with serving(args.model, args.options) as server:
        found = asyncio.run(measure(server, args.pages, args.streams, args.tokens, args.rounds))
    logs = {
        "without / without": [one.noise for one in found],
        f"{args.pages} pages / without": [one.cost for one in found],
        "1 page / without": [one.cost / args.pages for one in found],
    }
    ratios = {name: paired_ratio(values, Tails.alike(CONFIDENCE)) for name, values in logs.items()}
    rows = [
        [name, f"{ratio.value:.4f}", f"{ratio.low:.4f}–{ratio.high:.4f}", f"{stdev(logs[name]):.2%}"]
        for name, ratio in ratios.items()
    ]
    print_table(["output tok/s", "ratio", "95% interval", "standard deviation of a round"], rows)
    rate = median(one.without for one in found)
    said = ", ".join(f"{path} every {seconds:g} s" for path, seconds in asked().items())
    print(
        f"\n{args.rounds} rounds, {args.streams} streams of {args.tokens} tokens at {rate:.0f} tok/s; the page: {said}"
    )
    return int(verdict(ratios["1 page / without"], args.least))


if __name__ == "__main__":
    sys.exit(main())
