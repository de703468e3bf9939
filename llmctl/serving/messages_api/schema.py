"""What ``/v1/messages`` answers, as models: for ``/openapi.json``, and for tests."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, RootModel

from llmctl.serving.response_schema import Count, ResponseModel

StopReason = Annotated[
    Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"],
    Field(description="`tool_use`: there are calls, and all are whole."),
]


class MessagesError(ResponseModel):
    """What went wrong."""

    type: Literal[
        "invalid_request_error",
        "authentication_error",
        "permission_error",
        "not_found_error",
        "timeout_error",
        "request_too_large",
        "rate_limit_error",
        "api_error",
        "overloaded_error",
    ]
    message: str


class MessagesErrorResponse(ResponseModel):
    """What every refusal and failure answers; in a stream, the event ``error``."""

    type: Literal["error"]
    error: MessagesError
    request_id: Annotated[str | None, Field(description="As `X-Request-Id`.")]


class TextBlock(ResponseModel):
    """Text."""

    type: Literal["text"]
    text: str


class ThinkingBlock(ResponseModel):
    """Reasoning, with `--reasoning-parser`."""

    type: Literal["thinking"]
    thinking: str
    signature: Literal[""]


class ToolUseBlock(ResponseModel):
    """A call of a tool."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: Annotated[dict[str, Any], Field(description="As far as it was written; whole, if `stop_reason` says so.")]


Block = Annotated[TextBlock | ThinkingBlock | ToolUseBlock, Field(discriminator="type")]


class MessagesUsage(ResponseModel):
    """Tokens; those of the prompt are `input_tokens` and `cache_read_input_tokens` together."""

    input_tokens: Annotated[Count, Field(description="Of the prompt, those that were not in the prefix cache.")]
    cache_read_input_tokens: Annotated[Count, Field(description="Of the prompt, those found in the prefix cache.")]
    cache_creation_input_tokens: Literal[0]
    output_tokens: Count


class MessagesResponse(ResponseModel):
    """The answer of ``/v1/messages``."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[Block]
    stop_reason: StopReason
    stop_sequence: Annotated[str | None, Field(description="The one of `stop_sequences` that ended it.")]
    usage: MessagesUsage


class MessageBegun(ResponseModel):
    """A message of which nothing is told yet."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: Annotated[list[Block], Field(max_length=0)]
    stop_reason: None
    stop_sequence: None
    usage: MessagesUsage


class MessageStart(ResponseModel):
    """The first event."""

    type: Literal["message_start"]
    message: MessageBegun


class Ping(ResponseModel):
    """To be passed over."""

    type: Literal["ping"]


class BlockStart(ResponseModel):
    """The block ``index`` begins, without content."""

    type: Literal["content_block_start"]
    index: Count
    content_block: Block


class TextDelta(ResponseModel):
    """More text."""

    type: Literal["text_delta"]
    text: str


class ThinkingDelta(ResponseModel):
    """More reasoning."""

    type: Literal["thinking_delta"]
    thinking: str


class InputJsonDelta(ResponseModel):
    """More of the JSON text of a call's ``input``."""

    type: Literal["input_json_delta"]
    partial_json: str


class BlockDelta(ResponseModel):
    """More of the block ``index``."""

    type: Literal["content_block_delta"]
    index: Count
    delta: Annotated[TextDelta | ThinkingDelta | InputJsonDelta, Field(discriminator="type")]


class BlockStop(ResponseModel):
    """The block ``index`` is whole."""

    type: Literal["content_block_stop"]
    index: Count


class MessageEnding(ResponseModel):
    """Why the message ended."""

    stop_reason: StopReason
    stop_sequence: str | None


class MessageChange(ResponseModel):
    """After the last block."""

    type: Literal["message_delta"]
    delta: MessageEnding
    usage: MessagesUsage


class MessageStop(ResponseModel):
    """The last event."""

    type: Literal["message_stop"]


class MessagesEvent(
    RootModel[
        Annotated[
            MessageStart | Ping | BlockStart | BlockDelta | BlockStop | MessageChange | MessageStop,
            Field(discriminator="type"),
        ]
    ]
):
    """An event of ``/v1/messages`` with ``stream``; the line ``event:`` has its ``type``."""


class TokenCount(ResponseModel):
    """How many tokens a prompt has."""

    input_tokens: Annotated[int, Field(ge=1)]
