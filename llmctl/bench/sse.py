"""Server-sent events of OpenAI's streaming endpoints, parsed with as little work a chunk as possible.

One ``data:`` line is one event (OpenAI's servers never split an event over lines).
"""

from __future__ import annotations

import msgspec


class Delta(msgspec.Struct):
    """New content of a chat choice."""

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: msgspec.Raw = msgspec.Raw()


class Choice(msgspec.Struct):
    """A choice of a completion (``text``) or chat (``delta``) chunk."""

    text: str | None = None
    delta: Delta | None = None
    finish_reason: str | None = None


class Usage(msgspec.Struct):
    """Token counts of the server."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class Event(msgspec.Struct):
    """One chunk; unknown fields are skipped without being built."""

    choices: list[Choice] | None = None
    usage: Usage | None = None
    error: msgspec.Raw = msgspec.Raw()


DONE = b"[DONE]"
decode_event = msgspec.json.Decoder(Event).decode


class SseLines:
    """Splits a byte stream into the payloads of its ``data:`` lines, whatever the pieces it comes in."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Payloads of the lines that ``data`` completes."""
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]

    def flush(self) -> list[bytes]:
        """The payload of a last line without its newline."""
        rest, self._rest = self._rest, b""
        return [rest[5:].strip()] if rest.startswith(b"data:") else []


def given(raw: msgspec.Raw) -> bool:
    """Whether a field was there and not null."""
    return bytes(raw) not in (b"", b"null")


def token_text(choice: Choice) -> str | None:
    """Text of a chunk that bears a token, or None when it bears none.

    A completion chunk with empty text and no finish_reason bears a token too: part of a character, or a special
    token. A chat chunk with empty content does not: it only announces the role.
    """
    if choice.delta is not None:
        delta = choice.delta
        text = delta.content or delta.reasoning_content or delta.reasoning
        if not text and given(delta.tool_calls):
            return ""
        return text or None
    if choice.text is None or (choice.text == "" and choice.finish_reason):
        return None
    return choice.text
