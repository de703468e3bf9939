"""The API process's end of the channel to its worker, in the event loop; the worker knows no event loop."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import cast

from llmctl.serving.transport import Frames, framed


class ApiChannel(asyncio.Protocol):
    """The API process's end; ``on_message`` is called with each message, in the event loop."""

    def __init__(self, on_message: Callable[[bytes], None]) -> None:
        self._on_message = on_message
        self._frames = Frames()
        self._transport: asyncio.WriteTransport | None = None
        self._ended = asyncio.Event()

    @classmethod
    async def open(cls, end: socket.socket, on_message: Callable[[bytes], None]) -> ApiChannel:
        """A channel on a connected socket, which it owns from now on."""
        end.setblocking(False)
        _, channel = await asyncio.get_running_loop().create_unix_connection(lambda: cls(on_message), sock=end)
        return channel

    def send(self, message: bytes) -> None:
        """Hand over one message; it never waits, and after the end it does nothing."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(framed(message))

    async def ended(self) -> None:
        """Wait until the other end is closed and everything that it had sent has been handled."""
        await self._ended.wait()

    def close(self) -> None:
        """Close this end."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Part of ``asyncio.Protocol``."""
        self._transport = cast(asyncio.WriteTransport, transport)

    def data_received(self, data: bytes) -> None:
        """Part of ``asyncio.Protocol``."""
        for message in self._frames.feed(data):
            self._on_message(message)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """Part of ``asyncio.Protocol``."""
        self._ended.set()
