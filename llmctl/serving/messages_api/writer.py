"""The message of an answer, whole or as events: blocks of text, thinking and tool use."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from pydantic_core import from_json

from llmctl.engine.output import TextOutput
from llmctl.errors import LlmctlError
from llmctl.serving.answer import Writer
from llmctl.serving.error_shapes import MESSAGES, problem_of
from llmctl.serving.responses import UsageCount, named_event
from llmctl.serving.tools.message import MessageReader, call_id
from llmctl.text.output_parser.parser import Piece

_PING = named_event({"type": "ping"})
_DELTAS = {
    "content": ("text_delta", "text"),
    "reasoning": ("thinking_delta", "thinking"),
    "arguments": ("input_json_delta", "partial_json"),
}


class MessagesWriter(Writer):
    """``message``, and its events.

    Args:
        model: its name. max_tokens: as asked for. reader: takes the output apart; None: all of it is text.
        id_length: of ids of calls, where a format wants one. request_id: of the answer's headers, and of the document
            of an error.
    """

    def __init__(
        self,
        model: str,
        max_tokens: int,
        usage: UsageCount,
        reader: MessageReader | None,
        id_length: int,
        request_id: str,
    ) -> None:
        super().__init__(usage)
        self.headers |= MESSAGES.headers(request_id)
        self._fields = {"id": f"msg_{uuid.uuid4().hex[:24]}", "type": "message", "role": "assistant", "model": model}
        self._max_tokens = max_tokens
        self._reader = reader
        self._id_length = id_length
        self._request_id = request_id
        self._begun = False
        self._block: str | int | None = None  # the open one, as ``_block_of`` has it
        self._index = -1

    def document(self, outputs: list[TextOutput]) -> dict[str, Any]:
        """The message."""
        if not outputs:  # the client has gone, and nobody reads it
            return self._empty()
        (output,) = outputs
        content = [self._whole(list(pieces)) for _, pieces in groupby(self._pieces(output), _block_of)]
        return {**self._fields, "content": content, **self._ending(output), "usage": self._usage()}

    def events(self, index: int, output: TextOutput) -> bytes:  # noqa: ARG002
        """What a delta adds to the message."""
        found = []
        if not self._begun:
            self._begun = True
            found += [named_event({"type": "message_start", "message": self._empty()}), _PING]
        for piece in self._pieces(output):
            found += self._piece_events(piece)
        if output.finish_reason is not None:
            found += self._close()
            ending = {"type": "message_delta", "delta": self._ending(output), "usage": self._usage()}
            found += [named_event(ending), named_event({"type": "message_stop"})]
        return b"".join(found)

    def failure(self, error: LlmctlError) -> bytes:
        """The event ``error``."""
        return named_event(MESSAGES.body(problem_of(error), self._request_id))

    def _pieces(self, output: TextOutput) -> list[Piece]:
        if self._reader is not None:
            return self._reader.pieces(output)
        return [Piece("content", output.text)] if output.text else []

    def _piece_events(self, piece: Piece) -> Iterator[bytes]:
        block = _block_of(piece)
        if block != self._block:
            yield from self._close()
            self._block = block
            self._index += 1
            begun = self._begin(piece)
            yield named_event({"type": "content_block_start", "index": self._index, "content_block": begun})
        if piece.kind != "name":
            kind, field = _DELTAS[piece.kind]
            delta = {"type": kind, field: piece.text}
            yield named_event({"type": "content_block_delta", "index": self._index, "delta": delta})

    def _close(self) -> Iterator[bytes]:
        if self._block is not None:
            self._block = None
            yield named_event({"type": "content_block_stop", "index": self._index})

    def _begin(self, piece: Piece) -> dict[str, Any]:
        """The block that a piece begins, without content."""
        if piece.kind == "content":
            return {"type": "text", "text": ""}
        if piece.kind == "reasoning":
            return {"type": "thinking", "thinking": "", "signature": ""}
        return {"type": "tool_use", "id": call_id(self._id_length, "toolu_"), "name": piece.text, "input": {}}

    def _whole(self, pieces: list[Piece]) -> dict[str, Any]:
        """A block of all its pieces."""
        made = self._begin(pieces[0])
        if made["type"] == "tool_use":
            made["input"] = _object("".join(piece.text for piece in pieces[1:]))
        else:
            made[_DELTAS[pieces[0].kind][1]] = "".join(piece.text for piece in pieces)
        return made

    def _ending(self, output: TextOutput) -> dict[str, Any]:
        """Why it ended. Of stop reasons, only stop strings are texts."""
        reason: str | None = output.finish_reason
        if self._reader is not None:
            reason = self._reader.finish_reason(reason)
        if reason == "tool_calls":
            return {"stop_reason": "tool_use", "stop_sequence": None}
        if isinstance(output.stop_reason, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": output.stop_reason}
        if reason != "length":
            return {"stop_reason": "end_turn", "stop_sequence": None}
        short = self.usage.completion_tokens < self._max_tokens
        return {"stop_reason": "model_context_window_exceeded" if short else "max_tokens", "stop_sequence": None}

    def _empty(self) -> dict[str, Any]:
        return {**self._fields, "content": [], "stop_reason": None, "stop_sequence": None, "usage": self._usage()}

    def _usage(self) -> dict[str, int]:
        cached = self.usage.cached_tokens(1)
        return {
            "input_tokens": self.usage.prompt_tokens - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": self.usage.completion_tokens,
        }


def _block_of(piece: Piece) -> str | int:
    """What pieces of one block have in common, and those of the next do not: a call's number, or the kind."""
    return piece.call if piece.kind in ("name", "arguments") else piece.kind


def _object(text: str) -> dict[str, Any]:
    """The input of a call, as far as it was written; so clients read the events of one that was cut off."""
    try:
        found = from_json(text, allow_partial=True)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
