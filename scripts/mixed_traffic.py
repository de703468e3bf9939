"""One run of a mixed load on a server: chats alone, then the same chats beside long prompts and one tenant's queue.

Each chat is a tenant of its own (field ``user``) and goes on turn after turn. Once all of them stream, a hog sends all
its short requests at once, and then the long prompts come, ``LONG_GAP_SECONDS`` apart, each of its own tenant. Chats
begin turns until that load is done. Figures are those of ``llmctl.bench.metrics``; of the turns that began before the
load only the gaps between tokens count that ended after it had come.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import aiohttp
from served import Server, client_session

from llmctl.bench import stats
from llmctl.bench.client import Target, send
from llmctl.bench.endpoint import CHAT, COMPLETIONS, Endpoint, server_counter
from llmctl.bench.metrics import MetricOptions, RequestRecord, failure_summary, run_metrics
from llmctl.bench.workloads import LengthRange, WorkItem, random_items

LONG_GAP_SECONDS = 1.0
REQUEST_SECONDS = 1800.0
POLL_SECONDS = 0.01
BODY: Mapping[str, Any] = {"temperature": 0, "ignore_eos": True, "skip_special_tokens": False}
"""So that every request makes all its tokens, and every token is a chunk with text."""
CLASSES = ("alone", "chat", "long", "hog", "all")
"""Of requests: chats before the load, turns begun beside it, long prompts, the hog's; all of the latter three."""
RATIOS = ("median_ttft_ms", "p99_ttft_ms", "median_itl_ms", "p99_itl_ms")
"""Figures of chats that are also given as ratios to those of the same chats alone, as ``ratio_KEY``."""


@dataclass(frozen=True)
class Shape:
    """What is sent. ``*_prompt`` and ``*_output`` are tokens of a request; of chats and of the hog, whose prompts are
    not counted beforehand, a word is taken for a token."""

    chats: int
    chat_prompt: int
    chat_output: int
    alone_turns: int
    longs: int
    long_prompt: int
    long_output: int
    hog: int
    hog_prompt: int
    hog_output: int

    def within(self, max_model_len: int) -> Shape:
        """With long prompts cut to what the context permits."""
        return replace(self, long_prompt=min(self.long_prompt, max_model_len - self.long_output))


class Traffic:
    """The requests of one run on one server. Runs of the same ``number`` and seed send the same prompts."""

    def __init__(self, session: aiohttp.ClientSession, server: Server, shape: Shape, seed: int, number: int) -> None:
        self._session, self._server, self._shape = session, server, shape
        self._seed, self._streams = seed, 1_000_000 * number
        self._turns = [0] * shape.chats
        self.records: dict[str, list[RequestRecord]] = {name: [] for name in ("alone", "lead", "chat", "long", "hog")}

    async def chats(self, phase: Callable[[int], str | None]) -> None:
        """All chats, turn after turn: ``phase`` (turns so far) is where the next one is recorded, or None to end."""
        await asyncio.gather(*(self._chat(chat, phase) for chat in range(self._shape.chats)))

    async def _chat(self, chat: int, phase: Callable[[int], str | None]) -> None:
        turns = 0
        while (name := phase(turns)) is not None:
            stream = 1000 * (chat + 1) + self._turns[chat]
            (item,) = self._items(1, self._shape.chat_prompt, self._shape.chat_output, stream)
            await self._send(item, name, f"chat-{chat}", CHAT)
            turns += 1
            self._turns[chat] += 1

    async def load(self) -> None:
        """The hog's requests and the long prompts, to their ends."""
        shape = self._shape
        short = self._items(shape.hog, shape.hog_prompt, shape.hog_output, 1)
        async with asyncio.TaskGroup() as tasks:
            for item in short:
                tasks.create_task(self._send(item, "hog", "hog"))
            for number, item in enumerate(self._long):
                await asyncio.sleep(LONG_GAP_SECONDS)
                tasks.create_task(self._send(item, "long", f"long-{number}"))

    def prepare(self) -> None:
        """Make the long prompts, whose tokens the server counts."""
        shape = self._shape
        counter = server_counter(Endpoint(self._server.url, COMPLETIONS), self._server.model)
        lengths = LengthRange(shape.long_prompt, shape.long_prompt), LengthRange(shape.long_output, shape.long_output)
        self._long = random_items(shape.longs, *lengths, seed=self._seed, stream=self._streams + 2, counter=counter)

    def _items(self, count: int, prompt: int, output: int, stream: int) -> list[WorkItem]:
        lengths = LengthRange(prompt, prompt), LengthRange(output, output)
        return random_items(count, *lengths, seed=self._seed, stream=self._streams + stream, counter=None)

    async def _send(self, item: WorkItem, name: str, user: str, path: str = COMPLETIONS) -> None:
        target = Target(self._server.url + path, self._server.model, path == CHAT, body={**BODY, "user": user})
        record = RequestRecord(len(self.records[name]), item.input_tokens, item.output_tokens)
        self.records[name].append(record)
        await send(self._session, target, target.encode(item), record)


