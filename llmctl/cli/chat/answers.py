"""Answers of an OpenAI-compatible server as they are written, one at a time."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import msgspec

from llmctl.bench.sse import DONE, SseLines, decode_event, given
from llmctl.errors import LlmctlError

if TYPE_CHECKING:
    import aiohttp

    from llmctl.bench.endpoint import Endpoint

_CONNECT_SECONDS = 10.0
_ERROR_CHARS = 500


@dataclass
class Answer:
    """One answer, as far as it has come.

    Attributes:
        text, reasoning: what was written. finish_reason: None while it runs, or if it was stopped.
        prompt_tokens, completion_tokens: as the server counts; None: it did not say. pieces: that bore text.
        started, first, last: when it was asked for, and its first and last piece came; seconds of one clock.
    """

    text: str = ""
    reasoning: str = ""
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    pieces: int = 0
    started: float = 0.0
    first: float | None = None
    last: float = 0.0

    @property
    def tokens(self) -> int:
        """Tokens of the answer; without the server's count its pieces, which may bear several."""
        return self.pieces if self.completion_tokens is None else self.completion_tokens

    @property
    def tokens_per_second(self) -> float | None:
        """After the first one; None for fewer than two."""
        if self.first is None or self.tokens < 2 or self.last <= self.first:
            return None
        return (self.tokens - 1) / (self.last - self.first)

    def speed_line(self) -> str:
        """How much was written and how fast, on one line."""
        about = "" if self.completion_tokens is not None else "about "
        parts = [f"{about}{self.tokens} tokens"]
        if (rate := self.tokens_per_second) is not None:
            parts.append(f"{rate:.1f} tok/s")
        if self.first is not None:
            parts.append(f"first after {self.first - self.started:.2f} s")
        if self.prompt_tokens is not None:
            parts.append(f"prompt {self.prompt_tokens} tokens")
        if self.finish_reason == "length":
            parts.append("cut at the longest output; /set max_tokens, or --max-tokens")
        elif self.finish_reason is None:
            parts.append("unfinished")
        return ", ".join(parts)

    def document(self) -> dict[str, Any]:
        """As JSON data; times in seconds."""
        return {
            "text": self.text,
            "reasoning": self.reasoning,
            "finish_reason": self.finish_reason,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "seconds_to_first_token": None if self.first is None else self.first - self.started,
            "tokens_per_second": self.tokens_per_second,
        }


Show = Callable[[str, bool], None]
"""Shows a piece of text; True: of the reasoning before the answer."""


class AnswerStream:
    """A server that is asked again and again. Ctrl-C ends the answer under way, and its request with it."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._runner = asyncio.Runner()
        self._session: aiohttp.ClientSession | None = None

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            self._runner.run(self._session.close())
        self._runner.close()

    def ask(self, path: str, body: dict[str, Any], answer: Answer, show: Show) -> None:
        """Fill ``answer`` from the endpoint at ``path``, showing each piece as it comes.

        Raises:
            LlmctlError: the server refuses the request, cannot be reached or ends without saying that it is done.
            OSError: of ``show``.
            KeyboardInterrupt: ``answer`` then holds what had come.
        """
        self._runner.run(self._ask(path, body, answer, show))

    async def _ask(self, path: str, body: dict[str, Any], answer: Answer, show: Show) -> None:
        answer.started = time.monotonic()
        async with contextlib.aclosing(self._payloads(path, body, answer)) as payloads:
            async for payload, now in payloads:
                _take(payload, answer, now, show)  # not in there: errors of what shows it are not the server's

    async def _payloads(
        self, path: str, body: dict[str, Any], answer: Answer
    ) -> AsyncGenerator[tuple[bytes, float], None]:
        """The payloads of the answer's events, each with the time at which it came; all before are in ``answer``."""
        import aiohttp

        try:
            async with self._opened().post(self._endpoint.base_url + path, json=body) as response:
                if response.status != 200:
                    raise LlmctlError(_refusal(response.status, await response.text(errors="replace")))
                lines = SseLines()
                async for data in response.content.iter_any():
                    now = time.monotonic()
                    for payload in lines.feed(data):
                        if payload == DONE:
                            return
                        yield payload, now
                for payload in lines.flush():
                    if payload != DONE:
                        yield payload, time.monotonic()
                if answer.finish_reason is None:
                    raise _cut_short(response, answer)
        except (aiohttp.ClientError, OSError) as error:
            raise LlmctlError(
                f"{self._endpoint.base_url}: {' '.join(str(error).split()) or type(error).__name__}"
            ) from error

    def _opened(self) -> aiohttp.ClientSession:
        import aiohttp

        if self._session is None:
            self._session = aiohttp.ClientSession(
                # A connection of its own for each answer: people think for longer than servers keep one open.
                connector=aiohttp.TCPConnector(force_close=True, ssl=self._endpoint.verify_tls),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS),
                headers=dict(self._endpoint.headers),
            )
        return self._session


def _cut_short(response: aiohttp.ClientResponse, answer: Answer) -> LlmctlError:
    kind = response.headers.get("Content-Type", "none")
    return LlmctlError(
        "the answer ended early: expected a finish_reason or [DONE]" + ("" if answer.pieces else f", found {kind}")
    )


def _take(payload: bytes, answer: Answer, now: float, show: Show) -> None:
    """Take one event of the stream into the answer.

    Raises:
        LlmctlError: it is not one, or an error of the server.
    """
    try:
        event = decode_event(payload)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise LlmctlError(f"the server sent an event that is not understood: {error}") from error
    if given(event.error):
        raise LlmctlError(_said(bytes(event.error)))
    if event.usage is not None:
        answer.prompt_tokens, answer.completion_tokens = event.usage.prompt_tokens, event.usage.completion_tokens
    for choice in event.choices or ():
        delta = choice.delta
        thought = (delta.reasoning_content or delta.reasoning or "") if delta is not None else ""
        text = (delta.content if delta is not None else choice.text) or ""
        if thought or text:
            answer.pieces += 1
            answer.first = now if answer.first is None else answer.first
            answer.last = now
        answer.reasoning += thought
        answer.text += text
        for piece, reasons in ((thought, True), (text, False)):
            if piece:
                show(piece, reasons)
        answer.finish_reason = choice.finish_reason or answer.finish_reason


def _refusal(status: int, body: str) -> str:
    said = _said(body.encode())
    return said if said.strip() else f"the server answered with status {status}"


def _said(body: bytes) -> str:
    """The message in an error's JSON, or the text as it is."""
    try:
        document = json.loads(body)
    except ValueError:
        document = None
    found: Any = document
    for key in ("error", "message"):
        if isinstance(found, dict) and key in found:
            found = found[key]
    text = found if isinstance(found, str) else body.decode(errors="replace")
    return text if len(text) <= _ERROR_CHARS else text[: _ERROR_CHARS - 1] + "…"
