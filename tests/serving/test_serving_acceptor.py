"""Connections are taken in turns, liveness first; real sockets, and a protocol that answers with what it read."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
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

    def __init__(self, stack: ExitStack, tls: ssl.SSLContext | None) -> None:
        self._stack, self.seen = stack, []
        self.listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=512))
        self.acceptor = Acceptor(self.listener, lambda: Echo(self.seen), lambda said: said[:1] == b"!", PATIENCE, tls)

    def client(self, said: bytes = b"") -> socket.socket:
        made = self._stack.enter_context(socket.create_connection(self.listener.getsockname()))
        made.setblocking(False)
        if said:
            made.sendall(said)
        return made


Run = Callable[..., None]


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Runs a scenario with a site, under TLS if there is a context for it, in one kind of event loop."""
    factory = asyncio.new_event_loop if request.param == "asyncio" else pytest.importorskip("uvloop").new_event_loop

    def run(scenario: Callable[[Site], Awaitable[None]], tls: ssl.SSLContext | None = None) -> None:
        async def whole() -> None:
            with ExitStack() as stack:
                site = Site(stack, tls)
                stack.callback(site.acceptor.close)
                await scenario(site)

        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(asyncio.wait_for(whole(), 30))

    return run


async def answer(client: socket.socket) -> bytes:
    return await asyncio.get_running_loop().sock_recv(client, 100)


def test_all_are_answered_and_liveness_first(run: Run) -> None:
    async def scenario(site: Site) -> None:
        names = [b"%d" % number for number in range(5 * MOST_IN_TURN)]
        clients = [site.client(name) for name in names] + [site.client(b"!")]
        assert [await answer(client) for client in clients] == [*names, b"!"]
        assert site.seen == [b"!", *names]

    run(scenario)


def test_a_few_in_a_turn(run: Run) -> None:
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


def test_who_speaks_late_is_answered_and_who_does_not_is_closed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_fewer_in_a_turn_while_turns_are_long(run: Run) -> None:
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


def test_without_epoll_all_go_to_http_at_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("llmctl.serving.acceptor.select.epoll")

    async def scenario(site: Site) -> None:
        late = site.client()
        await asyncio.sleep(0.05)
        assert not site.acceptor._ordinary
        late.sendall(b"late")
        assert await answer(late) == b"late"

    run(scenario)


def test_the_end_closes_what_waits(run: Run) -> None:
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


class Failing:
    """A listening socket that fails so many times before it takes a connection."""

    def __init__(self, inner: socket.socket, *errors: int) -> None:
        self._inner, self.errors = inner, list(errors)

    def fileno(self) -> int:
        return self._inner.fileno()

    def accept(self) -> Any:
        if self.errors:
            number = self.errors.pop()
            raise OSError(number, os.strerror(number))
        return self._inner.accept()


@pytest.mark.parametrize(
    ("number", "hint"), [(errno.EMFILE, " (raise ulimit -n)"), (errno.ENOMEM, ""), (errno.EINVAL, "")]
)
def test_that_none_can_be_taken_is_said_once_and_connections_wait(
    run: Run, number: int, hint: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceptor, "RETRY_SECONDS", 0.02)

    async def scenario(site: Site) -> None:
        site.acceptor._listener = Failing(site.listener, number, number, number)  # type: ignore[assignment]
        client = site.client(b"x")
        assert await answer(client) == b"x"
        assert not site.acceptor._listener.errors

    with caplog.at_level(logging.ERROR):
        run(scenario)
    assert caplog.messages == [f"no connection can be taken: {os.strerror(number)}; those to come wait{hint}"]


def test_connections_that_are_lost_before_they_are_taken_hold_nobody_up(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(site: Site) -> None:
        lost = (errno.EPROTO, errno.EPERM, errno.ECONNABORTED)
        site.acceptor._listener = Failing(site.listener, *lost)  # type: ignore[assignment]
        client = site.client(b"x")
        assert await answer(client) == b"x"
        assert site.acceptor._retry is None

    with caplog.at_level(logging.ERROR):
        run(scenario)
    assert not caplog.messages


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_a_tls_handshake_that_does_not_end_is_ended(run: Run, tmp_path: Path) -> None:
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate(tmp_path / "cert.pem"))

    async def scenario(site: Site) -> None:
        begun = site.client(b"\x16\x03\x01")  # the first bytes of a ClientHello
        assert await answer(begun) == b""
        while site.acceptor._making:
            await asyncio.sleep(0)

    run(scenario, tls)


def certificate(path: Path) -> Path:
    """A key and its certificate."""
    words = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=localhost"
    subprocess.run([*words.split(), "-keyout", path, "-out", path.with_suffix(".crt")], check=True, capture_output=True)
    path.write_bytes(path.read_bytes() + path.with_suffix(".crt").read_bytes())
    return path


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
