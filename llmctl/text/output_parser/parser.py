"""The streaming parser of one answer: text in, pieces of the message out."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any, Literal, NamedTuple

from llmctl.text.output_parser.calls import read_json_call, read_named_call, read_python_call, read_tagged_call
from llmctl.text.output_parser.cursor import Cursor, Reading
from llmctl.text.output_parser.formats import Layout, ReasoningFormat, ToolFormat
from llmctl.text.output_parser.json_text import is_object

Tools = Mapping[str, Mapping[str, Any]]
"""Functions by name: the JSON schemas of their parameters, by name."""

_READERS = {
    Layout.JSON: read_json_call,
    Layout.NAMED: read_named_call,
    Layout.TAGGED: read_tagged_call,
    Layout.PYTHON: read_python_call,
}

_MARKED = (Layout.NAMED, Layout.TAGGED)
"""They begin with ``call_begin``."""

Kind = Literal["reasoning", "content", "name", "arguments"]


class Piece(NamedTuple):
    """Something to add to the message. ``call``: which one a ``name`` begins, or gets more ``arguments``."""

    kind: Kind
    text: str
    call: int = -1


class _Trimmed:
    """Text as it comes, but for white space at its end, which waits for what follows."""

    def __init__(self) -> None:
        self._space: list[str] = []

    def push(self, text: str) -> str:
        """More text; what is known not to end in white space."""
        kept = text.rstrip()
        if not kept:
            self._space.append(text)
            return ""
        before, self._space = self.flush(), [text[len(kept) :]]
        return before + kept

    def flush(self) -> str:
        """The white space that waits; it waits no more."""
        space, self._space = self._space, []
        return "".join(space)


class OutputParser:
    """Takes one answer's text apart as it comes.

    What the pieces add up to does not depend on how the text was cut. A call is told of when its name is known and its
    arguments begin, and its arguments as they come; what turns out to be none before that is content, as it stands.
    What breaks off or goes wrong later stays as far as it came, and the call is not ``complete``; the text goes on as
    content. White space around calls and around reasoning is dropped.

    Args:
        tools: None: no calls are looked for. row: how they are written.
        reasoning: how reasoning is written; None: it is content. begun: the prompt has opened it.
        closed: the prompt has closed it.

    Attributes:
        complete: of each call that was told of, whether its arguments are a whole JSON object.
    """

    def __init__(
        self,
        row: ToolFormat | None = None,
        tools: Tools | None = None,
        reasoning: ReasoningFormat | None = None,
        *,
        begun: bool = False,
        closed: bool = False,
    ) -> None:
        self._row = row if tools is not None else None
        self._tools = tools or {}
        self._reasoning = reasoning
        self._begun = begun
        self._closed = closed
        self._cursor = Cursor()
        self._pieces: list[Piece] = []
        self._content = _Trimmed()
        self._open: list[str] | None = None
        self.complete: list[bool] = []
        self._steps = self._answer()

    def push(self, text: str) -> list[Piece]:
        """More text; what is known of the message since the last time."""
        self._cursor.feed(text)
        return self._go_on()

    def finish(self) -> list[Piece]:
        """The text is over; the rest of the message. Nothing may be pushed after."""
        self._cursor.end()
        return self._go_on()

    def _go_on(self) -> list[Piece]:
        next(self._steps, None)
        pieces, self._pieces = self._pieces, []
        groups = groupby(pieces, key=lambda piece: (piece.kind, piece.call))
        return [Piece(kind, "".join(piece.text for piece in group), call) for (kind, call), group in groups]

    def _tell(self, kind: Kind, text: str, call: int = -1) -> None:
        if text:
            self._pieces.append(Piece(kind, text, call))

    # The answer

    def _answer(self) -> Reading[None]:
        if self._reasoning is not None:
            yield from self._read_reasoning(self._reasoning)
        row = self._row
        if row is None:
            yield from self._cursor.until((), lambda text: self._tell("content", text))
            return
        if row.bare:
            yield from self._read_bare(row)
        lone = (row.call_begin,) if Layout.TAGGED in row.layouts else ()
        while (yield from self._read_content((*row.begins, *lone))) is not None:
            pass
        if not self.complete:
            self._text("", last=True)

    def _read_bare(self, row: ToolFormat) -> Reading[None]:
        self._cursor.mark()
        if (yield from self._cursor.space()) in ("{", "["):
            yield from self._read_section(row)
        self._text(self._cursor.unmark())

    def _read_content(self, begins: tuple[str, ...]) -> Reading[str | None]:
        """Text up to a section, and the section. Returns what began it; None at the end."""
        row = self._row
        assert row is not None
        begin = yield from self._cursor.until(begins, self._text)
        if begin is not None:
            self._cursor.mark(begin)
            alone = begin == row.call_begin and begin not in row.begins
            yield from self._read_section(row, in_call=alone)
            self._text(self._cursor.unmark())
        return begin

    def _text(self, text: str, *, last: bool = False) -> None:
        """Content, but for white space at its end, which may be that before a call."""
        self._tell("content", self._content.push(text) + (self._content.flush() if last else ""))

    # Reasoning

    def _read_reasoning(self, row: ReasoningFormat) -> Reading[None]:
        if self._closed:
            return
        cursor = self._cursor
        cursor.mark()
        yield from cursor.space()
        if not (yield from cursor.accept(row.begin)) and not self._begun and not row.implied:
            self._text(cursor.unmark(), last=self._row is None)
            return
        cursor.unmark()
        yield from cursor.space()
        trimmed = _Trimmed()
        if (yield from cursor.until((row.end,), lambda text: self._tell("reasoning", trimmed.push(text)))) is not None:
            yield from cursor.space()

    # Calls

    def _read_section(self, row: ToolFormat, *, in_call: bool = False) -> Reading[None]:
        """Calls, from behind the marker; what is marked in the end is text after all."""
        cursor = self._cursor
        listed = False
        first = True
        while True:
            char = "" if in_call else (yield from cursor.space())
            if char == "[" and first:
                listed = True
                cursor.take(1)
                char = yield from cursor.space()
            layout = self._layout(row, char, listed=listed, first=first)
            if layout is None:
                return
            if not in_call and layout in _MARKED and not (yield from cursor.accept(row.call_begin)):
                return
            if not (yield from _READERS[layout](cursor, row, self)):
                return
            if self._open is not None:  # it broke off
                self._open = None
                return
            cursor.mark()
            char = yield from cursor.space()
            if layout is Layout.NAMED and row.call_end and (yield from cursor.accept(row.call_end)):
                cursor.mark()
                char = yield from cursor.space()
            if listed and char == "]":
                cursor.take(1)
                cursor.mark()
                listed = False
                char = yield from cursor.space()
            if row.end and (yield from cursor.accept(row.end)):
                cursor.unmark()
                return
            if row.separator and (yield from cursor.accept(row.separator)):
                char = yield from cursor.space()
            if not char:
                cursor.unmark()
                return
            in_call = first = False

    @staticmethod
    def _layout(row: ToolFormat, char: str, *, listed: bool, first: bool) -> Layout | None:
        """The layout of a call that begins with ``char``; None: it is none."""
        if listed and Layout.PYTHON in row.layouts:
            return Layout.PYTHON
        if char == "{" and Layout.JSON in row.layouts:
            return Layout.JSON
        if listed or not (first or row.call_begin):
            return None
        return next((layout for layout in row.layouts if layout in _MARKED), None)

    # CallSink

    def known(self, name: str) -> bool:
        """Part of ``CallSink``."""
        assert self._row is not None
        return not self._row.bare or name in self._tools

    def schema(self, name: str) -> Mapping[str, Any]:
        """Part of ``CallSink``."""
        return self._tools.get(name, {})

    def begin(self, name: str) -> None:
        """Part of ``CallSink``."""
        self._cursor.unmark()
        self._content.flush()
        self._open = []
        self.complete.append(False)
        self._tell("name", name, len(self.complete) - 1)

    def arguments(self, text: str) -> None:
        """Part of ``CallSink``."""
        assert self._open is not None
        self._open.append(text)
        self._tell("arguments", text, len(self.complete) - 1)

    def close(self) -> None:
        """Part of ``CallSink``."""
        assert self._open is not None
        self.complete[-1] = is_object("".join(self._open))
        self._open = None
