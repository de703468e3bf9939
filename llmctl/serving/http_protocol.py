"""uvicorn's HTTP protocol, with bounds on what a client may make the server hold or wait for before a request is whole,
and an ``X-Request-Id`` on every answer: the request's own, or a new one.

Runs before any check of a key, so each bound is one of the connection: bytes of headers, seconds for headers, seconds
for a body that comes slowly, and for an answer that is read slowly or never.
"""

from __future__ import annotations

import asyncio
import logging
import re
import uuid
import weakref
from collections.abc import MutableMapping
from http import HTTPStatus
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from llmctl.serving.error_shapes import Problem, shape_of

MAX_HEADER_BYTES = 64 * 1024
HEADER_SECONDS = 10.0
"""From the moment that HTTP has a connection, or a further request begins, to the end of its headers. As long a
connection may say nothing before (see ``acceptor.py``), or take for its TLS handshake."""
BODY_SECONDS = 10.0
LINGER_SECONDS = 1.0
"""Until a refused connection is closed. What still comes is thrown away: unread, it would reset the connection, and the
client would not see the answer."""
BODY_RATE = 16 * 1024
"""A body has ``BODY_SECONDS``, and a second more for every so many bytes that have come."""
UNREAD_SECONDS = 60.0
"""What an answer has to be read once more than uvicorn's 64 KiB of it wait, or once its connection is to close; and a
second more for every ``BODY_RATE`` bytes that have been taken. Without it who never reads holds his connection, and all
that is made for him, for ever."""


REQUEST_ID = b"x-request-id"
_USABLE_ID = re.compile(rb"[\x21-\x7e]{1,128}")  # in a header and in a line of a log


def request_id(given: bytes | None) -> str:
    """The id of a request: the one that it brings, if that is 1 to 128 visible ASCII characters, else a new one."""
    if given is not None and _USABLE_ID.fullmatch(given):
        return given.decode("ascii")
    return uuid.uuid4().hex


class _WithId(logging.LoggerAdapter[logging.Logger]):
    """Adds the request's id to a line of the access log."""

    def process(self, msg: str, kwargs: MutableMapping[str, Any]) -> tuple[str, MutableMapping[str, Any]]:
        """Part of ``logging.LoggerAdapter``."""
        name = str((self.extra or {})["id"]).replace("%", "%%")  # the client's: msg is a format
        return f"{msg} {name}", kwargs


