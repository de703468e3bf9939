"""Connections that should not be: slow, silent, half-closed, reset, never read, far too many."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
from collections.abc import Awaitable, Callable
from functools import partial

from hostile.arena import COMPLETIONS, Arena
from hostile.wire import Piece, request, send

Play = Callable[[Arena], Awaitable[None]]
GET = b"GET /health HTTP/1.1\r\nHost: x\r\n"
LONGEST = 4000
"""Tokens asked for by those who do not stay, as far as the context permits."""


def stream_of(arena: Arena, tokens: int, **fields: object) -> bytes:
    """A streamed completion of so many tokens."""
    most = min(tokens, arena.server.max_model_len - 8)
    body = {"prompt": [5, 6, 7, arena.rng.randrange(8, 300)], "max_tokens": most, "stream": True, "ignore_eos": True}
    return arena.post(COMPLETIONS, {**body, **fields})


def drops(begin: bytes, count: int, gap: float = 0.5, drop: bytes = b"x", length: int = 60) -> Play:
    """So many connections that begin in the same way and go on with a byte every ``gap`` seconds."""

    async def play(arena: Arena) -> None:
        pieces: list[Piece] = [begin]
        pieces += [gap, drop] * length
        await arena.crowd([partial(arena.exchange, *pieces)] * count, count)

    return play


async def slow_bodies(arena: Arena) -> None:
    """Hundreds of bodies that are promised, and come a byte at a time."""
    head = request("POST", COMPLETIONS, {**arena.headers, "Content-Length": "5000"})
    await drops(head, 300)(arena)


async def endless_headers(arena: Arena) -> None:
    """Headers that go on for ever: many of them, one without an end, a path without one."""
    line = b"X-H: " + b"a" * 1015 + b"\r\n"
    for begin, more in ((GET, line * 16), (GET + b"X: ", b"a" * 2**14), (b"GET /", b"a" * 2**14)):
        await arena.crowd([partial(arena.exchange, begin, *[more] * 50)] * 20, 20)


async def pipelined(arena: Arena) -> None:
    """Many requests in one write; answers come in their order."""
    order = [f"p-{i}" for i in range(60)]
    body = json.dumps({"prompt": [5, 6], "max_tokens": 1}).encode()
    data = b"".join(
        request("GET", "/health", {"X-Request-Id": name})
        if number % 3
        else request("POST", COMPLETIONS, {**arena.headers, "X-Request-Id": name}, body)
        for number, name in enumerate(order)
    )
    answers = await arena.exchange(data, expect=len(order))
    if all(answer.whole for answer in answers) and [answer.request_id for answer in answers] != order:
        arena.tally.fault(f"pipelined: answers to {[answer.request_id for answer in answers]}")
    await arena.crowd([partial(arena.exchange, data * 3, expect=180)] * 4, 4)


async def half_closed(arena: Arena) -> None:
    """Clients that end their side once the request is sent, and read on."""

    async def one() -> None:
        reader, writer = await arena.address.connect()
        with contextlib.suppress(OSError):
            writer.write(stream_of(arena, 50))
            writer.write_eof()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(reader.read(), 20)
        writer.transport.abort()
        arena.tally.count("left", 0.0)

    await arena.crowd([one] * 50, 50)


def leavers(count: int, at_once: int, *, reset: bool) -> Play:
    """Streams whose clients go away at a random moment: closed, or reset with what was on its way thrown away."""

    async def one(arena: Arena) -> None:
        try:
            _, writer = await arena.address.connect()
        except (OSError, TimeoutError):
            arena.note(await arena.address.exchange([b""]))  # say how it was not to be had
            return
        data = stream_of(arena, LONGEST, n=arena.rng.choice([1, 4]), stream=arena.rng.random() < 0.7)
        await send(writer, [data[: arena.rng.choice([len(data), len(data), len(data) - 9, 40])]])
        await asyncio.sleep(arena.rng.choice([0, 0.01, 0.1, 0.5]) * arena.rng.random())
        if reset:
            _linger_none(writer)
        writer.transport.abort()
        arena.tally.count("left", 0.0)

    async def play(arena: Arena) -> None:
        await arena.crowd([partial(one, arena)] * count, at_once)

    return play


def _linger_none(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def never_read(count: int, seconds: float) -> Play:
    """Clients that ask for as much text as there can be, with the smallest buffer, and read none of it."""

    async def one(arena: Arena) -> None:
        try:
            _, writer = await arena.address.connect(receive_bytes=2048)
        except (OSError, TimeoutError):
            return
        writer.transport.pause_reading()  # type: ignore[attr-defined]  # a socket's transport reads by itself
        await send(writer, [stream_of(arena, LONGEST, logprobs=20)])
        await asyncio.sleep(seconds)
        writer.transport.abort()
        arena.tally.count("left", 0.0)

    async def play(arena: Arena) -> None:
        await arena.crowd([partial(one, arena)] * count, count)

    return play


def burst(count: int) -> Play:
    """So many connections at once, each with a request of one token."""

    async def play(arena: Arena) -> None:
        data = arena.post(COMPLETIONS, {"prompt": [5, 6, 7], "max_tokens": 1})
        await arena.crowd([partial(arena.exchange, data)] * count, count)

    return play


async def silent(arena: Arena) -> None:
    """A thousand connections that say nothing; each is closed without a word."""
    await arena.crowd([partial(arena.exchange, b"")] * 1000, 1000)


async def queue_games(arena: Arena) -> None:
    """A hog with 250 requests beside a single one of another tenant, which must not wait for all of them."""
    done = 0

    async def hog(number: int) -> None:
        nonlocal done
        fields = {"user": f"made-up-{number}", "cache_salt": str(number), "priority": 0}
        await arena.exchange(arena.post(COMPLETIONS, {"prompt": [5, number], "max_tokens": 8, **fields}))
        done += 1

    hogs = [asyncio.create_task(hog(number)) for number in range(250)]
    while not done:
        await asyncio.sleep(0.01)
    single = {"prompt": [9, 9], "max_tokens": 1}
    answers = await arena.address.exchange(
        [arena.post(COMPLETIONS, single, Authorization=f"Bearer {arena.honest_key}")]
    )
    before = done
    arena.note(answers)
    await asyncio.gather(*hogs)
    if answers[0].status == 200 and before > 200:
        arena.tally.fault(f"a single request was answered after {before} of a hog's 250")


async def metrics_flood(arena: Arena) -> None:
    """Everything that is rendered when asked for, hundreds at a time."""
    paths = ["/metrics", "/openapi.json", "/docs", "/v1/models", "/ready", "/version"] * 50
    await arena.crowd([partial(arena.exchange, request("GET", path, arena.headers)) for path in paths], 100)
