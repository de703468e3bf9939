"""A streamed response: server-sent events of one generation, and comments while its first token is waited for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llmctl.errors import LlmctlError
from llmctl.serving.generation import Generation

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
KEEP_ALIVE = b": keep-alive\n\n"
"""A comment, which clients of server-sent events pass over."""


async def started(generation: Generation, seconds: float) -> bool:
    """Whether there is output, waited for until the engine has taken the request in, and no longer than ``seconds``; 0:
    until there is.

    Raises:
        LlmctlError: the engine refused the request or died.
    """
    if not seconds:
        await generation.started()
        return True
    try:
        async with asyncio.timeout(seconds):
            return await generation.accepted()
    except TimeoutError:
        return False


class EventStream(Response):
    """Server-sent events of one generation, which is aborted when the client goes away or the response fails.

    Events go to what the scope's state has as ``send_body``, a weak reference, if it has it: the connection's own, past
    the layers between, of which each looks at the start of a response only and would cost every token a coroutine.

    Args:
        keep_alive: send a comment now, and every so many seconds until there is output; None: there is some already.
        headers: beside those of every stream.
    """

    def __init__(
        self,
        events: AsyncIterator[bytes],
        generation: Generation,
        watcher: asyncio.Task[None],
        on_end: Callable[[], None],
        keep_alive: float | None,
        headers: Mapping[str, str],
    ) -> None:
        super().__init__()
        self._head = [*_HEADERS, *((name.lower().encode(), value.encode()) for name, value in headers.items())]
        self._events = events
        self._generation = generation
        self._watcher = watcher
        self._on_end = on_end
        self._keep_alive = keep_alive

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self._head})
            if self._keep_alive is not None:
                await self._wait(send, self._keep_alive)
            # For every token a task is resumed through all its frames: this one has few, not those of the layers above.
            connection = scope.get("state", {}).get("send_body", lambda: None)()
            await asyncio.create_task(self._send_events(connection or send))
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._watcher.cancel()
            self._generation.abort()
            self._on_end()

    async def _send_events(self, send: Send) -> None:
        async for data in self._events:
            await send({"type": "http.response.body", "body": data, "more_body": True})

    async def _wait(self, send: Send, seconds: float) -> None:
        while True:
            await send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})
            try:
                async with asyncio.timeout(seconds):
                    await self._generation.started()
                return
            except TimeoutError:
                continue
            except LlmctlError:  # the events tell it
                return
