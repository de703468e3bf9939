"""The bounds on a connection whose request is not whole: bytes and seconds, with real sockets and a small app."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import psutil
import pytest
import uvicorn

from llmctl.serving import http_protocol
from llmctl.serving.http_protocol import MAX_HEADER_BYTES, BoundedHttpProtocol
from llmctl.serving.messages_api.schema import MessagesErrorResponse

GET = b"GET / HTTP/1.1\r\nHost: x\r\n"


async def app(_scope: Any, receive: Any, send: Any) -> None:
    """Answers with the size of the body."""
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    body = str(size).encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def sends(size: int) -> Any:
    """An app that answers with so many bytes at once."""

    async def answer(_scope: Any, _receive: Any, send: Any) -> None:
        headers = [(b"content-length", str(size).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": bytes(size)})

    return answer


def connections_of(port: int) -> list[Any]:
    """Ends of connections that the server has open."""
    found = psutil.Process().net_connections("tcp")
    return [c for c in found if c.laddr and c.laddr.port == port and c.status == "ESTABLISHED"]


@asynccontextmanager
async def serving(served: Any = app) -> AsyncIterator[int]:
    config = uvicorn.Config(served, http=BoundedHttpProtocol, log_config=None, lifespan="off", ws="none", port=0)
    server = uvicorn.Server(config)
    running = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    await running


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, *parts: bytes) -> None:
        """As separate reads of the server."""
        for part in parts:
            self.writer.write(part)
            await self.writer.drain()
            await asyncio.sleep(0.02)

    async def answer(self) -> tuple[int, bytes]:
        head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 20)
        length = next(int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if b"content-length" in line)
        return int(head.split()[1]), await self.reader.readexactly(length)

    async def refusal(self) -> tuple[int, str]:
        """Status and code of an answer after which the connection is closed."""
        status, body = await self.answer()
        assert await asyncio.wait_for(self.reader.read(), 20) == b""
        return status, json.loads(body)["error"]["code"]


async def connect(port: int) -> Client:
    return Client(*await asyncio.open_connection("127.0.0.1", port))


@pytest.fixture(autouse=True)
def _lingers_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused connection, each of which is waited for here, is closed sooner."""
    monkeypatch.setattr(http_protocol, "LINGER_SECONDS", 0.4)


HEADER = b"X-H: " + b"a" * 1015 + b"\r\n"  # 1022 bytes


@pytest.mark.parametrize(
    "parts",
    [
        [GET, *[HEADER * 16] * 6],
        [GET + HEADER * 80],
        [GET + b"X: ", *[b"a" * 2**14] * 6],
        [b"GET /", *[b"a" * 2**14] * 6],
    ],
    ids=["many headers", "in one piece", "a header without an end", "a path without an end"],
)
def test_headers_are_counted_while_they_arrive(parts: list[bytes]) -> None:
    async def run() -> None:
        async with serving() as port:
            client = await connect(port)
            await client.send(*parts)
            assert await client.refusal() == (431, "headers_too_large")

    asyncio.run(run())


def test_an_answer_that_is_owed_comes_before_the_end() -> None:
    async def run() -> None:
        async with serving() as port:
            client = await connect(port)
            await client.send(GET + b"\r\n" + GET + HEADER * 80)
            assert await client.answer() == (200, b"0")
            assert await asyncio.wait_for(client.reader.read(), 20) == b""

    asyncio.run(run())


