"""Readers of one tool call, a layout each. What they find goes to a ``CallSink``.

Each returns whether a call was read. Until it has told the sink of one (``begin``), everything is text still; from then
on what it reads belongs to the call, and where it stops, text goes on.
"""

from __future__ import annotations

import ast
import contextlib
import json
import re
import warnings
from collections.abc import Mapping
from typing import Any, Protocol

from llmctl.text.output_parser.cursor import Cursor, Reading
from llmctl.text.output_parser.formats import ToolFormat
from llmctl.text.output_parser.json_text import dump, read_string, read_value

_NAME = re.compile(r"[\w.:/-]{1,256}")
_PYTHON_NAME = re.compile(r"[\w.:/-]+")
_PYTHON_PLAIN = re.compile(r"[^\"'()\[\]{},\\]+")
_PYTHON_STRING = re.compile(r"[^\"'\\]+")
_CLOSER = {"(": ")", "[": "]", "{": "}"}
_MOST_NESTED = 50
_MOST_NAME = 256
_PYTHON_SCALARS = {"True": True, "False": False, "None": None}
_JSON_SCALARS = {"true": "True", "false": "False", "null": "None"}
_BEFORE_NAME = ("type", "id")
_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}


class CallSink(Protocol):
    """Takes in calls as they are read."""

    def known(self, name: str) -> bool:
        """Whether a call of this name is one."""

    def schema(self, name: str) -> Mapping[str, Any]:
        """JSON schemas of a function's parameters, by name."""

    def begin(self, name: str) -> None:
        """A call begins."""

    def arguments(self, text: str) -> None:
        """More of its arguments' JSON."""

    def close(self) -> None:
        """Its arguments are complete."""


def read_json_call(cursor: Cursor, row: ToolFormat, sink: CallSink) -> Reading[bool]:
    """``{"name": …, "arguments": {…}}``: members in any order, others passed over."""
    call = _JsonCall(cursor, row, sink)
    cursor.take(1)
    while (char := (yield from cursor.space())) != "}":
        if char != '"' or not (yield from call.member()):
            return call.begun
        if (yield from cursor.space()) == ",":
            cursor.take(1)
    if not call.finish():
        return False
    cursor.take(1)
    return True


class _JsonCall:
    """What is known of a call that is an object."""

    def __init__(self, cursor: Cursor, row: ToolFormat, sink: CallSink) -> None:
        self._cursor = cursor
        self._bare = row.bare
        self._sink = sink
        self._name: str | None = None
        self._arguments: list[str] | None = None
        self.begun = False

    def member(self) -> Reading[bool]:
        """Read a member, from its key's quote; whether it is as it should be."""
        key = yield from read_string(self._cursor)
        if key is None or (yield from self._cursor.space()) != ":":
            return False
        self._cursor.take(1)
        char = yield from self._cursor.space()
        if key == "name" and self._name is None:
            self._name = (yield from read_string(self._cursor)) if char == '"' else None
            if self._name is None or not _NAME.fullmatch(self._name) or not self._sink.known(self._name):
                return False
            return self._arguments is None or self.finish()
        if key in ("arguments", "parameters") and self._arguments is None:
            return (yield from self._read_arguments(char))
        if self._bare and self._name is None and key not in _BEFORE_NAME:
            return False  # an answer that is JSON need not wait for its end
        return (yield from read_value(self._cursor, len))

    def _read_arguments(self, char: str) -> Reading[bool]:
        self._arguments = held = []
        if char == '"':  # JSON within JSON
            text = yield from read_string(self._cursor)
            if text is None:
                return False
            held.append(text)
            return self._name is None or self.finish()
        if char != "{":
            return char == "n" and (yield from read_value(self._cursor, len))
        if self._name is None:
            return (yield from read_value(self._cursor, held.append))
        self.begun = True
        self._sink.begin(self._name)
        if not (yield from read_value(self._cursor, self._sink.arguments)):
            return False
        self._sink.close()
        return True

    def finish(self) -> bool:
        """Tell of the call, if that was not done; whether there is one."""
        if self._name is not None and not self.begun:
            self.begun = True
            self._sink.begin(self._name)
            self._sink.arguments("".join(self._arguments or ()) or "{}")
            self._sink.close()
        return self.begun


def read_named_call(cursor: Cursor, row: ToolFormat, sink: CallSink) -> Reading[bool]:
    """The name, a marker, the arguments as a JSON object; Mistral's may lack the marker, or have an id before it."""
    name: list[str] = []
    found = ""
    while len(name) <= _MOST_NAME:
        char = yield from cursor.peek()
        found = yield from _one_of(cursor, row.name_ends)
        if found or char in ("", "{"):
            break
        name.append(cursor.take(1))
    text = "".join(name).strip()
    if found == "[CALL_ID]" and (yield from cursor.until(("[ARGS]",), len)) is None:
        return False
    if not _NAME.fullmatch(text) or not sink.known(text) or (yield from cursor.space()) != "{":
        return False
    sink.begin(text)
    if not (yield from read_value(cursor, sink.arguments)):
        return True
    sink.close()
    return True


def _one_of(cursor: Cursor, literals: tuple[str, ...]) -> Reading[str]:
    for literal in literals:
        if (yield from cursor.accept(literal)):
            return literal
    return ""


