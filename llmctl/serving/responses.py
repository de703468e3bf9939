"""Bodies of the OpenAI-compatible responses: plain dicts that msgspec encodes, nothing is validated on the way out."""

from __future__ import annotations

import math
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from llmctl.engine.output import TextOutput, TokenText, describe_token
from llmctl.serving.intake import Prompt
from llmctl.text.tokenizer import Tokenizer

DONE_EVENT = b"data: [DONE]\n\n"
_LOWEST_LOGPROB = -9999.0  # JSON has no -inf; the value other servers use

_encode = msgspec.json.Encoder().encode


def event(body: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + _encode(body) + b"\n\n"


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold."""
    return max(logprob, _LOWEST_LOGPROB)


def shown(token: TokenText) -> str:
    """A token's text as logprobs show it: ``bytes:\\xe2…`` for a part of a character, as OpenAI writes it."""
    if "\ufffd" not in token.text:
        return token.text
    return "bytes:" + "".join(f"\\x{b:02x}" for b in token.data)


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


def chat_logprobs(output: TextOutput) -> dict[str, Any] | None:
    """OpenAI's ``choices[].logprobs`` of chat completions."""
    if output.logprobs is None:
        return None
    content = [
        {**_token_entry(position.token), "top_logprobs": [_token_entry(token) for token in position.top]}
        for position in output.logprobs
    ]
    return {"content": content}


def _token_entry(token: TokenText) -> dict[str, Any]:
    return {"token": shown(token), "logprob": finite(token.logprob), "bytes": list(token.data)}


class CompletionLogprobs:
    """OpenAI's ``choices[].logprobs`` of completions; ``text_offset`` runs on over the chunks of a stream."""

    def __init__(self) -> None:
        self._offset = 0

    def body(self, output: TextOutput) -> dict[str, Any] | None:
        """The logprobs of one output; None when not asked for."""
        if output.logprobs is None:
            return None
        body = self._empty()
        for position in output.logprobs:
            top = {shown(token): finite(token.logprob) for token in (position.token, *position.top)}
            self._append(body, shown(position.token), finite(position.token.logprob), top)
        return body

    def echoed(self, tokenizer: Tokenizer, prompt: Prompt, output: TextOutput) -> dict[str, Any] | None:
        """The logprobs of prompt and output; a prompt token's alternatives are not known, its first has none."""
        if output.prompt_scores is None:
            return self.body(output)
        body = self._empty()
        for token in prompt_tokens(tokenizer, prompt, output.prompt_scores):
            logprob = None if math.isnan(token.logprob) else finite(token.logprob)
            self._append(body, shown(token), logprob, None if logprob is None else {shown(token): logprob})
        rest = self.body(output) or self._empty()
        return {name: body[name] + rest[name] for name in body}

    @staticmethod
    def _empty() -> dict[str, Any]:
        return {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}

    def _append(self, body: dict[str, Any], text: str, logprob: float | None, top: dict[str, float] | None) -> None:
        body["tokens"].append(text)
        body["text_offset"].append(self._offset)
        body["token_logprobs"].append(logprob)
        body["top_logprobs"].append(top)
        self._offset += len(text)


def prompt_tokens(tokenizer: Tokenizer, prompt: Prompt, scores: NDArray[np.float32]) -> list[TokenText]:
    """The prompt's tokens with their log-probabilities; the first one's is not a number."""
    pairs = zip(prompt.token_ids, [math.nan, *scores.tolist()], strict=True)
    return [describe_token(tokenizer, token_id, score, 0) for token_id, score in pairs]


def prompt_logprobs(tokenizer: Tokenizer, prompt: Prompt, scores: NDArray[np.float32] | None) -> list[Any] | None:
    """vLLM's ``choices[].prompt_logprobs``: per prompt token, the token's own entry; None for the first."""
    if scores is None:
        return None
    entries: list[Any] = [None]
    for token in prompt_tokens(tokenizer, prompt, scores)[1:]:
        entries.append({str(token.token_id): {"logprob": finite(token.logprob), "decoded_token": token.text}})
    return entries
