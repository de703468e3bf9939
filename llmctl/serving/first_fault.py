"""The first fault of a long body, told without making objects of all that is before it.

pydantic takes about eight times as long for a list of messages as msgspec takes to look at what matters in it. So what
msgspec stumbles over is given to the parser alone, in a body of just that: the parser says whether it is a fault, and
in which words. What is no fault to it, and what msgspec lets pass, is for the parser of the whole body.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import msgspec
from pydantic import ValidationError

from llmctl.serving.openai_errors import from_validation_error
from llmctl.serving.outline import Outline
from llmctl.serving.protocol import (
    ApiModel,
    ChatCompletionRequest,
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeChatRequest,
)
from llmctl.serving.tools.history import template_message

LEAST_BYTES = 16 * 1024
"""Shorter bodies are parsed at once."""

_Id = Annotated[int, msgspec.Meta(ge=0)]
_PATH = re.compile(r" - at `\$([^`]*)`$")
_STEP = re.compile(r"\[(\d+)\]|\.(\w+)")
_ITEMS = msgspec.json.Decoder(list[msgspec.Raw])
_MEMBERS = msgspec.json.Decoder(dict[str, msgspec.Raw])


class _Part(msgspec.Struct, gc=False):
    type: Literal["text"]
    text: str


class _Function(msgspec.Struct, gc=False):
    name: str


class _Call(msgspec.Struct, gc=False):
    function: _Function
    id: str | None = None
    type: Literal["function"] = "function"


_Message = msgspec.defstruct(
    "_Message",
    [
        ("role", ChatMessage.model_fields["role"].annotation),
        ("content", str | list[_Part] | None, None),
        ("tool_calls", list[_Call] | None, None),
    ],
    gc=False,
)
_IDS = msgspec.json.Decoder(list[_Id])
_MESSAGES = msgspec.json.Decoder(list[_Message])  # type: ignore[valid-type]
_FIELDS: dict[type[ApiModel], tuple[str, msgspec.json.Decoder[Any]]] = {
    CompletionRequest: ("prompt", _IDS),
    DetokenizeRequest: ("tokens", _IDS),
    ChatCompletionRequest: ("messages", _MESSAGES),
    TokenizeChatRequest: ("messages", _MESSAGES),
}
"""Of a request, the field that may be a long list, and what is looked at in it."""


def check_first_fault(outline: Outline, model: type[ApiModel]) -> None:
    """Refuse a body for the first item of its long list that is a fault.

    Raises:
        RequestError: as the parser of the whole body, but that faults of other fields are not looked for.
    """
    if model not in _FIELDS:
        return
    name, decoder = _FIELDS[model]
    data = outline.data(name)
    if len(data) < LEAST_BYTES or (decoder is _IDS and not outline.ids(name)):
        return
    try:
        decoder.decode(data)
    except msgspec.ValidationError as error:
        found = _PATH.search(str(error))
        if found is not None:
            steps: list[int | str] = [int(index) if index else key for index, key in _STEP.findall(found[1])]
            _check(model, name, data, steps)
    except (ValueError, RecursionError):
        return


def _alone(data: bytes, steps: list[int | str]) -> bytes:
    """JSON in which of every list on a path only the item is left that the path goes through."""
    if not steps:
        return data
    step, *rest = steps
    if isinstance(step, int):
        return b"[" + _alone(bytes(_ITEMS.decode(data)[step]), rest) + b"]"
    members = _MEMBERS.decode(data)
    if step in members:
        members[step] = msgspec.Raw(_alone(bytes(members[step]), rest))
    return msgspec.json.encode(members)


def _is_flat(data: bytes) -> bool:
    """Whether JSON is a list in which every comma is between two items."""
    return data.count(b"[") == 1 and b"{" not in data and b'"' not in data


def _number(data: bytes, index: Any) -> bytes:
    """A flat list's item as a list; cut out from the nearer end, for to split all of it would take long."""
    after = data.count(b",") - index
    item = data.split(b",", index + 1)[index] if index < after else data.rsplit(b",", after + 1)[-1 - after]
    return b"[" + item.strip(b"[] \t\r\n") + b"]"


def _check(model: type[ApiModel], name: str, data: bytes, steps: list[int | str]) -> None:
    try:
        alone = _number(data, steps[0]) if _is_flat(data) else _alone(data, steps)
    except (ValueError, LookupError):  # the fault is in a member that another of its name replaces
        return
    indices = [step for step in steps if isinstance(step, int)]
    try:
        body = model.model_validate_json(b'{"%s": %s}' % (name.encode(), alone))
    except ValidationError as error:
        raise from_validation_error(error, model.expected, indices) from None
    if isinstance(body, ChatRequest):
        template_message(body.messages[0], indices[0], string_arguments=True)
