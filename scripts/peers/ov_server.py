"""OpenVINO GenAI's continuous batching behind the one endpoint that the load generator uses.

OpenVINO GenAI is a library; this puts the thinnest HTTP server around it, so that it is measured with the same load as
the others. Runs in that peer's environment, with nothing but its packages and the standard library:

    python ov_server.py --model DIR --port N --threads N

One thread steps the engine; per step it hands all new tokens to the event loop at once. A token's text comes from a
table made at the start. Requests: ``GET /health``, ``GET /v1/models``, ``POST /v1/completions`` (``prompt``,
``max_tokens``, ``ignore_eos``, ``stream``); always greedy, every connection closed after its answer.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openvino_genai as genai  # type: ignore[import-not-found]
from openvino import Tensor  # type: ignore[import-not-found]
from tokenizers import Tokenizer

_CACHE_GB = 1
_MAX_SEQUENCES = 32


@dataclass
class Stream:
    """A request under way; its tokens arrive in ``tokens`` (None: the end) on the event loop."""

    handle: Any
    prompt_tokens: int
    tokens: asyncio.Queue[list[int] | None] = field(default_factory=asyncio.Queue)


class Engine:
    """The pipeline and the thread that steps it."""

    def __init__(self, model: Path, threads: int) -> None:
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = _CACHE_GB
        scheduler.max_num_seqs = _MAX_SEQUENCES
        scheduler.enable_prefix_caching = False
        properties = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        self._pipeline = genai.ContinuousBatchingPipeline(str(model), scheduler, "CPU", properties)
        self._tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        size = self._tokenizer.get_vocab_size()
        self._text = self._tokenizer.decode_batch([[i] for i in range(size)], skip_special_tokens=False)
        self._ids = itertools.count()
        self._arrived: list[tuple[Stream, list[int], Any]] = []
        self._wake = threading.Condition()

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin stepping; tokens are delivered on ``loop``."""
        threading.Thread(target=self._run, args=(loop,), daemon=True).start()

    def text(self, token: int) -> str:
        """A token's text by itself."""
        return str(self._text[token])

    def submit(self, prompt: str, max_tokens: int, ignore_eos: bool) -> Stream:
        """Queue a prompt."""
        ids = self._tokenizer.encode(prompt).ids
        config = genai.GenerationConfig()
        config.max_new_tokens = max_tokens
        config.do_sample = False
        config.ignore_eos = ignore_eos
        stream = Stream(None, len(ids))
        with self._wake:
            self._arrived.append((stream, ids, config))
            self._wake.notify()
        return stream

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        running: list[Stream] = []
        while True:
            with self._wake:
                while not self._arrived and not running:
                    self._wake.wait()
                arrived, self._arrived = self._arrived, []
            for stream, ids, config in arrived:
                stream.handle = self._pipeline.add_request(next(self._ids), _row(ids), config)
                running.append(stream)
            self._pipeline.step()
            news = [(stream, _new_tokens(stream), _ended(stream)) for stream in running]
            running = [stream for stream, _, ended in news if not ended]
            loop.call_soon_threadsafe(_deliver, news)


def _row(ids: list[int]) -> Tensor:
    import numpy as np

    return Tensor(np.asarray([ids], dtype=np.int64))


def _new_tokens(stream: Stream) -> list[int]:
    tokens: list[int] = []
    while stream.handle.can_read():
        for output in stream.handle.read().values():
            tokens += output.generated_ids
    return tokens


def _ended(stream: Stream) -> bool:
    return bool(stream.handle.get_status() != genai.GenerationStatus.RUNNING)


def _deliver(news: list[tuple[Stream, list[int], bool]]) -> None:
    for stream, tokens, ended in news:
        if tokens:
            stream.tokens.put_nowait(tokens)
        if ended:
            stream.tokens.put_nowait(None)


class Server:
    """HTTP/1.1, one request a connection."""

    def __init__(self, engine: Engine, name: str) -> None:
        self._engine, self._name = engine, name

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request and close."""
        try:
            method, path, body = await _request(reader)
            if (method, path) == ("GET", "/health"):
                _answer(writer, {"status": "ok"})
            elif (method, path) == ("GET", "/v1/models"):
                _answer(writer, {"object": "list", "data": [{"id": self._name, "object": "model"}]})
            elif (method, path) == ("POST", "/v1/completions"):
                await self._complete(json.loads(body), writer)
            else:
                _answer(writer, {"error": {"message": f"no such path: {path}"}}, status="404 Not Found")
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _complete(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        stream = self._engine.submit(body["prompt"], int(body["max_tokens"]), bool(body.get("ignore_eos")))
        streamed = bool(body.get("stream"))
        if streamed:
            writer.write(_head("200 OK", "text/event-stream"))
        parts: list[str] = []
        count = 0
        while (tokens := await stream.tokens.get()) is not None:
            count += len(tokens)
            texts = [self._engine.text(token) for token in tokens]
            parts += texts
            if streamed:
                writer.write(b"".join(_event({"choices": [_choice(text, None)]}) for text in texts))
        usage = {"prompt_tokens": stream.prompt_tokens, "completion_tokens": count}
        if streamed:
            writer.write(_event({"choices": [_choice("", "length")]}) + _event({"choices": [], "usage": usage}))
            writer.write(b"data: [DONE]\n\n")
        else:
            _answer(writer, {"choices": [_choice("".join(parts), "length")], "usage": usage})


def _choice(text: str, finish_reason: str | None) -> dict[str, Any]:
    return {"index": 0, "text": text, "finish_reason": finish_reason}


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


def _head(status: str, kind: str) -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nConnection: close\r\n\r\n".encode()


def _answer(writer: asyncio.StreamWriter, data: dict[str, Any], status: str = "200 OK") -> None:
    writer.write(_head(status, "application/json") + json.dumps(data).encode())


async def _request(reader: asyncio.StreamReader) -> tuple[str, str, bytes]:
    """Method, path and body of a request."""
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    method, path, _ = lines[0].split(" ", 2)
    fields = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
    body = await reader.readexactly(int(fields.get("content-length", "0")))
    return method, path, body


async def main() -> None:
    """Serve until ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder that optimum-cli exported")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    engine = Engine(args.model, args.threads)
    engine.start(asyncio.get_running_loop())
    server = await asyncio.start_server(Server(engine, args.model.name).handle, "127.0.0.1", args.port)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
