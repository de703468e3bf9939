"""Takes connections from the listening socket, and gives HTTP those that speak, a few in a turn of the event loop, who
asks for liveness first.

uvicorn's server has the loop make a connection of all that wait, and answers in the order in which they came: of 5,000
at once, a supervisor's probe is behind 5,000. Here a connection costs a few system calls until its turn comes.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import select
import socket
import ssl
from collections import deque
from collections.abc import Callable

log = logging.getLogger("llmctl.serving")

MOST_IN_TURN = 8
"""Connections that are given to HTTP between two looks at the sockets: some 2 ms of refusals. Half as many after a turn
that took more than ``TURN_SECONDS``, one more after another one."""
TURN_SECONDS = 0.005
SWEEP_SECONDS = 1.0
RETRY_SECONDS = 0.2
"""After which the listening socket is looked at again when no connection could be taken."""
_MOST_TAKEN = 256  # in one look at the listening socket
_MOST_HEARD = 256  # in one look at those that had not said anything
_PEEK_BYTES = 256
_NO_FILE_LEFT = frozenset({errno.EMFILE, errno.ENFILE})
# What became of a connection before it was taken: accept(2) passes on what the network, or a firewall, says of it.
_LOST = frozenset(
    getattr(errno, name)
    for name in (
        *("ECONNABORTED", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ENONET", "ENOPROTOOPT"),
        *("EOPNOTSUPP", "EPERM", "EPROTO"),
    )
    if hasattr(errno, name)
)


class Acceptor:
    """Gives the connections of a listening socket to a protocol, from its making until ``close``.

    Args:
        listener: bound and listening; made non-blocking here, left open by ``close``.
        protocol: makes the protocol of one connection.
        first: whether a connection whose first bytes are these goes before others. Under TLS they say nothing, and
            connections are taken in their order.
        patience: seconds after which a connection that has not said anything is closed; under TLS as many again for its
            handshake.
        tls: for connections under TLS.
    """

    def __init__(
        self,
        listener: socket.socket,
        protocol: Callable[[], asyncio.Protocol],
        first: Callable[[bytes], bool],
        patience: float,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._listener, self._protocol, self._first = listener, protocol, first
        self._patience, self._tls = patience, tls
        self._silent: dict[int, tuple[socket.socket, float]] = {}  # by file, and until when, in their order
        # Where there is no epoll they go to HTTP at once.
        self._speaking = select.epoll() if hasattr(select, "epoll") else None
        self._urgent: deque[socket.socket] = deque()
        self._ordinary: deque[socket.socket] = deque()
        self._making: set[asyncio.Task[None]] = set()
        self._turning = self._paused = self._closed = False
        self._allowed, self._turned = 1, 0.0
        self._retry: asyncio.TimerHandle | None = None
        listener.setblocking(False)
        self._loop.add_reader(listener, self._take)
        if self._speaking is not None:
            self._loop.add_reader(self._speaking, self._hear)
        self._sweeping = self._loop.call_later(SWEEP_SECONDS, self._sweep)

    def close(self) -> None:
        """Take no more connections, and end those that HTTP has not seen. Twice is once."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._listener)
        self._sweeping.cancel()
        if self._retry is not None:
            self._retry.cancel()
        if self._speaking is not None:
            self._loop.remove_reader(self._speaking)
            self._speaking.close()
        for connection in (*(c for c, _ in self._silent.values()), *self._urgent, *self._ordinary):
            connection.close()
        self._silent.clear()
        self._urgent.clear()
        self._ordinary.clear()

    # what the loop calls

    def _take(self) -> None:
        """The listening socket has connections."""
        for _ in range(_MOST_TAKEN):
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError):
                break
            except OSError as error:
                if error.errno in _LOST:
                    continue
                self._pause(error)
                break
            self._paused = False
            connection.setblocking(False)
            if not self._sort(connection) and self._speaking is not None:
                self._speaking.register(connection, select.EPOLLIN)
                self._silent[connection.fileno()] = connection, self._loop.time() + self._patience

    def _hear(self) -> None:
        """Some that had not said anything have, or have ended."""
        assert self._speaking is not None
        for file, _ in self._speaking.poll(0, _MOST_HEARD):
            if self._sort(self._silent[file][0]):
                self._forget(file)

    def _sweep(self) -> None:
        now = self._loop.time()
        for file in [file for file, (_, end) in self._silent.items() if end <= now]:
            self._forget(file).close()
        self._sweeping = self._loop.call_later(SWEEP_SECONDS, self._sweep)

    def _turn(self) -> None:
        now = self._loop.time()
        slow = now - self._turned > TURN_SECONDS
        self._allowed = max(1, self._allowed // 2) if slow else min(MOST_IN_TURN, self._allowed + 1)
        self._turned = now
        for _ in range(self._allowed):
            waiting = self._urgent or self._ordinary
            if not waiting:
                break
            task = self._loop.create_task(self._make(waiting.popleft()))
            self._making.add(task)
            task.add_done_callback(self._making.discard)
        self._turning = bool(self._urgent or self._ordinary)
        if self._turning:
            self._loop.call_soon(self._turn)

    # parts of these

    def _sort(self, connection: socket.socket) -> bool:
        """Have a connection's turn come, if it has said something or has ended, or cannot be waited for; whether so."""
        try:
            said = connection.recv(_PEEK_BYTES, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            if self._speaking is not None:
                return False
            said = b""
        except OSError:
            said = b""
        urgent = self._tls is None and self._first(said)
        (self._urgent if urgent else self._ordinary).append(connection)
        if not self._turning:
            self._turning, self._turned = True, self._loop.time()
            self._loop.call_soon(self._turn)
        return True

    def _forget(self, file: int) -> socket.socket:
        assert self._speaking is not None
        self._speaking.unregister(file)
        return self._silent.pop(file)[0]

    def _pause(self, error: OSError) -> None:
        """Leave the connections to the system for a while: the loop would ask for them without end."""
        self._loop.remove_reader(self._listener)
        self._retry = self._loop.call_later(RETRY_SECONDS, self._loop.add_reader, self._listener, self._take)
        if not self._paused:
            self._paused = True
            hint = " (raise ulimit -n)" if error.errno in _NO_FILE_LEFT else ""
            log.error("no connection can be taken: %s; those to come wait%s", error.strerror, hint)

    async def _make(self, connection: socket.socket) -> None:
        patience = None if self._tls is None else self._patience
        try:
            await self._loop.connect_accepted_socket(
                self._protocol, connection, ssl=self._tls, ssl_handshake_timeout=patience
            )
        except OSError:  # the client is gone, speaks no TLS (ssl.SSLError is one) or does not end its handshake
            connection.close()
