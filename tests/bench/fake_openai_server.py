"""A scripted OpenAI-compatible server that records when it sent what; it runs in a thread of the test process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn

from llmctl.bench.readiness import FIRST_REQUEST


@dataclass(frozen=True)
class Reply:
    """How one request is answered.

    ``kind``: ok, http_404, http_500, http_503, cut (transport), stop_early (clean end, no finish_reason), malformed,
    error_event, empty, not_sse, hang, abort.
    """

    kind: str = "ok"
    first_delay: float = 0.0
    gap: float = 0.0
    tokens_per_chunk: int = 1
    usage: bool = True
    done: bool = True
    tokens: int | None = None
    continuous: bool = True


@dataclass
class Seen:
    """What the server saw and did for one request."""

    arrived: float
    body: dict[str, Any]
    headers: dict[str, str]
    path: str
    client_port: int
    sent: list[float] = field(default_factory=list)


@dataclass
class FakeServer:
    """Answers the i-th request with ``script[i % len(script)]``. A word is a token; one of 7 letters or more, two."""

    script: list[Reply] = field(default_factory=lambda: [Reply()])
    tokenize: bool = True
    models: tuple[str, ...] = ("fake/model",)
    # What its first answers to a GET of these paths are; 404 without any, the last one again when they are spent.
    readiness: dict[str, list[int]] = field(default_factory=dict)
    # Answers to the one-token requests that ask whether it is ready; they are no load, and not in ``seen``.
    first_script: list[Reply] = field(default_factory=lambda: [Reply()])
    first_seen: list[Seen] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    url: str = ""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        path = scope["path"]
        if path in self.readiness:
            codes = self.readiness[path]
            await self._json(send, {"reason": "loading"}, codes.pop(0) if len(codes) > 1 else codes[0])
        elif path == "/v1/models":
            await self._json(send, {"object": "list", "data": [{"id": name} for name in self.models]})
        elif path == "/version":
            await self._json(send, {"version": "fake-1"})
        elif path == "/tokenize" and self.tokenize:
            await self._json(send, {"tokens": list(range(count_tokens(json.loads(body)["prompt"])))})
        elif path in ("/v1/completions", "/v1/chat/completions"):
            headers = {k.decode(): v.decode() for k, v in scope["headers"]}
            seen = Seen(time.perf_counter(), json.loads(body), headers, path, scope["client"][1])
            first = (seen.body.get("prompt") or seen.body["messages"][0]["content"]) == FIRST_REQUEST.prompt
            log, script = (self.first_seen, self.first_script) if first else (self.seen, self.script)
            log.append(seen)
            await self._answer(send, seen, script[(len(log) - 1) % len(script)])
        else:
            await self._json(send, {"detail": "Not Found"}, 404)

    async def _json(self, send: Any, answer: Any, status: int = 200) -> None:
        await self._start(send, status, b"application/json")
        await send({"type": "http.response.body", "body": json.dumps(answer).encode()})

    async def _start(self, send: Any, status: int, kind: bytes) -> None:
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]})

    async def _answer(self, send: Any, seen: Seen, reply: Reply) -> None:
        if reply.kind.startswith("http_"):
            await self._json(send, {"error": {"message": "out of cheese"}}, int(reply.kind[-3:]))
            return
        if reply.kind == "not_sse":
            await self._json(send, {"choices": [{"text": "hello", "finish_reason": "stop"}]})
            return
        await self._start(send, 200, b"text/event-stream; charset=utf-8")

        async def event(payload: Any, more: bool = True) -> None:
            data = payload if isinstance(payload, bytes) else b"data: " + json.dumps(payload).encode() + b"\n\n"
            await send({"type": "http.response.body", "body": data, "more_body": more})

        chat = seen.path.endswith("/chat/completions")
        total = seen.body["max_tokens"] if reply.tokens is None else reply.tokens
        total = 0 if reply.kind == "empty" else total
        await asyncio.sleep(reply.first_delay)
        if reply.kind == "hang":
            await asyncio.sleep(30)
        if chat:
            await event({"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
        done = 0
        while done < total:
            if done:
                await asyncio.sleep(reply.gap)
            if done and reply.kind == "malformed":
                await event(b'data: {"choices": [{"text": \n\n')
            if done and reply.kind == "error_event":
                await event({"error": {"message": "engine died", "code": 500}})
            if done and reply.kind == "cut":
                raise ConnectionError("scripted cut")
            if done and reply.kind == "stop_early":
                await event(b": bye\n\n", more=False)
                return
            step = min(reply.tokens_per_chunk, total - done)
            done += step
            text = " word" * step
            choice = {"delta": {"content": text}} if chat else {"text": text}
            seen.sent.append(time.perf_counter())
            asked = seen.body.get("stream_options", {}).get("continuous_usage_stats") and reply.continuous
            usage = {"prompt_tokens": 1, "completion_tokens": done} if asked else None
            await event({"choices": [{"index": 0, **choice, "finish_reason": None}], "usage": usage})
        reason = "abort" if reply.kind == "abort" else "length"
        last = {"delta": {}} if chat else {"text": ""}
        await event({"choices": [{"index": 0, **last, "finish_reason": reason}]})
        if reply.usage:
            prompt = seen.body.get("prompt") or " ".join(m["content"] for m in seen.body["messages"])
            counts = {"prompt_tokens": count_tokens(prompt), "completion_tokens": total}
            await event({"choices": [], "usage": counts})
        await event(b"data: [DONE]\n\n" if reply.done else b": end\n\n", more=False)


def count_tokens(text: str) -> int:
    """The fake tokenizer: a word is a token, a word of 7 letters or more two."""
    return sum(2 if len(word) >= 7 else 1 for word in text.split())


@contextlib.contextmanager
def serve(fake: FakeServer) -> Iterator[FakeServer]:
    """Run it on a free port until the block ends."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(256)
    fake.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    config = uvicorn.Config(fake, log_level="critical", lifespan="off", access_log=False, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        server.should_exit = True
        thread.join(timeout=10)
        listener.close()
        assert not thread.is_alive()
