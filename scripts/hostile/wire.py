"""HTTP as a hostile client speaks it: any bytes in any order, and whatever comes back."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httptools

CLOSED, SILENT = 0, -1
"""In place of a status: the connection ended without an answer; nothing came in time."""
PATIENCE_SECONDS = 180.0
KEPT_BYTES = 1 << 18
_READ_BYTES = 1 << 16

Piece = bytes | float
"""What is sent, or seconds to wait before what comes after."""


@dataclass(frozen=True)
class Answer:
    """An answer. body: its beginning; tail: its end. sent: when the request was begun (``time.monotonic``); seconds,
    lasted: from then until the answer began, and until it ended or was given up. whole: it ended as HTTP says."""

    status: int
    sent: float
    seconds: float
    lasted: float
    body: bytes = b""
    tail: bytes = b""
    content_type: str = ""
    request_id: str = ""
    whole: bool = False

    @property
    def end(self) -> float:
        """When it ended, on ``time.monotonic``."""
        return self.sent + self.lasted

    def document(self) -> Any:
        """The JSON body; None for anything else."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None


class _Reader:
    """Callbacks of the parser: makes the answers of one connection."""

    def __init__(self, sent: float) -> None:
        self.answers: list[Answer] = []
        self.open = False
        self._sent = sent
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> None:
        """Bytes of the connection; raises httptools.HttpParserError for what is no HTTP."""
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self.open = True
        self._at = time.monotonic() - self._sent
        self._headers: dict[bytes, bytes] = {}
        self._body, self._tail = bytearray(), b""

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value

    def on_body(self, data: bytes) -> None:
        self._body += data[: max(0, KEPT_BYTES - len(self._body))]
        self._tail = (self._tail + data)[-1024:]

    def on_message_complete(self) -> None:
        self.open = False
        if self._parser.get_status_code() != 100:
            self.answers.append(self.made(whole=True))

    def made(self, whole: bool) -> Answer:
        """What there is of the present answer."""
        kind, name = (self._headers.get(key, b"").decode("latin-1") for key in (b"content-type", b"x-request-id"))
        status, body = self._parser.get_status_code(), bytes(self._body)
        lasted = time.monotonic() - self._sent
        return Answer(status, self._sent, self._at, lasted, body, self._tail, kind, name, whole)


def _none(status: int, sent: float) -> Answer:
    """No answer, until now."""
    lasted = time.monotonic() - sent
    return Answer(status, sent, lasted, lasted)


@dataclass(frozen=True)
class Address:
    """Where a server listens, and how long its answers are waited for."""

    host: str
    port: int
    patience: float = PATIENCE_SECONDS

    async def connect(self, receive_bytes: int | None = None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection; ``receive_bytes``: of the kernel's buffer for what nobody reads.

        Raises:
            OSError, TimeoutError.
        """
        sock = socket.socket()
        sock.setblocking(False)
        try:
            if receive_bytes is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
            loop = asyncio.get_running_loop()
            await asyncio.wait_for(loop.sock_connect(sock, (self.host, self.port)), self.patience)
            return await asyncio.open_connection(sock=sock, limit=_READ_BYTES)
        except BaseException:
            sock.close()
            raise

    async def exchange(self, pieces: Sequence[Piece], expect: int = 1) -> list[Answer]:
        """Send, and read until so many answers are there; ends with ``CLOSED`` or ``SILENT`` if they do not come."""
        sent = time.monotonic()
        try:
            reader, writer = await self.connect()
        except TimeoutError:
            return [_none(SILENT, sent)]
        except OSError:
            return [_none(CLOSED, sent)]
        sending = asyncio.create_task(send(writer, pieces))
        found = _Reader(sent)
        try:
            ending = await asyncio.wait_for(_read(reader, found, expect), self.patience)
        except TimeoutError:
            ending = SILENT
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
            writer.transport.abort()
        if len(found.answers) >= expect:
            return found.answers
        last = found.made(whole=False) if found.open else _none(ending, sent)
        return [*found.answers, last]


async def _read(reader: asyncio.StreamReader, found: _Reader, expect: int) -> int:
    with contextlib.suppress(OSError, httptools.HttpParserError):
        while len(found.answers) < expect and (data := await reader.read(_READ_BYTES)):
            found.feed(data)
    return CLOSED


async def send(writer: asyncio.StreamWriter, pieces: Sequence[Piece]) -> None:
    """All pieces, as far as the other side takes them."""
    with contextlib.suppress(OSError):
        for piece in pieces:
            if isinstance(piece, bytes):
                writer.write(piece)
                await writer.drain()
            else:
                await asyncio.sleep(piece)


def request(method: str, path: str, headers: dict[str, str], body: bytes | None = None) -> bytes:
    """A request as it should be; a length is added for a body."""
    lines = [f"{method} {path} HTTP/1.1", "Host: x", *(f"{name}: {value}" for name, value in headers.items())]
    if body is not None and "Transfer-Encoding" not in headers:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b"")