def test_headers_below_the_limit_and_bodies_of_any_size_pass() -> None:
    async def run() -> None:
        async with serving() as port:
            client = await connect(port)
            whole = MAX_HEADER_BYTES // len(HEADER) - 1
            for pieces in ([GET + HEADER * whole + b"\r\n"], [GET, *[HEADER] * whole, b"\r\n"]):
                await client.send(*pieces)
                assert await client.answer() == (200, b"0")
            body = b"b" * 300_000
            post = b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 300000\r\n\r\n"
            # The second request's headers come in one read with the end of the first one's body.
            await client.send(post + body[:200_000], body[200_000:] + GET, b"\r\n")
            assert [await client.answer(), await client.answer()] == [(200, b"300000"), (200, b"0")]

    asyncio.run(run())


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A third of a second instead of ten."""
    monkeypatch.setattr(http_protocol, "HEADER_SECONDS", 0.3)
    monkeypatch.setattr(http_protocol, "BODY_SECONDS", 0.3)


@pytest.mark.usefixtures("hurry")
@pytest.mark.parametrize(
    "begun", [GET, b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n"], ids=["headers", "body"]
)
def test_what_comes_in_drops_is_ended(begun: bytes) -> None:
    async def run() -> None:
        async with serving() as port:
            clients = [await connect(port) for _ in range(20)]
            for client in clients:
                client.writer.write(begun)
            for _ in range(4):
                await asyncio.sleep(0.1)
                for client in clients:
                    client.writer.write(b"x")
            assert {await client.refusal() for client in clients} == {(408, "request_timeout")}

    asyncio.run(run())


@pytest.mark.usefixtures("hurry")
def test_a_refusal_has_the_shape_of_its_path() -> None:
    async def run() -> None:
        async with serving() as port:
            client = await connect(port)
            await client.send(b"POST /v1/messages HTTP/1.1\r\nX-Request-Id: mine\r\nContent-Length: 50\r\n\r\n{")
            head, _, body = (await asyncio.wait_for(client.reader.read(), 20)).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 408 ")
            assert b"\r\nrequest-id: mine\r\n" in head.lower()
            refusal = MessagesErrorResponse.model_validate_json(body)
            assert (refusal.error.type, refusal.request_id) == ("timeout_error", "mine")

    asyncio.run(run())


@pytest.mark.usefixtures("hurry")
def test_a_connection_that_says_nothing_is_closed_without_a_word() -> None:
    async def run() -> None:
        async with serving() as port:
            client = await connect(port)
            assert await asyncio.wait_for(client.reader.read(), 20) == b""

    asyncio.run(run())


@pytest.mark.usefixtures("hurry")
def test_a_body_that_keeps_coming_has_the_time_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "BODY_RATE", 1024)

    async def run() -> None:
        async with serving() as port:
            client = await connect(port)
            await client.send(b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 8192\r\n\r\n")
            for _ in range(8):
                await client.send(b"b" * 1024)
                await asyncio.sleep(0.1)
            assert await client.answer() == (200, b"8192")

    asyncio.run(run())


async def head_of(client: Client) -> dict[str, str]:
    """Headers of an answer, whose body is read; ``status`` is among them."""
    first, *lines = (await asyncio.wait_for(client.reader.readuntil(b"\r\n\r\n"), 20)).decode().split("\r\n")
    head = {"status": first.split()[1], **dict(line.lower().split(": ", 1) for line in lines if line)}
    await client.reader.readexactly(int(head["content-length"]))
    return head


def test_every_answer_carries_the_requests_id_or_a_new_one(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        async with serving() as port:
            client = await connect(port)
            await client.send(GET + b"X-Request-ID: mine-1%d%41\r\n\r\n" + GET + b"\r\n")  # two in one, pipelined
            assert (await head_of(client))["x-request-id"] == "mine-1%d%41"
            new = (await head_of(client))["x-request-id"]
            assert len(new) == 32
            for bad in (b"a b", b"\xe9", b"x" * 129):
                await client.send(GET + b"X-Request-Id: " + bad + b"\r\n\r\n")
                assert len((await head_of(client))["x-request-id"]) == 32
            await client.send(GET + b"X-Request-Id: big\r\n" + HEADER * 80)
            head = await head_of(client)
            assert (head["status"], head["x-request-id"]) == ("431", "big")
            client = await connect(port)
            await client.send(b"no HTTP at all\r\n\r\n")
            head = await head_of(client)
            assert (head["status"], len(head["x-request-id"])) == ("400", 32)

    with caplog.at_level("INFO", "uvicorn.access"):
        asyncio.run(run())
    lines = [record.getMessage() for record in caplog.records if record.name == "uvicorn.access"]
    assert lines[0].endswith('"GET / HTTP/1.1" 200 mine-1%d%41')
    assert all(len(line.rsplit(" ", 1)[1]) == 32 for line in lines[1:])


@pytest.mark.parametrize("before", [b"", GET + b"\r\n"], ids=["first", "after another"])
@pytest.mark.parametrize("line", [b"GET http://a:b/c@d:e/ HTTP/1.1", b"CONNECT a=b:443 HTTP/1.1"])
def test_a_target_that_is_no_url_is_answered(before: bytes, line: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        async with serving() as port:
            client = await connect(port)
            if before:
                await client.send(before)
                assert await client.answer() == (200, b"0")
            await client.send(line + b"\r\nHost: x\r\n\r\n")
            assert await client.refusal() == (400, "invalid_http")

    asyncio.run(run())
    assert "Traceback" not in caplog.text


async def reads_little(port: int) -> socket.socket:
    """A connection whose kernel holds as little as it can for who does not read."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
    return sock


async def endless(_scope: Any, _receive: Any, send: Any) -> None:
    """An app whose stream has no end while somebody is there."""
    gone = asyncio.create_task(until_gone(_receive))
    await send({"type": "http.response.start", "status": 200, "headers": []})
    while not gone.done():
        await send({"type": "http.response.body", "body": bytes(2**16), "more_body": True})
        await asyncio.sleep(0)


