"""Messages as chat templates take them: texts, and calls whose arguments are objects.

OpenAI's clients send arguments as a string of JSON; templates, made for transformers, want what it stands for. The
deprecated ``function_call`` and the role ``function`` become calls and results of tools.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic_core import from_json

from llmctl.errors import RequestError
from llmctl.serving.protocol import PART_TEXTS, ChatMessage, ContentPart, FunctionCallMade
from llmctl.text.output_parser.json_text import dump


def template_message(message: ChatMessage, index: int, *, string_arguments: bool = False) -> dict[str, Any]:
    """A message as the template sees it: content parts joined into one text, extra fields as they came.

    Args:
        string_arguments: leave arguments as JSON texts, for a template that wants them so.

    Raises:
        RequestError: content that is not text, or arguments that are not a JSON object; the message is named.
    """
    made: dict[str, Any] = {**(message.model_extra or {}), "role": message.role, "content": _text(message, index)}
    if message.role == "function":
        made["role"] = "tool"
    if message.function_call is not None and not message.tool_calls:
        where = f"messages[{index}].function_call"
        function = _function(message.function_call, where, string_arguments)
        made["tool_calls"] = [{"type": "function", "function": function}]
    if message.tool_calls:
        made["tool_calls"] = [
            {
                **call.model_dump(exclude_unset=True),
                "type": "function",
                "function": _function(call.function, f"messages[{index}].tool_calls[{i}].function", string_arguments),
            }
            for i, call in enumerate(message.tool_calls)
        ]
    return made


def joined(content: str | Sequence[ContentPart], where: str) -> str:
    """The text of content, its parts on lines of their own.

    Args:
        where: it stands, for the refusal: a field of the request, and what follows that.

    Raises:
        RequestError: a part that is not text.
    """
    if isinstance(content, str):
        return content
    for part in content:
        member = PART_TEXTS.get(part.type)
        if member is None:
            raise RequestError(
                f"{where}: only parts of type 'text' are supported, found '{part.type}'", param=_field(where)
            )
        if getattr(part, member, None) is None:
            raise RequestError(f"{where}: a part of type '{part.type}' has no '{member}'", param=_field(where))
    return "\n".join(getattr(part, PART_TEXTS[part.type]) for part in content)


def arguments_object(text: str, where: str) -> dict[str, Any]:
    """The object that a call's arguments stand for; an empty text is an empty one.

    Args:
        where: the call stands, as of ``joined``.

    Raises:
        RequestError: not a JSON object.
    """
    if not text.strip():
        return {}
    try:
        found = from_json(text, allow_inf_nan=False)  # bounds the depth, as of bodies
    except ValueError as error:
        raise RequestError(
            f"{where}.arguments: expected a JSON object as a string, found what is not JSON: {error}",
            param=_field(where),
        ) from error
    if not isinstance(found, dict):
        raise RequestError(
            f"{where}.arguments: expected a JSON object, found {type(found).__name__}", param=_field(where)
        )
    return found


def _field(where: str) -> str:
    return where.partition("[")[0]


def _text(message: ChatMessage, index: int) -> str:
    content = message.content
    if content is not None:
        return joined(content, f"messages[{index}].content")
    if message.role != "assistant":  # an assistant's may consist of tool calls
        raise RequestError(f"messages[{index}].content: expected text, found none", param="messages")
    return ""


def _function(call: FunctionCallMade, where: str, string_arguments: bool) -> dict[str, Any]:
    given = call.arguments
    if isinstance(given, str):
        given = arguments_object(given, where)
    made = call.model_dump(exclude_unset=True)
    return {**made, "arguments": dump(given or {}) if string_arguments else given or {}}
