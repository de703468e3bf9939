"""The well-behaved clients: streamed chats whose answers are known, from the first minute to the last."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
from served import Server

from hostile.judgement import KILL_CODES, Spans, Tally
from llmctl.bench.client import Target, send
from llmctl.bench.endpoint import CHAT
from llmctl.bench.metrics import RequestRecord
from llmctl.bench.workloads import WorkItem

PATIENCE_SECONDS = 180.0
RETRY_SECONDS = 1.0
CASES = tuple(
    WorkItem(prompt, 0, tokens)
    for prompt, tokens in (
        ("Name three colours.", 24),
        ("What is the capital of France? Answer in one sentence.", 32),
        ("Write a short story about a river and a mountain. " * 4, 48),
        ("Count from one to ten.", 40),
        ("e\u0301 \u65e5\u672c\u8a9e \U0001f389 translate", 16),
        ("List the words: " + " ".join(f"w{i}" for i in range(40)), 20),
    )
)
"""Conversations, and tokens of their answers; greedy, so that each has one right answer."""


@dataclass(frozen=True)
class Told:
    """A right answer."""

    text: str
    finish_reason: str | None
    tokens: int | None


class Honest:
    """Clients with a key of their own.

    Args:
        kills: when the worker was dead. floods: when the queue was full of others' requests, so that 429 is no fault.
    """

    def __init__(self, server: Server, key: str, tally: Tally, kills: Spans, floods: Spans) -> None:
        self.tally = tally
        self._target = Target(
            url=server.url + CHAT,
            model=server.model,
            chat=True,
            headers={"Authorization": f"Bearer {key}"},
            body={"temperature": 0},
            keep_alive=True,
            timeout=PATIENCE_SECONDS,
            keep_text=True,
        )
        self._kills, self._floods = kills, floods
        self._right: dict[WorkItem, Told] = {}

    async def learn(self, session: aiohttp.ClientSession) -> None:
        """Take what the quiet server says for right; it must say the same again.

        Raises:
            RuntimeError: it does not answer, or not the same twice.
        """
        for item in CASES:
            told = [await self._ask(session, item) for _ in range(2)]
            if not told[0].ok or _told(told[0]) != _told(told[1]):
                raise RuntimeError(
                    f"the quiet server: {told[0].error or 'other words the second time'}: {item.prompt!r}"
                )
            self._right[item] = _told(told[0])

    async def go_on(self, session: aiohttp.ClientSession, number: int, ends: Callable[[], bool]) -> None:
        """One client: a conversation after another, until told to end."""
        while not ends():
            await self.one(session, CASES[number % len(CASES)], ends)
            number += 1

    async def one(self, session: aiohttp.ClientSession, item: WorkItem, ends: Callable[[], bool]) -> None:
        """One conversation, judged; asked again where that is what an honest client does."""
        began = time.monotonic()
        while True:
            sent = time.monotonic()
            record = await self._ask(session, item)
            end = time.monotonic()
            self.tally.count(record.error_kind or "200", (record.ttft or record.e2el))
            fault = self.fault_of(item, record, sent, end)
            if fault is not None:
                self.tally.fault(fault)
            if record.ok or fault is not None or ends():
                return
            if end - began > PATIENCE_SECONDS:
                self.tally.fault(f"no answer within {PATIENCE_SECONDS:g} s of asking again: {record.error}")
                return
            await asyncio.sleep(RETRY_SECONDS)

    def fault_of(self, item: WorkItem, record: RequestRecord, sent: float, end: float) -> str | None:
        """What is wrong with an answer; None if it is right, or a refusal that may be for now."""
        if record.ok:
            told, right = _told(record), self._right[item]
            return None if told == right else f"expected {right}, found {told}"
        error = record.error or ""
        if record.error_kind == "http_429" and self._floods.meet(sent, end):
            return None
        if self._kills.meet(sent, end) and any(f'"{code}"' in error for code in KILL_CODES):
            return None
        return f"{record.error_kind}: {error}"

    async def _ask(self, session: aiohttp.ClientSession, item: WorkItem) -> RequestRecord:
        record = RequestRecord(0, 0, item.output_tokens)
        await send(session, self._target, self._target.encode(item), record)
        return record


def _told(record: RequestRecord) -> Told:
    return Told(record.text, record.finish_reason, record.completion_tokens)


async def exact_answers(session: aiohttp.ClientSession, server: Server) -> list[Any]:
    """What an idle server answers to every case, with the log-probability of every token; prompts are computed in full,
    for not every target's last bits are the same after a cached beginning."""
    found = []
    for item in CASES:
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": item.prompt}],
            "max_tokens": item.output_tokens,
        }
        body |= {"temperature": 0, "logprobs": True, "top_logprobs": 2, "cache_salt": secrets.token_hex(8)}
        async with session.post(server.url + CHAT, json=body, headers=server.headers) as answer:
            found.append(json.loads(await answer.text())["choices"])
    return found
