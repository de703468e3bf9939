"""Request bodies of ``/v1/messages`` and ``/v1/messages/count_tokens``, named as Anthropic's clients name them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from llmctl.engine.sampling_params import MAX_INT
from llmctl.serving.protocol import MOST, ApiModel, StopStrings, ToolName
from llmctl.serving.refused_fields import Only, not_here

_FAILS_FAST = Field(fail_fast=True)
CacheControl = Annotated[
    dict[str, Any] | None, Field(description="Without effect: prefixes of prompts are cached anyway.")
]


def _blocks(given: Any) -> Any:
    """A text is short for one block."""
    return [{"type": "text", "text": given}] if isinstance(given, str) else given


class MessagesModel(ApiModel):
    """Base of this API's bodies."""

    expected: ClassVar[Mapping[str, str]] = {}


class TextBlockParam(MessagesModel):
    """A text."""

    type: Literal["text"]
    text: str
    cache_control: CacheControl = None


_TextList = Annotated[list[TextBlockParam], _FAILS_FAST]
Texts = Annotated[_TextList, BeforeValidator(_blocks, json_schema_input_type=str | _TextList)]


class ThinkingBlockParam(MessagesModel):
    """Reasoning of an earlier answer. Its signature, which is empty in answers of this server, is not looked at."""

    type: Literal["thinking"]
    thinking: str
    signature: str = ""


class ToolUseBlockParam(MessagesModel):
    """A call of an earlier answer."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    cache_control: CacheControl = None


class ToolResultBlockParam(MessagesModel):
    """What a call returned; the model is shown that it ``is_error`` by a word in front."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: Texts | None = None
    is_error: bool | None = None
    cache_control: CacheControl = None


BlockParam = Annotated[
    TextBlockParam | ThinkingBlockParam | ToolUseBlockParam | ToolResultBlockParam, Field(discriminator="type")
]
_SomeBlocks = Annotated[list[BlockParam], Field(min_length=1, fail_fast=True)]
Blocks = Annotated[_SomeBlocks, BeforeValidator(_blocks, json_schema_input_type=str | _SomeBlocks)]


class MessageParam(MessagesModel):
    """One message; those of one role that follow each other are one turn."""

    role: Literal["user", "assistant", "system"]
    content: Blocks


class ToolParam(MessagesModel):
    """A tool of the client's. Those that Anthropic's servers run, or define, are not known here."""

    type: Literal["custom"] | None = None
    name: ToolName
    input_schema: Annotated[dict[str, Any], Field(description="A JSON schema.")]
    description: str | None = None
    strict: bool | None = None
    cache_control: CacheControl = None
    eager_input_streaming: Annotated[bool | None, Field(description="Without effect: all input is streamed.")] = None

    # Known, and refused when set.
    defer_loading: Annotated[bool | None, Only("not supported: the model sees every tool", (None, False))] = None
    allowed_callers: list[Literal["direct"]] | None = None
    input_examples: Annotated[list[Any] | None, Field(max_length=0)] = None


class ToolChoiceAuto(MessagesModel):
    """The model decides."""

    type: Literal["auto"]
    disable_parallel_tool_use: bool | None = None


class ToolChoiceAny(MessagesModel):
    """There must be calls."""

    type: Literal["any"]
    disable_parallel_tool_use: bool | None = None


class ToolChoiceTool(MessagesModel):
    """There must be a call of this tool."""

    type: Literal["tool"]
    name: str
    disable_parallel_tool_use: bool | None = None


class ToolChoiceNone(MessagesModel):
    """Calls are not looked for."""

    type: Literal["none"]


ToolChoice = Annotated[ToolChoiceAuto | ToolChoiceAny | ToolChoiceTool | ToolChoiceNone, Field(discriminator="type")]
Display = Literal["summarized"] | None


class ThinkingEnabled(MessagesModel):
    """Reasoning, as far as the chat template can ask for it."""

    type: Literal["enabled"]
    budget_tokens: Annotated[
        int | None, Field(ge=0, le=MAX_INT, description="Without effect: `max_tokens` bounds all.")
    ] = None
    display: Display = None


