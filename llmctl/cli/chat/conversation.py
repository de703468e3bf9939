"""What a chat has come to: system prompt, turns, sampling fields; and the request that the next message makes of it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llmctl.errors import UsageError

Value = float | int | str
DEFAULT = "default"
"""The word that takes a field back to what the server does by itself."""


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


SAMPLING_FIELDS: Mapping[str, Callable[[str], Value]] = {
    "temperature": _number,
    "top_p": _number,
    "top_k": int,
    "min_p": _number,
    "repetition_penalty": _number,
    "presence_penalty": _number,
    "frequency_penalty": _number,
    "max_tokens": int,
    "seed": int,
    "stop": str,
}
"""What ``/set`` and the options of ``run`` may set: fields of a request, and how each is read."""


def parse_field(name: str, text: str) -> Value:
    """The value of a sampling field; its range is the server's to judge.

    Raises:
        UsageError: no such field, or not a value of its kind.
    """
    name = name.replace("-", "_")
    if name not in SAMPLING_FIELDS:
        close = difflib.get_close_matches(name, SAMPLING_FIELDS, n=1, cutoff=0.5)
        near = f"did you mean {close[0]}?" if close else f"one of {', '.join(SAMPLING_FIELDS)}"
        raise UsageError(f"'{name}' is no sampling field", fix=near, param=name)
    read = SAMPLING_FIELDS[name]
    try:
        return read(text)
    except ValueError:
        kind = "a whole number" if read is int else "a number"
        raise UsageError(f"{name}: expected {kind}, found '{text}'", param=name) from None


@dataclass
class Conversation:
    """One chat.

    Attributes:
        model: its name in the server's API. raw: texts go to the model as they are, without its chat template, and each
            stands alone.
        system: the system prompt; "": none. sampling: fields of each request; others are the server's to choose.
        messages: turns so far, as the API has them.
    """

    model: str
    raw: bool = False
    system: str = ""
    sampling: dict[str, Value] = field(default_factory=dict)
    messages: list[dict[str, str]] = field(default_factory=list)

    @property
    def path(self) -> str:
        """The endpoint that its requests go to."""
        return "/v1/completions" if self.raw else "/v1/chat/completions"

    def body(self, text: str) -> dict[str, Any]:
        """The request for an answer to ``text``, streamed, with the server's count of tokens at its end."""
        asked: dict[str, Any] = {"model": self.model, "stream": True, "stream_options": {"include_usage": True}}
        if self.raw:
            asked["prompt"] = text
        else:
            system = [{"role": "system", "content": self.system}] if self.system else []
            asked["messages"] = [*system, *self.messages, {"role": "user", "content": text}]
        return asked | self.sampling

    def add(self, text: str, answer: str) -> None:
        """Take in a turn; one without an answer is as if it had not been."""
        if answer and not self.raw:
            self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]

    def clear(self) -> None:
        """Forget the turns."""
        self.messages.clear()

    def set(self, name: str, text: str) -> None:
        """Set a sampling field, or with ``default`` leave it to the server.

        Raises:
            UsageError: as ``parse_field``.
        """
        name = name.replace("-", "_")
        if text == DEFAULT and name in SAMPLING_FIELDS:
            self.sampling.pop(name, None)
        else:
            self.sampling[name] = parse_field(name, text)
