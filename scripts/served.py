"""A running ``llmctl serve`` for as long as a script needs it, and streams on it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import aiohttp
import psutil

READY_SECONDS = 300
STOP_SECONDS = 60
LAST_WORDS_SECONDS = 10
LOG_CHARS = 3000
# Below the 5 s after which the server closes a connection without requests: one that is used again at that very moment
# would be a request that fails.
KEEPALIVE_SECONDS = 2.0


class ServerError(RuntimeError):
    """The server did not start, died, or did not end as it should; with the end of what it printed."""


class Server:
    """A server that is ready: its address, and its API process.

    Attributes:
        headers: of every request, such as an API key.
        terminated: whether it has been told to end.
    """

    def __init__(self, url: str, pid: int, headers: Mapping[str, str] | None = None, log: int | None = None) -> None:
        self.url, self.pid, self.headers, self._log = url, pid, dict(headers or {}), log
        self.terminated = False
        model = json.loads(get(url + "/v1/models", self.headers))["data"][0]
        self.model, self.max_model_len = str(model["id"]), int(model["max_model_len"])

    def metrics(self) -> dict[str, float]:
        """All series now."""
        return parse_metrics(get(self.url + "/metrics", self.headers).decode())

    def said(self) -> str:
        """What it has printed so far; nothing of one that was not started here."""
        if self._log is None:
            return ""
        # Not by seek and read: the server writes at the offset of the same open file.
        return os.pread(self._log, os.fstat(self._log).st_size, 0).decode(errors="replace")

    def terminate(self) -> None:
        """SIGTERM, once: a second one would have it end at once."""
        if not self.terminated:
            self.terminated = True
            os.kill(self.pid, signal.SIGTERM)


def get(url: str, headers: Mapping[str, str] | None = None) -> bytes:
    """A body; raises OSError unless the status is 200."""
    with urllib.request.urlopen(urllib.request.Request(url, headers=dict(headers or {})), timeout=10) as answer:
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
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    port = url.rpartition(":")[2]
    command = [sys.executable, "-m", "llmctl.cli.main", "serve", "--model", model, "--port", port, *options]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            _wait_ready(url, process)
            server = Server(url, process.pid, headers, log.fileno())
            yield server
            server.terminate()
            _wait_end(process)
        except Exception as error:
            said = str(error)
            if not isinstance(error, ServerError):
                if _lives(url, process):
                    raise  # nothing that the server could explain
                said = f"the server ended by itself, exit code {process.returncode} ({type(error).__name__}: {error})"
            log.seek(0)
            raise ServerError(f"{said}\n{log.read()[-LOG_CHARS:].strip()}") from error
        finally:
            if process.poll() is None:
                for member in (*psutil.Process(process.pid).children(recursive=True), process):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        member.kill()
                process.wait()


def _wait_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + READY_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            raise ServerError(f"the server ended with exit code {process.returncode} before it was ready")
        try:
            get(url + "/ready")
            return
        except OSError:
            time.sleep(0.05)
    raise ServerError(f"the server was not ready within {READY_SECONDS} s")


def _lives(url: str, process: subprocess.Popen[bytes]) -> bool:
    """Whether the server goes on; one that answers no more is given the time to say why and end."""
    try:
        get(url + "/health")
    except OSError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(LAST_WORDS_SECONDS)
    return process.poll() is None


def _wait_end(process: subprocess.Popen[bytes]) -> None:
    try:
        code = process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        raise ServerError(f"the server did not end within {STOP_SECONDS} s of SIGTERM: killed") from None
    if code:
        raise ServerError(f"the server ended with exit code {code}")


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
