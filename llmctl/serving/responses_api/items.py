"""The output items of a response as the pieces of its answer add to them, and the events that tell of it."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from llmctl.serving.tools.message import call_id
from llmctl.text.output_parser.parser import Piece

Event = dict[str, Any]
"""An event but for its ``sequence_number``."""


def new_id(prefix: str) -> str:
    """A new id in OpenAI's form."""
    return f"{prefix}_{uuid.uuid4().hex}"


class _Item:
    """An item that is being written.

    Attributes:
        kind: of the pieces that add to it. event: of which its events' names begin.
    """

    kind: str
    event: str

    def __init__(self, prefix: str, index: int) -> None:
        self.id = new_id(prefix)
        self._index = index
        self._texts: list[str] = []

    @property
    def text(self) -> str:
        """Its text so far."""
        return "".join(self._texts)

    def item(self, status: str) -> dict[str, Any]:
        """The item as it is now."""
        raise NotImplementedError

    def begin(self) -> list[Event]:
        """The events of its beginning."""
        return [self._of_item("added", self.item("in_progress"))]

    def add(self, text: str) -> Event:
        """The event of more text."""
        self._texts.append(text)
        return {"type": f"{self.event}.delta", **self._place(), "delta": text}

    def end(self, status: str) -> list[Event]:
        """The events of its end."""
        raise NotImplementedError

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.id, "output_index": self._index}

    def _of_item(self, what: str, item: dict[str, Any]) -> Event:
        return {"type": f"response.output_item.{what}", "output_index": self._index, "item": item}


class _TextItem(_Item):
    """An item with one part of text."""

    def head(self, status: str) -> dict[str, Any]:
        """The item without its content."""
        raise NotImplementedError

    def part(self) -> dict[str, Any]:
        """The part as it is now."""
        raise NotImplementedError

    def item(self, status: str) -> dict[str, Any]:
        return {**self.head(status), "content": [self.part()]}

    def begin(self) -> list[Event]:
        empty = {**self.head("in_progress"), "content": []}
        return [self._of_item("added", empty), self._of_part("added")]

    def end(self, status: str) -> list[Event]:
        return [
            {"type": f"{self.event}.done", **self._place(), "text": self.text},
            self._of_part("done"),
            self._of_item("done", self.item(status)),
        ]

    def _place(self) -> dict[str, Any]:
        return {**super()._place(), "content_index": 0}

    def _of_part(self, what: str) -> Event:
        return {"type": f"response.content_part.{what}", **self._place(), "part": self.part()}


class _Message(_TextItem):
    kind, event = "content", "response.output_text"

    def __init__(self, index: int) -> None:
        super().__init__("msg", index)
        self._logprobs: list[Any] = []

    def head(self, status: str) -> dict[str, Any]:
        return {"id": self.id, "type": "message", "role": "assistant", "status": status}

    def part(self) -> dict[str, Any]:
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": self._logprobs[:]}

    def add(self, text: str, logprobs: Sequence[Any] = ()) -> Event:
        """The event of more text, with its tokens' log-probabilities."""
        self._logprobs += logprobs
        return {**super().add(text), "logprobs": logprobs}

    def end(self, status: str) -> list[Event]:
        done, *rest = super().end(status)
        return [{**done, "logprobs": self._logprobs}, *rest]


class _Reasoning(_TextItem):
    kind, event = "reasoning", "response.reasoning_text"

    def __init__(self, index: int) -> None:
        super().__init__("rs", index)

    def head(self, status: str) -> dict[str, Any]:
        return {"id": self.id, "type": "reasoning", "summary": [], "status": status}

    def part(self) -> dict[str, Any]:
        return {"type": "reasoning_text", "text": self.text}


class _Call(_Item):
    """A call of a function. ``call``: which of the answer's."""

    kind, event = "arguments", "response.function_call_arguments"

    def __init__(self, index: int, name: str, call: int, id_length: int) -> None:
        super().__init__("fc", index)
        self.call = call
        self._name = name
        self._call_id = call_id(id_length)

    def item(self, status: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "function_call",
            "call_id": self._call_id,
            "name": self._name,
            "arguments": self.text,
            "status": status,
        }

    def end(self, status: str) -> list[Event]:
        return [
            {"type": f"{self.event}.done", **self._place(), "arguments": self.text},
            self._of_item("done", self.item(status)),
        ]


class OutputItems:
    """The items of one response, in order. What is told of them adds up to ``made``.

    Args:
        id_length: of calls' ids, see ``call_id``.

    Attributes:
        made: items that are over. reasoning: the text of all reasoning that is over.
    """

    def __init__(self, id_length: int) -> None:
        self.made: list[dict[str, Any]] = []
        self.reasoning = ""
        self._id_length = id_length
        self._open: _Item | None = None

    def add(self, piece: Piece, logprobs: Sequence[Any], complete: Sequence[bool]) -> list[Event]:
        """The events of a piece.

        Args:
            logprobs: of the tokens of a piece of content. complete: of each call, whether its arguments are whole.
        """
        if piece.kind == "name":
            return self._begin(_Call(len(self.made) + self._busy, piece.text, piece.call, self._id_length), complete)
        events: list[Event] = []
        if self._open is None or self._open.kind != piece.kind:
            kind = _Message if piece.kind == "content" else _Reasoning
            events = self._begin(kind(len(self.made) + self._busy), complete)
        assert self._open is not None
        if isinstance(self._open, _Message):
            return [*events, self._open.add(piece.text, logprobs)]
        return [*events, self._open.add(piece.text)]

    def close_call(self, complete: Sequence[bool]) -> list[Event]:
        """The events of the end of a call whose arguments are whole."""
        if isinstance(self._open, _Call) and complete[self._open.call]:
            return self.close("completed", complete)
        return []

    def end(self, status: str, complete: Sequence[bool], logprobs: Sequence[Any]) -> list[Event]:
        """The events of the end of the answer, whose last item has this ``status`` unless it is a call. An answer of
        nothing is an empty message.

        Args:
            logprobs: of tokens that came after all text.
        """
        events: list[Event] = []
        if self._open is None and not self.made:
            events = self._begin(_Message(0), complete)
        if isinstance(self._open, _Message) and logprobs:
            events.append(self._open.add("", logprobs))
        return [*events, *self.close(status, complete)]

    def close(self, status: str, complete: Sequence[bool]) -> list[Event]:
        """The events of the end of the item that is being written, if there is one."""
        item, self._open = self._open, None
        if item is None:
            return []
        if isinstance(item, _Call):
            status = "completed" if complete[item.call] else "incomplete"
        if isinstance(item, _Reasoning):
            self.reasoning += item.text
        self.made.append(item.item(status))
        return item.end(status)

    @property
    def _busy(self) -> int:
        return self._open is not None

    def _begin(self, item: _Item, complete: Sequence[bool]) -> list[Event]:
        events = self.close("completed", complete)
        self._open = item
        return [*events, *item.begin()]
