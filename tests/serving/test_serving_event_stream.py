"""A stream whose first token takes its time: its status line, comments, and what an error becomes. The worker is played
by the test."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from serving.scripted_worker import INFO, admitting_client

from llmctl.config import ServeConfig
from llmctl.engine.llm_engine import TokenOutput
from llmctl.engine.request import FinishReason
from llmctl.errors import QueueFullError
from llmctl.serving.app import create_app
from llmctl.serving.context import Model, ServerContext
from llmctl.serving.event_stream import KEEP_ALIVE, EventStream
from llmctl.serving.generation import Generation
from llmctl.serving.keys import ServerKeys
from llmctl.serving.metrics import NO_STATS, ServerMetrics
from llmctl.serving.redaction import Redactor
from llmctl.serving.wire import ErrorInfo, Refused, StepMessage


class Call:
    """A streamed completion of an app, as ASGI has it; ``sent``: its messages so far."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        config, metrics, keys = ServeConfig(**options), ServerMetrics("m"), ServerKeys(None, None)
        self.client = admitting_client(folder, metrics, config, monkeypatch)
        context = ServerContext(config, ("m",), self.client, metrics, keys, Redactor(keys))
        assert self.client.worker.tokenizer is not None
        context.loaded = Model.from_folder("m", folder, self.client.worker.tokenizer, INFO, config)
        self.generations: list[Generation] = []
        generate = self.client.generate

        def kept(*args: Any) -> Generation:
            self.generations.append(generate(*args))
            return self.generations[-1]

        monkeypatch.setattr(self.client, "generate", kept)
        self.sent: list[dict[str, Any]] = []
        self._app = create_app(context)
        self._incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._outgoing: asyncio.Queue[None] = asyncio.Queue()

    def begin(self) -> asyncio.Task[None]:
        body = json.dumps({"prompt": "a", "stream": True}).encode()
        self._incoming.put_nowait({"type": "http.request", "body": body, "more_body": False})
        scope = {
            **{"type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"/v1/completions"},
            **{"query_string": b"", "root_path": "", "scheme": "http", "http_version": "1.1", "state": {}},
            **{"client": ("10.0.0.1", 1), "server": ("10.0.0.2", 1)},
            "headers": [(b"content-type", b"application/json")],
        }
        return asyncio.create_task(self._app(scope, self._incoming.get, self._send))  # type: ignore[arg-type]

    async def _send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)
        self._outgoing.put_nowait(None)

    async def messages(self, count: int) -> None:
        """Until so many more are there."""
        for _ in range(count):
            await asyncio.wait_for(self._outgoing.get(), 20)

    async def generation(self) -> Generation:
        while not self.generations:
            await asyncio.sleep(0)
        return self.generations[0]

    def leave(self) -> None:
        self._incoming.put_nowait({"type": "http.disconnect"})

    def token(self, generation: Generation) -> None:
        """The only one."""
        (sequence,) = generation.sequences
        output = TokenOutput(sequence.request_id, (40,), finish_reason=FinishReason.LENGTH)
        self.client.on_step(StepMessage([output], NO_STATS, 0.0))

    def take_in(self, generation: Generation) -> None:
        """The worker says that it waits."""
        (sequence,) = generation.sequences
        self.client.on_step(StepMessage([], NO_STATS, 0.0, waiting=[sequence.request_id, "of another"]))

    def refuse(self, generation: Generation) -> None:
        (sequence,) = generation.sequences
        error = ErrorInfo.of(QueueFullError("no room"))
        self.client.on_step(StepMessage([], NO_STATS, 0.0, [Refused([sequence.request_id], error)]))

    @property
    def bodies(self) -> list[bytes]:
        return [m["body"] for m in self.sent if m["type"] == "http.response.body"]


def test_a_stream_that_waits_says_so_until_its_token_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        call = Call(tmp_path, monkeypatch, sse_keepalive=0.01)
        task = call.begin()
        await call.messages(4)
        assert call.sent[0]["status"] == 200
        assert call.bodies == [KEEP_ALIVE] * 3
        call.token(await call.generation())
        await task
        rest = [body for body in call.bodies if body != KEEP_ALIVE]
        assert rest[0].startswith(b'data: {"id":"cmpl-')
        assert rest[1:] == [b"data: [DONE]\n\n", b""]
        assert call.bodies[-len(rest) :] == rest

    asyncio.run(run())