class BoundedHttpProtocol(HttpToolsProtocol):
    """Answers 431 to headers beyond ``MAX_HEADER_BYTES``, 408 to those or bodies that take too long, and closes; cuts
    off who does not read what is sent.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._refused = False
        self._messages = 0  # begun
        self._waits_for = "headers"  # or "body", or "" between requests
        self._timed: tuple[int, str] | None = None  # message and part that the timer is for
        self._timer: asyncio.TimerHandle | None = None
        self._since = 0.0
        self._parsed_bytes = self._open_bytes = self._body_bytes = 0
        self._unread = 0  # when it began to be watched
        self._unread_since = 0.0
        self._unread_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._time()

    def connection_lost(self, exc: Exception | None) -> None:
        self._waits_for = ""
        self._time()
        self._forget_unread()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        messages = self._messages
        super().data_received(data)
        if self._waits_for == "headers" and self._messages == messages:
            # Nothing but headers, and perhaps one without an end, which on_header would never see.
            self._open_bytes += len(data)
            if self._open_bytes > MAX_HEADER_BYTES:
                self._refuse_headers()
        if not self._refused:
            self._time()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002
        if self._parsed_bytes > MAX_HEADER_BYTES:  # the parser ended because a callback of ours did
            self._refuse_headers()
        else:
            self._refuse(400, "the request is not valid HTTP", "invalid_http")

    # what the parser calls

    def on_message_begin(self) -> None:
        self._messages += 1
        self._waits_for = "headers"
        self._parsed_bytes = self._open_bytes = self._body_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + 4)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        super().on_headers_complete()  # which may refuse the URL: the headers are still what is waited for then
        self._waits_for = "body"
        if self.cycle is None or self.cycle.scope is not self.scope:  # an upgrade, which is not answered here
            return
        name = self._request_id()
        # Before anything of the answer: its task is made, and has not run.
        self.scope["state"]["request_id"] = name
        # See EventStream. Weakly: the cycle has the scope, and would keep its body until the collector comes.
        self.scope["state"]["send_body"] = weakref.WeakMethod(self.cycle.send)
        self.cycle.default_headers = [*self.cycle.default_headers, (REQUEST_ID, name.encode())]
        if self.cycle.access_log:
            self.cycle.access_logger = _WithId(self.access_logger, {"id": name})  # type: ignore[assignment]

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._waits_for = ""
        super().on_message_complete()

    def _request_id(self) -> str:
        return request_id(next((value for name, value in self.headers or () if name == REQUEST_ID), None))

    def _count(self, size: int) -> None:
        self._parsed_bytes += size
        if self._parsed_bytes > MAX_HEADER_BYTES:
            raise ValueError("headers too large")  # the parser stops, and data_received calls send_400_response

    # time

    def _time(self) -> None:
        """Have one timer run for what is waited for, from when it began."""
        wanted = (self._messages, self._waits_for) if self._waits_for else None
        if wanted == self._timed:
            return
        self._timed = wanted
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if wanted is not None:
            self._since = self.loop.time()
            self._timer = self.loop.call_later(self._allowed(), self._on_time)

    def _allowed(self) -> float:
        return HEADER_SECONDS if self._waits_for == "headers" else BODY_SECONDS + self._body_bytes / BODY_RATE

    def _on_time(self) -> None:
        left = self._since + self._allowed() - self.loop.time()
        if self._waits_for == "body" and self.flow.read_paused:  # it is we who do not read
            left = max(left, BODY_SECONDS)
        if left > 0:
            self._timer = self.loop.call_later(left, self._on_time)
        elif not self._messages:
            self.transport.close()
        else:
            self._refuse(408, f"the {self._waits_for} of the request took too long", "request_timeout")

    # what nobody reads

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_unread()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self._forget_unread()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._watch_unread()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._watch_unread()

    def _watch_unread(self) -> None:
        unread = self.transport.get_write_buffer_size()
        if unread and self._unread_timer is None:
            self._unread, self._unread_since = unread, self.loop.time()
            self._unread_timer = self.loop.call_later(UNREAD_SECONDS, self._on_unread_time)

    def _forget_unread(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None

    def _on_unread_time(self) -> None:
        taken = self._unread - self.transport.get_write_buffer_size()
        left = self._unread_since + UNREAD_SECONDS + taken / BODY_RATE - self.loop.time()
        if left > 0:
            self._unread_timer = self.loop.call_later(left, self._on_unread_time)
        else:
            self.transport.abort()

    # the server's end

    def shutdown(self) -> None:
        """Part of uvicorn: no more requests. One whose body is not whole will not be: uvicorn would wait for it."""
        if self._waits_for == "body":
            self._refuse(503, "the server is shutting down", "not_ready", type_="service_unavailable")
        super().shutdown()

    # answers

    def _refuse_headers(self) -> None:
        self._refuse(431, f"the headers are larger than the limit of {MAX_HEADER_BYTES} bytes", "headers_too_large")

    def _refuse(self, status: int, message: str, code: str, *, type_: str = "invalid_request_error") -> None:
        """Answer, unless something else is being answered, and close."""
        others = self._waits_for == "headers" and self.cycle is not None and not self.cycle.response_complete
        begun = self._waits_for == "body" and self.cycle.response_started
        self._refused, self._waits_for = True, ""
        self._time()
        if not others and not begun:
            name = self._request_id()
            shape = shape_of((self.scope or {}).get("path", ""))  # of what has no whole headers, none is known
            body = msgspec.json.encode(shape.body(Problem(status, message, type_, code=code), name))
            more = "".join(f"{key}: {value}\r\n" for key, value in shape.headers(name).items())
            head = (
                f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nx-request-id: {name}\r\n{more}connection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.loop.call_later(LINGER_SECONDS, self.transport.close)
