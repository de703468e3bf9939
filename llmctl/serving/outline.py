"""The outline of a request's body: how much it asks for, counted before objects are made of any of it.

Only for refusals that can be had cheaply: whatever is not as it should be counts as nothing here, and is refused in
words by the parser of the fields; what that one would let pass, by ``body.parsed``.
"""

from __future__ import annotations

import re
from contextlib import suppress
from functools import cache
from typing import Any

import msgspec
from pydantic import BaseModel

from llmctl.engine.sampling_params import MAX_SAMPLES

RANGED = (
    "frequency_penalty", "min_p", "presence_penalty", "repetition_penalty", "temperature", "top_p",
)  # fmt: skip
"""Fields that are numbers within a range."""
NAMES = (
    "allowed_token_ids", "bad_words", "chat_template_kwargs", "documents", "functions", "input", "logit_bias",
    "messages", "model", "n", "prompt", "stop", "stop_token_ids", "system", "tokens", "tools", *RANGED,
)  # fmt: skip
"""Fields that are looked at, beside a model's. Of others, as many as a body may have, nothing is made."""

TOO_DEEP = "recursion limit exceeded"
"""The parser's words for JSON that is nested too deeply."""
_NOTHING = msgspec.Raw(b"")
_ITEMS = msgspec.json.Decoder(list[msgspec.Raw])


@cache
def _fields(*models: type[BaseModel]) -> msgspec.json.Decoder[Any]:
    """A decoder of a body to the JSON of ``NAMES`` and of the models' fields. To look for both at once takes half."""
    names = dict.fromkeys([*NAMES, *(info.alias or name for one in models for name, info in one.model_fields.items())])
    fields = [(name, msgspec.Raw, msgspec.field(default=_NOTHING)) for name in names]
    return msgspec.json.Decoder(msgspec.defstruct("_Given", fields))


class Outline:
    """The top-level fields of a JSON object that are looked at, undecoded, the last of each name. Nothing for any other
    body.

    Args:
        models: whose fields are looked at, too, to have them when the body is parsed as one.

    Attributes:
        problem: why it is nothing; None when it is an object.
    """

    def __init__(self, body: bytes, *models: type[BaseModel]) -> None:
        self.body = body
        self._models = models
        decoder = _fields(*models)
        self._given: msgspec.Struct = decoder.type()
        self.problem: str | None = None
        try:
            self._given = decoder.decode(body)
        except ValueError as error:
            self.problem = str(error)
        except RecursionError:
            self.problem = TOO_DEEP

    def has(self, name: str) -> bool:
        """Whether the field is given."""
        return bool(self.data(name))

    def takes(self, name: str) -> bool:
        """Whether one of the models that were named has the field; all ignore others."""
        return any(name in model.model_fields for model in self._models)

    def count(self, name: str) -> int:
        """Items of a field that is an array; 0 for anything else."""
        try:
            return len(_ITEMS.decode(self.data(name)))
        except (ValueError, RecursionError):
            return 0

    def may_have(self, name: str, count: int) -> bool:
        """Whether a field that is an array may have more items than ``count``; no, where even its commas are not so
        many."""
        return self.data(name).count(b",") >= count

    def text(self, name: str) -> str | None:
        """A field that is a string; None for anything else."""
        try:
            return msgspec.json.decode(self.data(name), type=str)
        except ValueError:
            return None

    def size(self, name: str) -> int:
        """Bytes of a field's JSON."""
        return memoryview(getattr(self._given, name)).nbytes

    def beginning(self, name: str, size: int) -> str:
        """What the first ``size`` bytes, or a few less, of a field's JSON say, where it is a string that is longer;
        else nothing."""
        data = bytes(memoryview(getattr(self._given, name))[: size + 1])
        if len(data) <= size or not data.startswith(b'"'):
            return ""
        try:
            return msgspec.json.decode(data[: _whole(data, size)] + b'"', type=str)
        except ValueError:
            return ""

    def numbers(self) -> dict[str, Any]:
        """Those of ``RANGED`` that are numbers."""
        found: dict[str, float] = {}
        for name in RANGED:
            with suppress(ValueError):
                found[name] = msgspec.json.decode(self.data(name), type=float)
        return found

    def ids(self, name: str) -> int:
        """Numbers of a field that is an array of numbers; 0 for anything else."""
        data = self.data(name)
        return data.count(b",") + 1 if _first_item(data) in "-0123456789" else 0

    def strings(self, name: str) -> int:
        """Strings of a field that is an array of strings; 0 for anything that begins otherwise."""
        data = self.data(name)
        return count_texts(data) if _first_item(data) == '"' else 0

    def members(self, name: str) -> int:
        """Members of a field that is an object of numbers; no less for any other object, and 0 for anything else."""
        data = self.data(name)
        return data.count(b":") if data.startswith(b"{") else 0

    def prompts(self, name: str = "prompt") -> int:
        """How many prompts a field holds: 1 for a text or token ids, else the items of its array."""
        data = self.data(name)
        first = _first_item(data)
        if first == "[":  # lists of numbers: no string can hold another bracket
            return data.count(b"[") - 1 if b'"' not in data else self.count(name)
        return self.strings(name) if first == '"' else 1

    def sequences(self) -> int:
        """Prompts times ``n``, which counts as 1 when it is out of its range."""
        try:
            n = msgspec.json.decode(self.data("n"), type=int)
        except ValueError:
            n = 1
        return (n if 1 <= n <= MAX_SAMPLES else 1) * self.prompts()

    def data(self, name: str) -> bytes:
        """The JSON of one of ``NAMES`` or of the models' fields; empty: it is not given."""
        return bytes(getattr(self._given, name))

    def of_model(self, model: type[BaseModel]) -> dict[str, bytes]:
        """The JSON of each field of a model that is given."""
        names = [info.alias or name for name, info in model.model_fields.items()]
        found = self if all(hasattr(self._given, name) for name in names) else Outline(self.body, model)
        return {name: data for name in names if (data := found.data(name))}


def _whole(data: bytes, size: int) -> int:
    """Where a string's JSON can be cut, at ``size`` or a little before it, so that no character is cut."""
    while data[size] & 0xC0 == 0x80:  # within UTF-8
        size -= 1
    escape = data.rfind(b"\\", max(0, size - 6), size)
    run = data[: escape + 1]
    if (len(run) - len(run.rstrip(b"\\"))) % 2 == 0:  # none, or the second of a pair, which is whole
        return size
    high = data[escape - 6 : escape]  # the first half of a pair is not left alone
    return escape - 6 if re.fullmatch(rb"\\u[dD][89abAB][0-9a-fA-F]{2}", high) else escape


def count_texts(array: bytes) -> int:
    """Items of an array of strings."""
    if b"\\" in array:
        array = array.replace(b"\\\\", b"").replace(b'\\"', b"")
    return array.count(b'"') // 2


def _first_item(array: bytes) -> str:
    """The first character of an array's first item; a space for what is no array or an empty one."""
    if not array.startswith(b"["):
        return " "
    first = array[1:64].lstrip()[:1].decode("latin-1")
    return first if first not in ("", "]") else " "