def test_a_token_in_time_needs_no_comment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        call = Call(tmp_path, monkeypatch, sse_keepalive=60)
        task = call.begin()
        call.token(await call.generation())
        await task
        assert len(call.bodies) == 3
        assert KEEP_ALIVE not in call.bodies

    asyncio.run(run())


def test_a_stream_that_was_taken_in_has_its_status_line_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        call = Call(tmp_path, monkeypatch, sse_keepalive=60)
        task = call.begin()
        generation = await call.generation()
        call.take_in(generation)
        await call.messages(2)
        assert (call.sent[0]["status"], call.bodies) == (200, [KEEP_ALIVE])
        call.token(generation)
        await task
        assert call.bodies.count(KEEP_ALIVE) == 1

    asyncio.run(run())


def test_without_comments_the_status_line_waits_for_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        call = Call(tmp_path, monkeypatch, sse_keepalive=0)
        task = call.begin()
        generation = await call.generation()
        call.take_in(generation)
        call.refuse(generation)
        await task
        assert call.sent[0]["status"] == 429

    asyncio.run(run())


def test_a_refusal_after_the_status_line_is_an_event(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        call = Call(tmp_path, monkeypatch, sse_keepalive=0.01)
        task = call.begin()
        await call.messages(2)
        call.refuse(await call.generation())
        await task
        *_, last, end = call.bodies
        error, *rest = last.split(b"\n\n")
        assert json.loads(error.removeprefix(b"data: "))["error"]["code"] == "queue_full"
        assert (rest, end) == ([b"data: [DONE]", b""], b"")

    asyncio.run(run())


@pytest.mark.parametrize("seconds", [0, 60])
def test_a_refusal_before_it_has_a_status_of_its_own(
    seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        call = Call(tmp_path, monkeypatch, sse_keepalive=seconds)
        task = call.begin()
        call.refuse(await call.generation())
        await task
        assert call.sent[0]["status"] == 429

    asyncio.run(run())


def test_a_client_that_leaves_while_it_waits_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        call = Call(tmp_path, monkeypatch, sse_keepalive=0.01)
        task = call.begin()
        await call.messages(2)
        generation = await call.generation()
        call.leave()
        await task
        assert generation.done

    asyncio.run(run())


async def nothing() -> dict[str, Any]:
    return await asyncio.Future()


async def output_of(batches: int) -> AsyncIterator[bytes]:
    for number in range(batches):
        yield b"%d" % number
        await asyncio.sleep(0)


@pytest.mark.parametrize("direct", [False, True])
def test_events_go_past_the_layers_where_the_connection_lets_them(direct: bool) -> None:
    """Start and end do not: they are what layers look at."""

    async def run() -> None:
        ways: list[tuple[str, Any]] = []

        def way(name: str) -> Any:
            async def send(message: dict[str, Any]) -> None:
                ways.append((name, message.get("body")))

            return send

        connection = way("connection")
        generation, ended = Generation(1, lambda _: None), []
        watcher = asyncio.create_task(asyncio.sleep(60))
        stream = EventStream(output_of(2), generation, watcher, lambda: ended.append(True), None, {})
        state = {"send_body": lambda: connection} if direct else {}
        await stream({"type": "http", "state": state}, nothing, way("layers"))
        past = "connection" if direct else "layers"
        assert ways == [("layers", None), (past, b"0"), (past, b"1"), ("layers", b"")]
        assert ended == [True]

    asyncio.run(run())


def test_a_stream_that_is_cancelled_drops_its_generation() -> None:
    async def run() -> None:
        dropped: list[Generation] = []
        generation = Generation(1, dropped.append)

        async def endless() -> AsyncIterator[bytes]:
            async for _ in generation:
                yield b""

        async def send(_: Any) -> None:
            pass

        watcher = asyncio.create_task(asyncio.sleep(60))
        stream = EventStream(endless(), generation, watcher, lambda: None, None, {})
        running = asyncio.create_task(stream({"type": "http"}, nothing, send))
        await asyncio.sleep(0.01)
        before = asyncio.all_tasks()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert dropped == [generation]
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) == len(before) - 3  # its own, that of its events, the watcher

    asyncio.run(run())