class ThinkingAdaptive(MessagesModel):
    """The model's own way."""

    type: Literal["adaptive"]
    display: Display = None


class ThinkingDisabled(MessagesModel):
    """No reasoning, as far as the chat template can ask for that."""

    type: Literal["disabled"]


Thinking = Annotated[ThinkingEnabled | ThinkingAdaptive | ThinkingDisabled, Field(discriminator="type")]


class OutputFormat(MessagesModel):
    """What the answer must match."""

    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(MessagesModel):
    """What the answer is like."""

    format: OutputFormat | None = None
    effort: Annotated[
        Literal["low", "medium", "high", "xhigh", "max"] | None,
        Field(description="For chat templates that read `reasoning_effort`."),
    ] = None


class Metadata(MessagesModel):
    """About the request."""

    user_id: Annotated[str | None, Field(description="Whose request it is, as OpenAI's `user`.")] = None


class Conversation(MessagesModel):
    """What renders to a prompt; shared by both endpoints."""

    model: str | None = None
    messages: Annotated[list[MessageParam], Field(min_length=1, fail_fast=True)]
    system: Texts | None = None
    tools: Annotated[list[ToolParam], _FAILS_FAST] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl = None

    # Known, and refused when set.
    mcp_servers: Annotated[Any, Only("not supported: tools are called by the client", (None, []))] = None
    context_management: Annotated[Any, Only("not supported: send what the model is to see")] = None
    speed: Annotated[Any, Only("not supported: there is one speed here", (None, "standard"))] = None


class CountTokensRequest(Conversation):
    """``POST /v1/messages/count_tokens``."""


class MessagesRequest(Conversation):
    """``POST /v1/messages``."""

    max_tokens: Annotated[int, Field(ge=0, le=MAX_INT)]
    stop_sequences: StopStrings | None = None
    stream: bool | None = False
    temperature: Annotated[float, Field(ge=0, le=MOST)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=MAX_INT)] | None = None
    metadata: Metadata | None = None
    service_tier: Annotated[
        Literal["auto", "standard_only"] | None, Field(description="Without effect: there is one.")
    ] = None

    # Known, and refused when set.
    container: Annotated[Any, Only("not supported: no code is run here")] = None
    diagnostics: Annotated[Any, Only("not supported: usage.cache_read_input_tokens tells of the prefix cache")] = None
    inference_geo: Annotated[Any, Only("not supported: there is one place here")] = None
    output_format: Annotated[Any, Only("not supported: use output_config.format")] = None

    # Of chats and completions.
    n: Annotated[Any, not_here(values=(None, 1))] = None
    best_of: Annotated[Any, not_here(values=(None, 1))] = None
    seed: Annotated[Any, not_here()] = None
    stop: Annotated[Any, not_here("stop_sequences")] = None
    echo: Annotated[Any, not_here(values=(None, False))] = None
    logprobs: Annotated[Any, not_here(values=(None, False))] = None
    top_logprobs: Annotated[Any, not_here(values=(None, 0))] = None
    logit_bias: Annotated[Any, not_here(values=(None, {}))] = None
    presence_penalty: Annotated[Any, not_here(values=(None, 0))] = None
    frequency_penalty: Annotated[Any, not_here(values=(None, 0))] = None
    repetition_penalty: Annotated[Any, not_here(values=(None, 1))] = None
    min_p: Annotated[Any, not_here(values=(None, 0))] = None
    min_tokens: Annotated[Any, not_here(values=(None, 0))] = None
    max_completion_tokens: Annotated[Any, not_here("max_tokens")] = None
    response_format: Annotated[Any, not_here("output_config.format")] = None
    structured_outputs: Annotated[Any, not_here("output_config.format")] = None
    guided_json: Annotated[Any, not_here("output_config.format")] = None
    functions: Annotated[Any, not_here("tools")] = None
    function_call: Annotated[Any, not_here("tool_choice")] = None
    parallel_tool_calls: Annotated[Any, not_here("tool_choice.disable_parallel_tool_use", (None, True))] = None
    reasoning_effort: Annotated[Any, not_here("output_config.effort")] = None