async def until_gone(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def test_who_never_reads_a_stream_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "UNREAD_SECONDS", 0.3)

    async def run() -> None:
        async with serving(endless) as port:
            with await reads_little(port) as sock:
                await asyncio.get_running_loop().sock_sendall(sock, GET + b"\r\n")
                for wanted in (True, False):  # there, and not any more
                    async with asyncio.timeout(20):
                        while bool(connections_of(port)) is not wanted:
                            await asyncio.sleep(0.02)

    asyncio.run(run())


class Unread(asyncio.Transport):
    """Holds so many bytes that nobody takes."""

    def __init__(self, unread: int) -> None:
        super().__init__()
        self.unread, self.closing, self.aborted = unread, False, False

    def get_write_buffer_size(self) -> int:
        return self.unread

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    def abort(self) -> None:
        self.aborted = True


@pytest.mark.parametrize("unread", [0, 1000])
@pytest.mark.parametrize("kept", [True, False], ids=["kept alive", "to be closed"])
def test_what_is_left_of_an_answer_does_not_keep_its_connection(
    monkeypatch: pytest.MonkeyPatch, unread: int, kept: bool
) -> None:
    """Less of it than uvicorn would wait for."""
    monkeypatch.setattr(http_protocol, "UNREAD_SECONDS", 0.05)

    async def run() -> None:
        config = uvicorn.Config(app, log_config=None)
        config.load()
        protocol, transport = BoundedHttpProtocol(config, uvicorn.server.ServerState(), {}), Unread(unread)
        protocol.connection_made(transport)
        if kept:
            protocol.timeout_keep_alive_handler()
        else:
            transport.close()
            protocol.on_response_complete()
        assert transport.closing
        await asyncio.sleep(0.2)
        assert transport.aborted == (unread > 0)
        protocol.connection_lost(None)

    asyncio.run(run())


def test_who_reads_slowly_has_the_time_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "UNREAD_SECONDS", 0.3)
    monkeypatch.setattr(http_protocol, "BODY_RATE", 2**20)

    async def run() -> None:
        size, got = 16 * 2**20, 0
        async with serving(sends(size)) as port:
            loop, sock = asyncio.get_running_loop(), await reads_little(port)
            with sock:
                await loop.sock_sendall(sock, GET + b"Connection: close\r\n\r\n")
                began = loop.time()
                while data := await loop.sock_recv(sock, 2**18):
                    got += len(data)
                    await asyncio.sleep(max(0.0, began + got / (8 * 2**20) - loop.time()))  # 2 s in all
            assert got > size

    asyncio.run(run())


def test_a_body_that_never_ends_does_not_keep_the_server(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        async with serving() as port:
            clients = [await connect(port) for _ in range(3)]
            await clients[0].send(b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
            await clients[1].send(GET)
            await clients[2].send(GET + b"\r\n")
            assert await clients[2].answer() == (200, b"0")
        assert await clients[0].refusal() == (503, "not_ready")
        for client in clients[1:]:
            assert await client.reader.read() == b""

    asyncio.run(asyncio.wait_for(run(), 20))
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_what_is_no_http_does_not_cut_into_an_answer() -> None:
    async def run() -> None:
        async with serving() as port:
            client = await connect(port)
            await client.send(GET + b"Content-Length: 1\r\n\r\nx" + b"\x00\x01 garbage\r\n\r\n")
            rest = await asyncio.wait_for(client.reader.read(), 20)
            assert rest.count(b"HTTP/1.1") <= 1

    asyncio.run(run())


def test_a_body_may_be_sent_past_the_layers_between() -> None:
    async def run() -> None:
        async def answer(scope: Any, _receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
            past = scope["state"]["send_body"]()
            assert past != send
            await past({"type": "http.response.body", "body": b"ab", "more_body": True})
            await send({"type": "http.response.body", "body": b"cd"})

        async def layer(scope: Any, receive: Any, send: Any) -> None:
            await answer(scope, receive, lambda message: send(message))

        async with serving(layer) as port:
            client = await connect(port)
            await client.send(GET + b"\r\n")
            assert await client.answer() == (200, b"abcd")

    asyncio.run(run())


def test_a_request_that_is_over_is_not_kept_until_the_collector_comes() -> None:
    async def run() -> None:
        gone: list[weakref.ref[Any]] = []

        async def answer(_scope: Any, receive: Any, send: Any) -> None:
            gone.append(weakref.ref(receive.__self__))  # the request's cycle, whose body nobody reads
            await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})

        async with serving(answer) as port:
            client = await connect(port)
            gc.disable()
            try:
                for _ in range(3):
                    await client.send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n" + b"x" * 9)
                    assert await client.answer() == (401, b"")
                assert [ref() is None for ref in gone] == [True, True, False]
            finally:
                gc.enable()

    asyncio.run(run())
