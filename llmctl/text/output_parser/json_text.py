"""JSON, read as it comes."""

from __future__ import annotations

import json
import re
from typing import Any

from llmctl.text.output_parser.cursor import Cursor, Reading, Sink

_PLAIN = re.compile(r'[^"{}\[\]]+')
_IN_STRING = re.compile(r'[^"\\]+')
_SCALAR = re.compile(r'[^\s,:"{}\[\]]+')
_CLOSER = {"{": "}", "[": "]"}


def dump(value: Any) -> str:
    """JSON that UTF-8 can hold: half a surrogate pair stays an escape."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, allow_nan=False)
    return text


def is_object(text: str) -> bool:
    """Whether a text is a JSON object."""
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def read_string(cursor: Cursor) -> Reading[str | None]:
    """The value of a JSON string, from its opening quote; None if it is none."""
    parts: list[str] = []
    if not (yield from _string(cursor, parts.append)):
        return None
    try:
        value: str = json.loads("".join(parts), strict=False)
        value.encode()  # half a surrogate pair cannot be
    except ValueError:
        return None
    return value


def read_value(cursor: Cursor, sink: Sink) -> Reading[bool]:
    """Hand a JSON value's text on as it comes, up to its end; whether its quotes and brackets match."""
    char = yield from cursor.peek()
    if char == '"':
        return (yield from _string(cursor, sink))
    if char in _CLOSER:
        return (yield from _bracketed(cursor, sink))
    begun = False
    while scalar := cursor.run(_SCALAR):
        begun = True
        sink(scalar)
        yield from cursor.peek()
    return begun


def _bracketed(cursor: Cursor, sink: Sink) -> Reading[bool]:
    closers: list[str] = []
    while True:
        if plain := cursor.run(_PLAIN):
            sink(plain)
        char = yield from cursor.peek()
        if char == '"':
            if not (yield from _string(cursor, sink)):
                return False
        elif char in _CLOSER:
            closers.append(_CLOSER[char])
            sink(cursor.take(1))
        elif char and char in "]}":
            if char != closers[-1]:
                return False
            sink(cursor.take(1))
            closers.pop()
            if not closers:
                return True
        elif not char:
            return False


def _string(cursor: Cursor, sink: Sink) -> Reading[bool]:
    sink(cursor.take(1))
    while True:
        if plain := cursor.run(_IN_STRING):
            sink(plain)
        char = yield from cursor.peek()
        if not char:
            return False
        if char == '"':
            sink(cursor.take(1))
            return True
        if char == "\\":
            escape = cursor.take(1)
            yield from cursor.peek()
            sink(escape + cursor.take(1))
