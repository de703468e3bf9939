"""Connections are taken in turns, liveness first; real sockets, and a protocol that answers with what it read."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import Any

import pytest

from llmctl.serving import acceptor
from llmctl.serving.acceptor import MOST_IN_TURN, TURN_SECONDS, Acceptor
from llmctl.serving.middleware import asks_for_liveness

PATIENCE = 0.2


class Echo(asyncio.Protocol):
    """Answers with the first thing it reads, and closes."""

    def __init__(self, seen: list[bytes]) -> None:
        self._seen = seen

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._seen.append(data)
        if data == b"slow":
            time.sleep(2 * TURN_SECONDS)
        self._transport.write(data)
        self._transport.close()


class Site:
    """An acceptor, and clients that are connected before it looks."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack, self.seen = stack, []
        self.listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=512))
        self.acceptor = Acceptor(self.listener, lambda: Echo(self.seen), lambda said: said[:1] == b"!", PATIENCE)

    def client(self, said: bytes = b"") -> socket.socket:
        made = self._stack.enter_context(socket.create_connection(self.listener.getsockname()))
        made.setblocking(False)
        if said:
            made.sendall(said)
        return made


def run(scenario: Callable[[Site], Awaitable[None]]) -> None:
    async def whole() -> None:
        with ExitStack() as stack:
            site = Site(stack)
            stack.callback(site.acceptor.close)
            await scenario(site)

    asyncio.run(asyncio.wait_for(whole(), 30))


async def answer(client: socket.socket) -> bytes:
    return await asyncio.get_running_loop().sock_recv(client, 100)


def test_all_are_answered_and_liveness_first() -> None:
    async def scenario(site: Site) -> None:
        names = [b"%d" % number for number in range(5 * MOST_IN_TURN)]
        clients = [site.client(name) for name in names] + [site.client(b"!")]
        assert [await answer(client) for client in clients] == [*names, b"!"]
        assert site.seen == [b"!", *names]

    run(scenario)


def test_a_few_in_a_turn() -> None:
    """Who asks for liveness while others wait goes before most of them."""

    async def scenario(site: Site) -> None:
        waiting = [site.client(b"x") for _ in range(20 * MOST_IN_TURN)]
        while not site.seen:
            await asyncio.sleep(0)
        before = len(site.seen)
        late = site.client(b"!")
        assert await answer(late) == b"!"
        # A connection that is taken takes some turns of the loop to be read.
        assert site.seen.index(b"!") <= before + 8 * MOST_IN_TURN
        assert [await answer(client) for client in waiting] == [b"x"] * len(waiting)

    run(scenario)


def test_who_speaks_late_is_answered_and_who_does_not_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptor, "SWEEP_SECONDS", 0.05)

    async def scenario(site: Site) -> None:
        late, silent, gone = site.client(), site.client(), site.client()
        await asyncio.sleep(PATIENCE / 4)
        late.sendall(b"late")
        gone.close()
        assert await answer(late) == b"late"
        assert await answer(silent) == b""
        assert site.seen == [b"late"]
        assert not site.acceptor._silent

    run(scenario)


def test_fewer_in_a_turn_while_turns_are_long() -> None:
    """What is given to HTTP takes long: only few others are before who asks for liveness then."""

    async def scenario(site: Site) -> None:
        clients = [site.client(b"slow") for _ in range(6 * MOST_IN_TURN)]
        while len(site.seen) < 2 * MOST_IN_TURN:
            await asyncio.sleep(0)
        late = site.client(b"!")
        before = len(site.seen)
        assert await answer(late) == b"!"
        assert site.seen.index(b"!") <= before + MOST_IN_TURN
        assert [await answer(client) for client in clients] == [b"slow"] * len(clients)

    run(scenario)


def test_without_epoll_all_go_to_http_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("llmctl.serving.acceptor.select.epoll")

    async def scenario(site: Site) -> None:
        late = site.client()
        await asyncio.sleep(0.05)
        assert not site.acceptor._ordinary
        late.sendall(b"late")
        assert await answer(late) == b"late"

    run(scenario)


def test_the_end_closes_what_waits() -> None:
    async def scenario(site: Site) -> None:
        silent = site.client()
        while not site.acceptor._silent:
            await asyncio.sleep(0)
        waiting = [site.client(b"x") for _ in range(3 * MOST_IN_TURN)]
        while not site.acceptor._ordinary:
            await asyncio.sleep(0)
        site.acceptor.close()
        assert await answer(silent) == b""
        with pytest.raises(ConnectionResetError):  # what it said was not read
            await answer(waiting[-1])

    run(scenario)


def test_no_file_left_is_said_once_and_connections_wait(caplog: pytest.LogCaptureFixture) -> None:
    class Exhausted:
        """A listening socket for which there is no file, for so many times."""

        def __init__(self, inner: socket.socket, times: int) -> None:
            self._inner, self.left = inner, times

        def fileno(self) -> int:
            return self._inner.fileno()

        def accept(self) -> Any:
            if self.left:
                self.left -= 1
                raise OSError(errno.EMFILE, "Too many open files")
            return self._inner.accept()

    async def scenario(site: Site) -> None:
        site.acceptor._listener = Exhausted(site.listener, 3)  # type: ignore[assignment]
        client = site.client(b"x")
        assert await answer(client) == b"x"
        assert site.acceptor._listener.left == 0

    with caplog.at_level(logging.ERROR):
        run(scenario)
    assert caplog.messages == ["no connection can be taken: Too many open files; those to come wait (raise ulimit -n)"]


@pytest.mark.parametrize(
    ("said", "asks"),
    [
        (b"GET /health HTTP/1.1\r\n", True),
        (b"HEAD /ready?x=1 HTTP/1.1\r\n", True),
        (b"GET /llm/ping HTTP/1.1\r\n", True),
        (b"GET /v1/models HTTP/1.1\r\n", False),
        (b"POST /health HTTP/1.1\r\n", False),
        (b"GET", False),
        (b"", False),
        (b"\x16\x03\x01\xff", False),
    ],
)
def test_what_asks_for_liveness(said: bytes, asks: bool) -> None:
    assert asks_for_liveness(said, "/llm") == asks
