"""A running ``llmctl serve`` for as long as a script needs it, and streams on it."""

from __future__ import annotations

import contextlib
import json
import random
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import aiohttp

from llmctl.bench import local_server

# Below the 5 s after which the server closes a connection without requests: one that is used again at that very moment
# would be a request that fails.
KEEPALIVE_SECONDS = 2.0


class ServerError(RuntimeError):
    """The server did not start, died, or did not end as it should; with the end of what it printed."""


class Server:
    """A server that is ready: its address, and its API process.

    Attributes:
        headers: of every request, such as an API key.
    """

    def __init__(
        self,
        url: str,
        pid: int,
        headers: Mapping[str, str] | None = None,
        started: local_server.LocalServer | None = None,
    ) -> None:
        self.url, self.pid, self.headers, self._started = url, pid, dict(headers or {}), started
        model = json.loads(get(url + "/v1/models", self.headers))["data"][0]
        self.model, self.max_model_len = str(model["id"]), int(model["max_model_len"])

    def metrics(self) -> dict[str, float]:
        """All series now."""
        return parse_metrics(get(self.url + "/metrics", self.headers).decode())

    def said(self) -> str:
        """What it has printed so far; nothing of one that was not started here."""
        return "" if self._started is None else self._started.said()

    def terminate(self) -> None:
        """SIGTERM to a server that was started here, once: a second one would have it end at once."""
        if self._started is not None:
            self._started.terminate()


def get(url: str, headers: Mapping[str, str] | None = None) -> bytes:
    """A body; raises OSError unless the status is 200."""
    with local_server.DIRECT.open(urllib.request.Request(url, headers=dict(headers or {})), timeout=10) as answer:
        return bytes(answer.read())


def parse_metrics(text: str) -> dict[str, float]:
    """Prometheus text -> value by series name, summed over labels; without the prefix ``llmctl:``."""
    values: dict[str, float] = {}
    for line in text.splitlines():
        if line.startswith("llmctl:"):
            name, _, value = line.partition("{")
            name, value = (name, value.rpartition("}")[2]) if value else line.split(" ", 1)
            name = name.removeprefix("llmctl:")
            values[name] = values.get(name, 0.0) + float(value.split()[0])
    return values


@contextlib.contextmanager
def serving(model: str, options: Sequence[str] = (), headers: Mapping[str, str] | None = None) -> Iterator[Server]:
    """``llmctl serve`` on a free port, ready; ended with the context. ``headers``: see ``Server``.

    Raises:
        ServerError: it does not get ready, ends by itself, or does not end cleanly.
    """
    try:
        with local_server.serving(model, options) as started:
            yield Server(started.url, started.process.pid, headers, started)
    except local_server.ServerError as error:
        raise ServerError(f"{error.what}\n{error.log}") from error


def client_session(timeout: float | None = None, headers: Mapping[str, str] | None = None) -> aiohttp.ClientSession:
    """For any number of requests at once, each of which may last ``timeout`` seconds (None: any time)."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_SECONDS)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=timeout), headers=headers)


def prompts(count: int, tokens: int) -> list[list[int]]:
    """So many different prompts, the same ones each time."""
    ids = random.Random(count)
    return [[ids.randrange(1000, 10_000) for _ in range(tokens)] for _ in range(count)]


async def stream(session: aiohttp.ClientSession, server: Server, prompt: Sequence[int], output_tokens: int) -> None:
    """One stream; what it answers is read and thrown away.

    Raises:
        RuntimeError: it ends early, or the request is refused.
    """
    body: dict[str, Any] = {"model": server.model, "max_tokens": output_tokens, "ignore_eos": True, "prompt": prompt}
    body |= {"temperature": 0, "stream": True}
    async with session.post(server.url + "/v1/completions", json=body) as answer:
        if answer.status != 200:
            raise RuntimeError(f"a stream was refused: status {answer.status}: {(await answer.text())[:300]}")
        tail = b""
        async for data in answer.content.iter_any():
            tail = (tail + data)[-64:]
        if b"[DONE]" not in tail:
            raise RuntimeError("a stream ended early")
