"""OpenAI's assistant message, whole or as deltas, of what the parser finds."""

from __future__ import annotations

import secrets
import string
import uuid
from collections.abc import Iterator
from typing import Any

from llmctl.engine.output import TextOutput
from llmctl.serving.tools.support import ToolUse
from llmctl.text.output_parser.parser import OutputParser, Piece

_ALPHANUMERIC = string.ascii_letters + string.digits


def call_id(length: int = 0, prefix: str = "call_") -> str:
    """A new id of a call: OpenAI's form, or letters and digits where a length is given."""
    if length:
        return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(length))
    return f"{prefix}{uuid.uuid4().hex[:24]}"


class MessageReader:
    """One choice's message as it is written."""

    def __init__(self, parser: OutputParser, use: ToolUse) -> None:
        self._parser = parser
        self._use = use
        self._most = 1 if use.single else None

    @property
    def complete(self) -> list[bool]:
        """Of each call so far, whether its arguments are a whole JSON object."""
        return self._parser.complete[: self._most]

    def pieces(self, output: TextOutput) -> list[Piece]:
        """What a delta of the output adds."""
        return self.read(output.text, last=output.finish_reason is not None)

    def read(self, text: str, *, last: bool) -> list[Piece]:
        """What more of the output's text adds; ``last``: it is the end."""
        found = self._parser.push(text)
        if last:
            found += self._parser.finish()
        if self._use.grammar is not None:  # a call that was cut before its arguments is no text
            found = [piece for piece in found if piece.kind != "content"]
        return [piece for piece in found if self._most is None or piece.call < self._most]

    def deltas(self, output: TextOutput) -> Iterator[dict[str, Any]]:
        """The same, as deltas of the message."""
        for kind, text, call in self.pieces(output):
            if kind == "content":
                yield {"content": text}
            elif kind == "reasoning":
                yield {"reasoning_content": text}
            elif self._use.legacy:
                yield {"function_call": {"name": text, "arguments": ""} if kind == "name" else {"arguments": text}}
            elif kind == "name":
                yield {"tool_calls": [{"index": call, **self._call(text, "")}]}
            else:
                yield {"tool_calls": [{"index": call, "function": {"arguments": text}}]}

    def message(self, output: TextOutput) -> dict[str, Any]:
        """The whole message of a whole output."""
        texts: dict[str, list[str]] = {"content": [], "reasoning": []}
        calls: list[tuple[str, list[str]]] = []
        for kind, text, call in self.pieces(output):
            if kind == "name":
                calls.append((text, []))
            elif kind == "arguments":
                calls[call][1].append(text)
            else:
                texts[kind].append(text)
        reasoning = "".join(texts["reasoning"])
        message: dict[str, Any] = {"role": "assistant", "content": "".join(texts["content"]), "refusal": None}
        if not message["content"] and (calls or reasoning):
            message["content"] = None
        if self._use.support.reasoning is not None:
            message["reasoning_content"] = reasoning or None
        made = [self._call(name, "".join(arguments)) for name, arguments in calls]
        if made and self._use.legacy:
            message["function_call"] = made[0]["function"]
        elif made:
            message["tool_calls"] = made
        return message

    def finish_reason(self, reason: str | None) -> str | None:
        """Why the output ended: ``tool_calls`` if calls were made and none is broken, else as the engine says."""
        if reason is None or not self.complete or not all(self.complete):
            return reason
        return "function_call" if self._use.legacy else "tool_calls"

    def _call(self, name: str, arguments: str) -> dict[str, Any]:
        length = self._use.support.row.id_length
        return {"id": call_id(length), "type": "function", "function": {"name": name, "arguments": arguments}}
