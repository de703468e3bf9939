"""The channel between the API process and its worker: a socket pair, one length-prefixed message each.

The worker inherits its end, so nothing has a name, nothing is left behind, and nobody else can connect. A message is
one system call on either side and wakes one thread; a messaging library's own threads would be two more to wake, on the
cores that the model runs on.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections.abc import Iterator

_LENGTH_BYTES = 4
_RECEIVE_BYTES = 1 << 18
# What may pile up before the worker waits for the API process; Linux grants what net.core.wmem_max allows, some hundred
# KiB by default.
_BUFFER_BYTES = 1 << 20


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """Two connected ends: the API process's, and the one that the worker inherits."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    for end in ends:
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            with contextlib.suppress(OSError):  # beyond the limit, on systems that do not cut it
                end.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
    return ends


def framed(message: bytes) -> bytes:
    """A message behind its length."""
    return len(message).to_bytes(_LENGTH_BYTES, "little") + message


class Frames:
    """Cuts a stream of bytes into messages."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The messages that ``data`` completes."""
        if self._rest:
            data = self._rest + data
        begin, end = _LENGTH_BYTES, len(data)
        while begin <= end:
            stop = begin + int.from_bytes(data[begin - _LENGTH_BYTES : begin], "little")
            if stop > end:
                break
            yield data[begin:stop]
            begin = stop + _LENGTH_BYTES
        self._rest = data[begin - _LENGTH_BYTES :]


class WorkerChannel:
    """The worker's end. Sending waits when the API process is some hundred KiB behind."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(True)
        self._socket = end
        self._frames = Frames()
        self._wakened, self._waker = os.pipe()
        os.set_blocking(self._waker, False)
        self._poll = select.poll()
        self._poll.register(end, select.POLLIN)
        self._poll.register(self._wakened, select.POLLIN)

    def send(self, message: bytes) -> None:
        """Send one message.

        Raises:
            BrokenPipeError: the API process is gone.
        """
        self._socket.sendall(framed(message))

    def receive(self, timeout_ms: int) -> list[bytes]:
        """Messages that have come; without any, wait up to ``timeout_ms`` for the first, or for ``wake``.

        Raises:
            EOFError: the API process is gone.
        """
        ready = [number for number, _ in self._poll.poll(timeout_ms)]
        if self._wakened in ready:
            os.read(self._wakened, _RECEIVE_BYTES)
        if self._socket.fileno() not in ready:
            return []
        data = self._socket.recv(_RECEIVE_BYTES)
        if not data:
            raise EOFError("the API process is gone")
        return list(self._frames.feed(data))

    def wake(self) -> None:
        """End a wait in ``receive``, or the next one; from any thread, at any time."""
        with contextlib.suppress(BlockingIOError, OSError):  # a full pipe wakes too; after the end nobody waits
            os.write(self._waker, b"\0")

    def close(self) -> None:
        """Close this end; what was sent still arrives."""
        self._socket.close()