def read_tagged_call(cursor: Cursor, row: ToolFormat, sink: CallSink) -> Reading[bool]:
    """The name, then a tag for each argument; its value's type is the schema's."""
    name: list[str] = []
    if (yield from cursor.until((">",), name.append)) is None:
        return False
    text = "".join(name).strip()
    if not _NAME.fullmatch(text) or not sink.known(text):
        return False
    types = sink.schema(text)
    begun = False
    while True:
        yield from cursor.space()
        if (yield from cursor.accept(row.call_end)):
            if not begun:
                sink.begin(text)
            sink.arguments("}" if begun else "{}")
            sink.close()
            return True
        if not (yield from cursor.accept("<parameter=")):
            return begun
        key: list[str] = []
        if (yield from cursor.until((">",), key.append)) is None:
            return begun
        if not begun:
            sink.begin(text)
        parameter = "".join(key).strip()
        sink.arguments(("{" if not begun else ", ") + dump(parameter) + ": ")
        begun = True
        if not (yield from _tagged_value(cursor, types.get(parameter), sink)):
            return True


def _tagged_value(cursor: Cursor, schema: Any, sink: CallSink) -> Reading[bool]:
    """A parameter's value: strings as they come, others when they are whole. A newline at either end is layout."""
    yield from cursor.accept("\n")
    ends = ("\n</parameter>", "</parameter>")
    types = _types(schema)
    if types == ["string"]:
        sink.arguments('"')
        complete = yield from cursor.until(ends, lambda text: sink.arguments(dump(text)[1:-1]))
        if complete is not None:
            sink.arguments('"')
        return complete is not None
    parts: list[str] = []
    if (yield from cursor.until(ends, parts.append)) is None:
        return False
    sink.arguments(dump(_typed("".join(parts), types)))
    return True


def _types(schema: Any) -> list[Any]:
    """The types that a schema names; none when it says so in another way."""
    kind = schema.get("type") if isinstance(schema, Mapping) else "string"
    return kind if isinstance(kind, list) else [] if kind is None else [kind]


def _typed(text: str, types: list[Any]) -> Any:
    """A value that may be something else than a string: JSON, or one of Python's constants, else text."""
    value: Any = text
    with contextlib.suppress(ValueError, RecursionError):
        stripped = text.strip()
        value = _PYTHON_SCALARS[stripped] if stripped in _PYTHON_SCALARS else json.loads(stripped)
        dump(value)
    kind = _TYPES.get(type(value), "null")
    fits = kind in types or (kind == "integer" and "number" in types)
    return text if "string" in types and not fits else value


def read_python_call(cursor: Cursor, row: ToolFormat, sink: CallSink) -> Reading[bool]:  # noqa: ARG001
    """``name(key=value, …)`` with Python's literals; an argument is told of when it is whole."""
    name = ""
    while (yield from cursor.peek()) and (part := cursor.run(_PYTHON_NAME)):
        name += part
    if not name or not sink.known(name) or (yield from cursor.space()) != "(":
        return False
    cursor.take(1)
    begun = False
    while (yield from cursor.space()) != ")":
        parts: list[str] = []
        if not (yield from _python_expression(cursor, parts)):
            return begun
        argument = _python_argument("".join(parts))
        if argument is None:
            return begun
        if not begun:
            sink.begin(name)
        sink.arguments(("{" if not begun else ", ") + argument)
        begun = True
        if (yield from cursor.space()) == ",":
            cursor.take(1)
    if not begun:
        sink.begin(name)
    cursor.take(1)
    sink.arguments("}" if begun else "{}")
    sink.close()
    return True


def _python_expression(cursor: Cursor, parts: list[str]) -> Reading[bool]:
    """Read up to the comma or bracket that ends an argument; False if the text ends, or the brackets do not match."""
    closers: list[str] = []
    while True:
        char = yield from cursor.peek()
        if plain := cursor.run(_PYTHON_PLAIN):
            parts.append(plain)
            continue
        if char in ("'", '"'):
            if not (yield from _python_string(cursor, char, parts)):
                return False
            continue
        if not closers and char in (",", ")"):
            return True
        if char in _CLOSER and len(closers) < _MOST_NESTED:
            closers.append(_CLOSER[char])
        elif char != ",":
            if not closers or char != closers[-1]:
                return False
            closers.pop()
        parts.append(cursor.take(1))


def _python_string(cursor: Cursor, quote: str, parts: list[str]) -> Reading[bool]:
    parts.append(cursor.take(1))
    while True:
        parts.append(cursor.run(_PYTHON_STRING))
        char = yield from cursor.peek()
        if not char:
            return False
        parts.append(cursor.take(1))
        if char == quote:
            return True
        if char == "\\":
            yield from cursor.peek()
            parts.append(cursor.take(1))


def _python_argument(text: str) -> str | None:
    """``key=value`` as a member of a JSON object; None if it is not that."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip().isidentifier():
        return None
    value = _JSON_SCALARS.get(value.strip(), value.strip())
    try:
        with warnings.catch_warnings():  # of escapes that Python does not know
            warnings.simplefilter("ignore")
            return f"{dump(key.strip())}: {dump(ast.literal_eval(value))}"
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None
