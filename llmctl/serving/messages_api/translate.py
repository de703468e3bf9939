"""From a request of the Messages API to the chat that it stands for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, ClassVar

from llmctl.errors import RequestError
from llmctl.serving.messages_api.protocol import (
    BlockParam,
    Conversation,
    MessagesRequest,
    TextBlockParam,
    ThinkingBlockParam,
    ThinkingDisabled,
    ThinkingEnabled,
    ToolChoice,
    ToolChoiceNone,
    ToolChoiceTool,
    ToolParam,
    ToolResultBlockParam,
    ToolUseBlockParam,
)
from llmctl.serving.protocol import (
    ChatCompletionRequest,
    ChatMessage,
    ContentPart,
    FunctionCallMade,
    FunctionDefinition,
    FunctionName,
    JsonSchemaFormat,
    NamedTool,
    ResponseFormat,
    TokenizeChatRequest,
    Tool,
    ToolCallMade,
)
from llmctl.serving.tools.support import ToolSupport
from llmctl.serving.tools.traits import EFFORT, THINKING

_CHOICES = {"auto": "auto", "any": "required"}
_ERROR = "Error: "
"""In front of the result of a call that failed: templates know no other way to say so."""


class _Chat(ChatCompletionRequest):
    """Clients must send a ``max_tokens``, and send one that few contexts hold."""

    clips_max_tokens: ClassVar[bool] = True


def chat_request(body: MessagesRequest) -> ChatCompletionRequest:
    """The chat that a request asks for.

    Raises:
        RequestError: what cannot be honoured, or is no conversation.
    """
    return _Chat(
        **_conversation(body),
        max_tokens=body.max_tokens,
        stop=body.stop_sequences or None,
        stream=body.stream,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        user=None if body.metadata is None else body.metadata.user_id,
        response_format=_format(body),
        **_choice(body.tool_choice),
    )


def tokenize_request(body: Conversation) -> TokenizeChatRequest:
    """What has the tokens that a request's prompt has.

    Raises:
        RequestError: as ``chat_request``.
    """
    return TokenizeChatRequest(**_conversation(body))


def notes(body: Conversation, support: ToolSupport) -> list[str]:
    """What was asked for and is without effect."""
    said = []
    thinking, config = body.thinking, body.output_config
    if isinstance(thinking, ThinkingEnabled) and support.reasoning is None:
        said.append("thinking: without --reasoning-parser reasoning is text")
    if isinstance(thinking, ThinkingEnabled) and thinking.budget_tokens is not None:
        said.append("thinking.budget_tokens: max_tokens alone bounds the answer")
    if isinstance(thinking, ThinkingDisabled) and support.reasoning and THINKING not in _readable(support):
        said.append("thinking: this model's chat template has no switch for it")
    if config is not None and config.effort is not None and EFFORT not in _readable(support):
        said.append("output_config.effort: this model's chat template does not read it")
    return said


def _readable(support: ToolSupport) -> frozenset[str]:
    return support.traits.reasoning_variables


def _conversation(body: Conversation) -> dict[str, Any]:
    """Fields of ``ChatRequest``, and the model's name."""
    messages = [ChatMessage(role="system", content=_text(body.system))] if body.system else []
    names: dict[str, str] = {}
    turns = list(_turns(body))
    for role, blocks in turns:
        messages += _assistant(blocks, names) if role == "assistant" else _other(role, blocks, names)
    made: dict[str, Any] = {"model": body.model, "messages": messages}
    if turns[-1][0] == "assistant":
        _check_prefill(turns[-1][1])
        made["continue_final_message"] = True
    if body.tools:
        made["tools"] = [_tool(tool) for tool in body.tools]
    if variables := _variables(body):
        made["chat_template_kwargs"] = variables
    return made


def _variables(body: Conversation) -> dict[str, Any]:
    """How the model is to reason, as templates take it."""
    made: dict[str, Any] = {}
    if isinstance(body.thinking, ThinkingEnabled | ThinkingDisabled):
        made[THINKING] = isinstance(body.thinking, ThinkingEnabled)
    if body.output_config is not None and body.output_config.effort is not None:
        made[EFFORT] = body.output_config.effort
    return made


Placed = tuple[str, BlockParam]
"""A block, and where it stands."""


def _turns(body: Conversation) -> Iterator[tuple[str, list[Placed]]]:
    """Roles, and the blocks of all messages of a role that follow each other: templates want roles to take turns."""
    for role, group in groupby(enumerate(body.messages), key=lambda item: item[1].role):
        yield (
            role,
            [(f"messages.{i}.content.{j}", block) for i, message in group for j, block in enumerate(message.content)],
        )