class Load:
    """Whether the load has come, and has gone."""

    def __init__(self) -> None:
        self.come: float | None = None
        self.gone = False

    def phase(self, turns: int) -> str | None:
        """Where a chat's turn that begins now is recorded; each has at least one after the load has come."""
        if self.come is None or not turns:
            return "lead"
        return None if self.gone and turns > 1 else "chat"


async def play(server: Server, shape: Shape, seed: int, number: int, limits: Mapping[str, float]) -> dict[str, Any]:
    """The figures of one run, by class; ``limits``: of goodput, ms."""
    async with client_session(REQUEST_SECONDS, {"Content-Type": "application/json"}) as session:
        traffic = Traffic(session, server, shape, seed, number)
        await asyncio.to_thread(traffic.prepare)
        began = time.perf_counter()
        await traffic.chats(lambda turns: "alone" if turns < shape.alone_turns else None)
        alone = time.perf_counter() - began
        load = Load()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(traffic.chats(load.phase))
            await _all_stream(traffic.records["lead"], shape.chats)
            load.come = time.perf_counter()
            await traffic.load()
            load.gone = True
        return figures(traffic.records, alone, load.come, time.perf_counter() - load.come, limits)


async def _all_stream(records: list[RequestRecord], count: int) -> None:
    """Wait until so many requests have a token, or failed."""
    while sum(bool(r.chunk_times or r.end) for r in records) < count:
        await asyncio.sleep(POLL_SECONDS)


def figures(
    records: Mapping[str, list[RequestRecord]], alone: float, come: float, seconds: float, limits: Mapping[str, float]
) -> dict[str, Any]:
    """``run_metrics`` of every class, with ratios and failures.

    Args:
        alone: seconds that the chats had for themselves. come: when the load came. seconds: from then to the end.
        limits: of goodput, ms.
    """
    options = MetricOptions(("ttft", "tpot", "itl"), (99.0,), limits)
    classes = {**records, "all": [r for name in CLASSES[1:-1] for r in records[name]]}
    found: dict[str, dict[str, Any]] = {
        name: run_metrics(classes[name], alone if name == "alone" else seconds, options) for name in CLASSES
    }
    chunks = [r.chunk_times for name in ("lead", "chat") for r in records[name] if r.ok]
    gaps = [b - a for times in chunks for a, b in pairwise(times) if b > come]
    found["chat"] |= stats.summarize(gaps, options.percentiles, "itl_ms", scale=1000.0)
    for key in RATIOS:
        base, beside = found["alone"][key], found["chat"][key]
        found["chat"]["ratio_" + key] = beside / base if base and beside else None
    return {**found, "failures": failure_summary([r for group in records.values() for r in group])}
