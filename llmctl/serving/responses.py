"""Bodies of the OpenAI-compatible responses: plain dicts that msgspec encodes, nothing is validated on the way out."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Any

import msgspec

from llmctl.engine.output import TextOutput

DONE_EVENT = b"data: [DONE]\n\n"

_encode = msgspec.json.Encoder().encode


def event(body: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + _encode(body) + b"\n\n"


def named_event(body: dict[str, Any]) -> bytes:
    """One server-sent event, named by its ``type``."""
    return b"event: %b\ndata: %b\n\n" % (body["type"].encode(), _encode(body))


@dataclass(slots=True)
class UsageCount:
    """Tokens of one HTTP request. Prompt tokens count once per prompt, however many samples are drawn of it."""

    prompt_tokens: int
    completion_tokens: int = 0
    cached: dict[int, int] = field(default_factory=dict)

    def count(self, index: int, output: TextOutput) -> None:
        """Take in output."""
        self.completion_tokens += len(output.token_ids)
        self.cached[index] = output.num_cached_tokens

    def body(self, samples: int = 1) -> dict[str, Any]:
        """OpenAI's ``usage``; of several samples of a prompt the first one's cached tokens count."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens(samples)},
        }

    def cached_tokens(self, samples: int) -> int:
        """Cached tokens of the prompts."""
        return sum(n for index, n in self.cached.items() if index % samples == 0)


@dataclass(slots=True)
class TextCount(UsageCount):
    """Counts tokens and keeps what they say, by sequence."""

    parts: dict[int, list[str]] = field(default_factory=dict)

    def count(self, index: int, output: TextOutput) -> None:
        """Take in output."""
        UsageCount.count(self, index, output)
        self.parts.setdefault(index, []).append(output.text)

    def texts(self) -> tuple[str, ...]:
        """The text of each sequence that has any, in order."""
        return tuple("".join(parts) for _, parts in sorted(self.parts.items()))


class Envelope:
    """What every body and chunk of one response repeats."""

    def __init__(self, id_: str, object_: str, created: int, model: str) -> None:
        self._fields = {"id": id_, "object": object_, "created": created, "model": model}
        self._chunk_head = b"data: " + _encode(self._fields)[:-1] + b',"choices":['

    @classmethod
    def new(cls, prefix: str, object_: str, model: str) -> Envelope:
        """A fresh id, now."""
        return cls(f"{prefix}-{uuid.uuid4().hex}", object_, int(time.time()), model)

    def body(self, choices: list[dict[str, Any]], **extra: Any) -> dict[str, Any]:
        """The document around ``choices``."""
        return {**self._fields, "choices": choices, **extra}

    def chunk(self, choice: dict[str, Any], extra: bytes = b"") -> bytes:
        """The event of ``body([choice])``; ``extra`` is the JSON of further members, with a comma in front."""
        return b"%b%b]%b}\n\n" % (self._chunk_head, _encode(choice), extra)


def usage_member(usage: dict[str, Any] | None) -> bytes:
    """``Envelope.chunk``'s extra for OpenAI's ``usage``."""
    return b',"usage":' + _encode(usage)