def _text(blocks: Sequence[TextBlockParam]) -> str | list[ContentPart]:
    """Texts as the content of a message."""
    if len(blocks) == 1:
        return blocks[0].text
    return [ContentPart(type="text", text=block.text) for block in blocks]


def _assistant(blocks: list[Placed], names: dict[str, str]) -> list[ChatMessage]:
    """The assistant's message; ``names`` gets its calls' functions, by id."""
    texts, calls, thoughts = [], [], []
    for where, block in blocks:
        if isinstance(block, TextBlockParam):
            texts.append(block)
        elif isinstance(block, ToolUseBlockParam):
            names[block.id] = block.name
            calls.append(ToolCallMade(id=block.id, function=FunctionCallMade(name=block.name, arguments=block.input)))
        elif isinstance(block, ThinkingBlockParam):
            thoughts.append(block.thinking)
        else:
            raise _misplaced(where, block, "assistant")
    made: dict[str, Any] = {"role": "assistant", "content": _text(texts) if texts else None}
    if calls:
        made["tool_calls"] = calls
    if thoughts:  # what templates call it that show it
        made["reasoning_content"] = "\n".join(thoughts)
    return [ChatMessage.model_validate(made)]


def _other(role: str, blocks: list[Placed], names: dict[str, str]) -> list[ChatMessage]:
    """Messages of another role: results of calls, and the texts between them."""
    messages: list[ChatMessage] = []
    for is_text, group in groupby(blocks, key=lambda placed: isinstance(placed[1], TextBlockParam)):
        run = list(group)
        if is_text:
            texts = [block for _, block in run if isinstance(block, TextBlockParam)]
            messages.append(ChatMessage.model_validate({"role": role, "content": _text(texts)}))
        else:
            messages += [_result(where, block, role, names) for where, block in run]
    return messages


def _result(where: str, block: BlockParam, role: str, names: dict[str, str]) -> ChatMessage:
    if not isinstance(block, ToolResultBlockParam) or role != "user":
        raise _misplaced(where, block, role)
    if block.tool_use_id not in names:
        raise RequestError(
            f"{where}.tool_use_id: expected the id of a tool_use block before it, found '{block.tool_use_id[:80]}'",
            param="messages",
        )
    text = "\n".join(part.text for part in block.content or ())
    return ChatMessage.model_validate(
        {
            "role": "tool",
            "content": f"{_ERROR}{text}" if block.is_error else text,
            "tool_call_id": block.tool_use_id,
            "name": names[block.tool_use_id],
        }
    )


def _misplaced(where: str, block: BlockParam, role: str) -> RequestError:
    return RequestError(f"{where}: a block of type '{block.type}' is none of role '{role}'", param="messages")


def _check_prefill(blocks: list[Placed]) -> None:
    """Refuse to go on with an assistant's turn that does not end in text."""
    if not blocks or not isinstance(blocks[-1][1], TextBlockParam) or not blocks[-1][1].text:
        where = blocks[-1][0] if blocks else "messages"
        raise RequestError(
            f"{where}: the last turn is the assistant's, which the answer continues: expected it to end in text",
            param="messages",
        )


def _tool(tool: ToolParam) -> Tool:
    given: dict[str, Any] = {"name": tool.name, "parameters": tool.input_schema}
    given |= {name: value for name in ("description", "strict") if (value := getattr(tool, name)) is not None}
    return Tool(type="function", function=FunctionDefinition(**given))


def _choice(choice: ToolChoice | None) -> dict[str, Any]:
    if choice is None:
        return {}
    if isinstance(choice, ToolChoiceNone):
        return {"tool_choice": "none"}
    parallel = None if choice.disable_parallel_tool_use is None else not choice.disable_parallel_tool_use
    if isinstance(choice, ToolChoiceTool):
        wanted: Any = NamedTool(type="function", function=FunctionName(name=choice.name))
    else:
        wanted = _CHOICES[choice.type]
    return {"tool_choice": wanted, "parallel_tool_calls": parallel}


def _format(body: MessagesRequest) -> ResponseFormat | None:
    if body.output_config is None or body.output_config.format is None:
        return None
    schema = body.output_config.format.schema_
    return ResponseFormat(type="json_schema", json_schema=JsonSchemaFormat.model_validate({"schema": schema}))
