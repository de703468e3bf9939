"""Requests that are no proper HTTP, or not for this server: heads, methods, paths, framing, keys."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from functools import partial

from hostile.arena import COMPLETIONS, JSON, Arena
from hostile.wire import request

SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
SMALL = b'{"prompt": [5], "max_tokens": 1}'
CLIENT_HELLO = bytes.fromhex("16030100c2010000be0303") + bytes(range(200))


def sent(heads: Callable[[Arena], Iterable[bytes]], times: int = 3) -> Callable[[Arena], Awaitable[None]]:
    """Sends each on a connection of its own. No answer may be one to ``SMUGGLED``."""

    async def one(arena: Arena, data: bytes) -> None:
        answers = await arena.exchange(data, 0.3, expect=1)
        if any(b"/smuggled" in answer.body for answer in answers):
            arena.tally.fault(f"smuggled by {data[:300]!r}")

    async def play(arena: Arena) -> None:
        await arena.crowd([partial(one, arena, data) for data in heads(arena)] * times, 20)

    return play


def _head(arena: Arena, *lines: str) -> bytes:
    kept = [f"POST {COMPLETIONS} HTTP/1.1", "Host: x", *(f"{k}: {v}" for k, v in arena.headers.items()), *lines]
    return "\r\n".join([*kept, "", ""]).encode("latin-1")


def lengths(arena: Arena) -> Iterable[bytes]:
    """Lengths that are none, or that nobody could send."""
    for length in ("99999999999", "-1", "0x10", "1e9", "+5", "5 5", "5,5", "9" * 30, "9" * 5000, ""):
        yield _head(arena, f"Content-Length: {length}") + SMALL


def too_long(arena: Arena) -> Iterable[bytes]:
    """A body far beyond the limit, promised and never sent."""
    for length in (33 * 2**20 + 1, 99_999_999_999, 2**63 - 1):
        yield _head(arena, f"Content-Length: {length}")


def chunks(arena: Arena) -> Iterable[bytes]:
    """Chunked bodies whose sizes are wrong."""
    head = _head(arena, "Transfer-Encoding: chunked")
    for body in (
        b"ZZ\r\n",
        b"-5\r\nabcde\r\n",
        b"FFFFFFFFFFFFFFFFF\r\na",
        b"5\r\nab\r\n0\r\n\r\n",
        b"2;x\r\nab0\r\n\r\n",
    ):
        yield head + body
    yield head + b"2;" + b"x" * 2**17 + b"\r\n{}\r\n0\r\n\r\n"
    yield head + b"0\r\n" + b"T: " + b"x" * 2**17 + b"\r\n\r\n"
    yield head + b"20\r\n" + SMALL + b"\r\n0\r\nHost: y\r\n\r\n"


def smuggling(arena: Arena) -> Iterable[bytes]:
    """Two framings of one body, each of which hides a second request from the other."""
    hidden = b"0\r\n\r\n" + SMUGGLED
    for coding in ("chunked", " chunked", "chunked\t", "xchunked", "identity, chunked", "chunked, identity", "CHUNKED"):
        yield _head(arena, f"Content-Length: {len(hidden)}", f"Transfer-Encoding: {coding}") + hidden
    yield _head(arena, "Content-Length: 5", f"Content-Length: {len(SMUGGLED) + 5}") + b'{"a":' + SMUGGLED
    yield _head(arena, "Transfer-Encoding : chunked", f"Content-Length: {len(hidden)}") + hidden
    yield _head(arena, "X: y\nTransfer-Encoding: chunked", f"Content-Length: {len(hidden)}") + hidden
    yield _head(arena, "X: y\r\n Transfer-Encoding: chunked", f"Content-Length: {len(hidden)}") + hidden
    yield _head(arena, "Transfer-Encoding: chunked", "Transfer-Encoding: identity") + hidden


def methods(arena: Arena) -> Iterable[bytes]:
    """Methods that nothing here answers."""
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND", "FOO", "get", "G\0T", "", "A" * 9000):
        for path in (COMPLETIONS, "/health", "*"):
            yield request(method, path, arena.headers)
    yield b"CONNECT example.com:443 HTTP/1.1\r\nHost: example.com:443\r\n\r\n"
    yield b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(60)
    yield request("GET", COMPLETIONS, {**arena.headers, "Upgrade": "h2c", "Connection": "Upgrade, HTTP2-Settings"})
    yield request("GET", "/v1/nothing", {**arena.headers, "Upgrade": "websocket", "Connection": "Upgrade"})


def paths(arena: Arena) -> Iterable[bytes]:
    """Paths that lead nowhere."""
    for path in (
        "//v1/completions", "/v1/../metrics/..", "/%00", "/%2e%2e/%2e%2e/etc/passwd", "/v1/models/" + "a" * 50_000,
        "/v1/models/../../metrics", "/v1/models/%ff%fe", "http://other/x", "/x?" + "a=b&" * 9000, "/\u00e9",
        "/v1/models/",
    ):  # fmt: skip
        yield request("GET", path, arena.headers)


def no_http(_: Arena) -> Iterable[bytes]:
    """What is no HTTP at all."""
    yield b"GET /health\r\n\r\n"
    yield b"GET /health HTTP/9.9\r\n\r\n"
    yield b"\r\n" * 5000 + b"hello\r\n\r\n"
    yield bytes(range(256)) * 16
    yield b"GET /health HTTP/1.1\r\nHost: x\r\nX\0Y: 1\r\n\r\n"
    yield b"GET /health HTTP/1.1\r\nHost: x\r\nnot a header\r\n\r\n"
    yield b"SSH-2.0-OpenSSH_9.6\r\n"


def tls(_: Arena) -> Iterable[bytes]:
    """A TLS handshake on a port that speaks none."""
    yield CLIENT_HELLO
    yield b"\x80\x2e\x01\x00\x02" + bytes(60)


def content_types(arena: Arena) -> Iterable[bytes]:
    """JSON that is not declared to be, and what is not JSON."""
    for kind in ("text/plain", "", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "a" * 9000):
        yield request("POST", COMPLETIONS, {**arena.headers, "Content-Type": kind}, SMALL)
    yield request("POST", COMPLETIONS, {"Authorization": f"Bearer {arena.key}"}, SMALL)


def encodings(arena: Arena) -> Iterable[bytes]:
    """Declared JSON that is something else."""
    compressed = {**arena.headers, "Content-Encoding": "gzip"}
    yield request("POST", COMPLETIONS, compressed, bytes.fromhex("1f8b0800000000000003") + bytes(99))
    charset = {**arena.headers, "Content-Type": "application/json; charset=utf-16"}
    yield request("POST", COMPLETIONS, charset, '{"prompt": "a"}'.encode("utf-16"))


def keys(arena: Arena) -> Iterable[bytes]:
    """No key, a wrong one, and the right one in every wrong place."""
    right = arena.key
    for value in ("Bearer wrong", "Bearer", "Bearer ", f"Basic {right}", right, f"Bearer {right[:-1]}", "x" * 50_000):
        yield request("POST", COMPLETIONS, {**JSON, "Authorization": value}, SMALL)
    for path in (
        f"/v1/models?api_key={right}",
        f"/v1/models?key={right}",
        f"/v1/models/{right}",
        "/metrics",
        "/openapi.json",
    ):
        yield request("GET", path, {})
    yield request("GET", "/v1/models", {"Api-Key": right, "X-Key": right, "Cookie": f"key={right}"})
    yield request("GET", f"http://{right}@x/v1/models", {})
    yield request("GET", "/v1/models", {"Authorization": f"Bearer wrong\r\nAuthorization: Bearer {right}"})
