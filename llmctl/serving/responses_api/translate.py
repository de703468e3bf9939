"""A request of the Responses API as one of chats, and refusals of that in the words of this one."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from llmctl.errors import LlmctlError, RequestError
from llmctl.serving.protocol import (
    ChatCompletionRequest,
    ChatMessage,
    FunctionCallMade,
    FunctionDefinition,
    FunctionName,
    JsonSchemaFormat,
    NamedTool,
    ResponseFormat,
    SamplingFields,
    Tool,
    ToolCallMade,
)
from llmctl.serving.responses_api.protocol import (
    LOGPROBS,
    AllowedTools,
    FunctionCallItem,
    FunctionCallOutput,
    FunctionChoice,
    FunctionTool,
    InputItem,
    InputMessage,
    JsonObjectText,
    JsonSchemaText,
    ReasoningItem,
    ResponsesRequest,
)
from llmctl.serving.tools.history import arguments_object, joined
from llmctl.serving.tools.traits import EFFORT, THINKING, TemplateTraits

_NAMES = {
    "messages": "input",
    "response_format": "text.format",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "logprobs": "top_logprobs",
}
"""Fields of chats, and those of this API that they come from."""
# As words, but not in quotes, where they are the client's. "messages" has a plain meaning too.
_WORDS = re.compile(rf"(?<![\w'.])({'|'.join(name for name in _NAMES if name != 'messages')})(?![\w'])")


@contextmanager
def own_names() -> Iterator[None]:
    """Inside it, refusals name this API's fields."""
    try:
        yield
    except LlmctlError as error:
        raise renamed(error) from error


def renamed(error: LlmctlError) -> LlmctlError:
    """The same error of this API's fields; a copy, for an error may be that of other requests too."""
    made = copy.copy(error)
    made.message = _WORDS.sub(lambda found: _NAMES[found[1]], error.message)
    made.fix = error.fix and _WORDS.sub(lambda found: _NAMES[found[1]], error.fix)
    made.param = _NAMES.get(error.param or "", error.param)
    return made


def chat_of(body: ResponsesRequest, traits: TemplateTraits) -> ChatCompletionRequest:
    """The request to chats that asks for the same.

    Args:
        traits: of the chat template, which is told how to reason as far as it can be.

    Raises:
        RequestError: input that is not text, arguments that are not a JSON object, or a choice of no tool.
    """
    shared = {name: getattr(body, name) for name in SamplingFields.model_fields if name in body.model_fields_set}
    tools, choice = _tools(body)
    return ChatCompletionRequest(
        **shared
        | {
            "response_format": _response_format(body),
            "user": body.user or body.safety_identifier,
            "messages": _messages(body),
            "tools": tools,
            "tool_choice": choice,
            "parallel_tool_calls": body.parallel_tool_calls,
            "max_completion_tokens": body.max_output_tokens,
            "logprobs": wants_logprobs(body),
            "top_logprobs": body.top_logprobs,
            "chat_template_kwargs": reasoning_variables(body, traits) | (body.chat_template_kwargs or {}),
        }
    )


def wants_logprobs(body: ResponsesRequest) -> bool:
    """Whether log-probabilities are asked for."""
    return LOGPROBS in (body.include or ()) or bool(body.top_logprobs)


def reasoning_variables(body: ResponsesRequest, traits: TemplateTraits) -> dict[str, Any]:
    """What the chat template is told of ``reasoning.effort``; empty: nothing, or it knows no word for it."""
    effort = body.reasoning.effort if body.reasoning is not None else None
    if effort is None:
        return {}
    told = {EFFORT: effort, THINKING: effort != "none"}
    return {name: told[name] for name in traits.reasoning_variables}


def _response_format(body: ResponsesRequest) -> ResponseFormat | None:
    wanted = body.text.format if body.text is not None else None
    if isinstance(wanted, JsonSchemaText):
        schema = JsonSchemaFormat.model_validate({"name": wanted.name, "schema": wanted.schema_})
        return ResponseFormat(type="json_schema", json_schema=schema)
    return ResponseFormat(type="json_object") if isinstance(wanted, JsonObjectText) else None


