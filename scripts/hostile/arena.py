"""What an attack plays in: the server, the attacker's keys, and where answers are judged and counted."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from served import Server

from hostile.judgement import Spans, Tally, fault_of
from hostile.wire import Address, Answer, Piece, request

JSON = {"Content-Type": "application/json"}
COMPLETIONS, CHAT, TOKENIZE, DETOKENIZE = "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"


@dataclass(frozen=True)
class Arena:
    """For one play of one attack.

    Attributes:
        key: one that the server knows, of no special rights. honest_key: that of the well-behaved clients.
        allowed: statuses that answers may have. kills: when the worker was dead or being replaced.
    """

    server: Server
    address: Address
    key: str
    honest_key: str
    rng: random.Random
    tally: Tally
    allowed: Collection[int]
    kills: Spans

    @property
    def headers(self) -> dict[str, str]:
        """Of a request that a JSON endpoint takes."""
        return {**JSON, "Authorization": f"Bearer {self.key}"}

    def post(self, path: str, body: bytes | dict[str, Any], **headers: str) -> bytes:
        """A whole POST."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return request("POST", path, {**self.headers, **headers}, data)

    def note(self, answers: Iterable[Answer], allowed: Collection[int] | None = None) -> None:
        """Judge and count."""
        for answer in answers:
            self.tally.add(answer)
            if (fault := fault_of(answer, self.allowed if allowed is None else allowed, self.kills)) is not None:
                self.tally.fault(fault)

    async def exchange(self, *pieces: Piece, expect: int = 1) -> list[Answer]:
        """One connection; its answers, judged and counted."""
        answers = await self.address.exchange(pieces, expect)
        self.note(answers)
        return answers

    async def crowd(self, members: Sequence[Callable[[], Awaitable[Any]]], at_once: int) -> None:
        """All of them, at most so many at a time."""
        slots = asyncio.Semaphore(at_once)

        async def one(member: Callable[[], Awaitable[Any]]) -> None:
            async with slots:
                await member()

        await asyncio.gather(*(one(member) for member in members))


@dataclass(frozen=True)
class Attack:
    """A row of the table. fills_queue: others may be told 429 meanwhile. large: what it sends is, so that it belongs to
    the warm-up: what a process once needed, its allocator keeps."""

    name: str
    sends: str
    allowed: frozenset[int]
    play: Callable[[Arena], Awaitable[None]]
    fills_queue: bool = False
    large: bool = False