def _tools(body: ResponsesRequest) -> tuple[list[Tool], str | NamedTool | None]:
    """The tools that may be called, and how they are chosen, as chats have it."""
    tools, choice = body.tools or [], body.tool_choice
    chosen: str | NamedTool | None
    if isinstance(choice, AllowedTools):
        names = {tool.name for tool in choice.tools}
        for name in names - {tool.name for tool in tools}:
            raise RequestError(
                f"tool_choice: expected one of the request's tools, found '{name[:80]}'", param="tool_choice"
            )
        tools, chosen = [tool for tool in tools if tool.name in names], choice.mode
    elif isinstance(choice, FunctionChoice):
        chosen = NamedTool(type="function", function=FunctionName(name=choice.name))
    else:
        chosen = choice
    return [Tool(type="function", function=_function(tool)) for tool in tools], chosen


def _function(tool: FunctionTool) -> FunctionDefinition:
    given = {name: getattr(tool, name) for name in FunctionDefinition.model_fields if name in tool.model_fields_set}
    return FunctionDefinition(**given)


def _messages(body: ResponsesRequest) -> list[ChatMessage]:
    items: Sequence[InputItem]
    items = [InputMessage(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    history = _History()
    if body.instructions is not None:
        history.messages.append(ChatMessage(role="system", content=body.instructions))
    for index, item in enumerate(items):
        history.add(item, f"input[{index}]")
    history.end_turn()
    return history.messages


@dataclass
class _Turn:
    """What becomes one message of the assistant's."""

    reasoning: list[str] = field(default_factory=list)
    text: str | None = None
    calls: list[ToolCallMade] = field(default_factory=list)

    @property
    def said(self) -> bool:
        """Whether there is more than reasoning."""
        return self.text is not None or bool(self.calls)

    def message(self) -> ChatMessage:
        """The message; without reasoning or calls it has no such fields."""
        fields: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.reasoning:
            fields["reasoning_content"] = "\n".join(self.reasoning)
        if self.calls:
            fields["tool_calls"] = self.calls
        return ChatMessage(**fields)


class _History:
    """Messages of items in order. Reasoning, then a text, then calls are one message of the assistant's."""

    def __init__(self) -> None:
        self.messages: list[ChatMessage] = []
        self._turn: _Turn | None = None
        self._called: dict[str, str] = {}  # names by the ids of calls

    def add(self, item: InputItem, where: str) -> None:
        """Take in the item that stands at ``where``."""
        if isinstance(item, ReasoningItem):
            self._turn_for(anew=self._said).reasoning += [part.text for part in item.content or item.summary or ()]
        elif isinstance(item, FunctionCallItem):
            self._called[item.call_id] = item.name
            function = FunctionCallMade(name=item.name, arguments=arguments_object(item.arguments, where))
            call = ToolCallMade(id=item.call_id, type="function", function=function)
            self._turn_for(anew=False).calls.append(call)
        elif isinstance(item, FunctionCallOutput):
            content = joined(item.output, f"{where}.output")
            name = self._called.get(item.call_id)
            if name is None:
                found = item.call_id[:80]
                raise RequestError(
                    f"{where}: no tool call found for function call output with call_id '{found}'", param="input"
                )
            result = {"role": "tool", "content": content, "tool_call_id": item.call_id, "name": name}
            self._add(ChatMessage.model_validate(result))
        elif item.role == "assistant":
            self._turn_for(anew=self._said).text = joined(item.content, f"{where}.content")
        else:
            self._add(ChatMessage(role=item.role, content=joined(item.content, f"{where}.content")))

    def end_turn(self) -> None:
        """What comes next is of another message."""
        if self._turn is not None:
            self.messages.append(self._turn.message())
            self._turn = None

    @property
    def _said(self) -> bool:
        return self._turn is not None and self._turn.said

    def _turn_for(self, *, anew: bool) -> _Turn:
        if anew:
            self.end_turn()
        if self._turn is None:
            self._turn = _Turn()
        return self._turn

    def _add(self, message: ChatMessage) -> None:
        self.end_turn()
        self.messages.append(message)
