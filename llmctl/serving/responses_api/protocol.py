"""The request body of ``POST /v1/responses``, with the sampling fields of all requests beyond OpenAI's.

Known fields that cannot be honoured are refused here, each with its reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from llmctl.engine.sampling_params import MAX_INT
from llmctl.serving.openai_errors import UNION_TAG
from llmctl.serving.protocol import (
    EXPECTED,
    ApiModel,
    ContentPart,
    FunctionDefinition,
    SamplingFields,
    StreamOptions,
    TemplateVariables,
)
from llmctl.serving.refused_fields import Only, not_here, refusal

LOGPROBS = "message.output_text.logprobs"
"""Of ``include``: what asks for log-probabilities."""
_MOST_SHOWN = 40  # characters of a client's word in a refusal


def _kind(value: Any, default: str = "") -> str:
    """The ``type`` of an object as the tag of its model."""
    found = value.get("type", default) if isinstance(value, dict) else getattr(value, "type", default)
    return f"{UNION_TAG}{found}"


def _known(kinds: tuple[str, ...], why: str = "", default: str = "") -> BeforeValidator:
    """Refuses objects whose ``type`` is none of these, in words of its own."""

    def check(value: Any) -> Any:
        found = value.get("type", default) if isinstance(value, dict) else default
        if isinstance(value, dict) and found not in kinds:
            shown = repr(found[:_MOST_SHOWN]) if isinstance(found, str) and found else "none"
            raise refusal(f"expected type {' or '.join(map(repr, kinds))}, found {shown}{why}")
        return value

    return BeforeValidator(check)


def _is_text(value: Any) -> str:
    return f"{UNION_TAG}text" if isinstance(value, str) else f"{UNION_TAG}list"


_BY_FORM = Discriminator(_is_text)
_TEXT, _LIST = Tag(f"{UNION_TAG}text"), Tag(f"{UNION_TAG}list")
Content = Annotated[
    Annotated[str, _TEXT] | Annotated[list[ContentPart], Field(fail_fast=True), _LIST],
    _BY_FORM,
]


class InputMessage(ApiModel):
    """A message."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content


class FunctionCallItem(ApiModel):
    """A call that the model has made."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: Annotated[str, Field(description="A JSON object; empty: `{}`.")]


class FunctionCallOutput(ApiModel):
    """What a call has returned."""

    type: Literal["function_call_output"]
    call_id: str
    output: Content


class SummaryText(ApiModel):
    """A part of a summary of reasoning."""

    type: Literal["summary_text"] = "summary_text"
    text: str


class ReasoningText(ApiModel):
    """A part of reasoning."""

    type: Literal["reasoning_text"] = "reasoning_text"
    text: str


class ReasoningItem(ApiModel):
    """Reasoning of the model; what its chat template makes of it is the template's."""

    type: Literal["reasoning"]
    summary: Annotated[list[SummaryText], Field(fail_fast=True)] | None = None
    content: Annotated[list[ReasoningText], Field(fail_fast=True)] | None = None
    encrypted_content: Annotated[str | None, Only("another server's, which this one cannot read", (None, ""))] = None


_ITEMS = ("message", "function_call", "function_call_output", "reasoning")
InputItem = Annotated[
    Annotated[InputMessage, Tag(f"{UNION_TAG}message")]
    | Annotated[FunctionCallItem, Tag(f"{UNION_TAG}function_call")]
    | Annotated[FunctionCallOutput, Tag(f"{UNION_TAG}function_call_output")]
    | Annotated[ReasoningItem, Tag(f"{UNION_TAG}reasoning")],
    Discriminator(lambda value: _kind(value, "message")),
    _known(_ITEMS, default="message"),
]
Input = Annotated[
    Annotated[str, _TEXT] | Annotated[list[InputItem], Field(min_length=1, fail_fast=True), _LIST],
    _BY_FORM,
]


class FunctionTool(FunctionDefinition):
    """A function that the model may call."""

    type: Literal["function"]


Tool = Annotated[FunctionTool, _known(("function",), "; there are no hosted tools here")]


class FunctionChoice(ApiModel):
    """This function must be called."""

    type: Literal["function"]
    name: str


class AllowedTools(ApiModel):
    """The request's tools but for those that are not named here."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[FunctionChoice], Field(min_length=1, fail_fast=True)]


class PlainText(ApiModel):
    """Any text."""

    type: Literal["text"]


class JsonObjectText(ApiModel):
    """A JSON object."""

    type: Literal["json_object"]


class JsonSchemaText(ApiModel):
    """What matches a JSON schema. Enforced with and without ``strict``."""

    type: Literal["json_schema"]
    name: str
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    description: str | None = None
    strict: bool | None = None


Format = Annotated[
    Annotated[PlainText, Tag(f"{UNION_TAG}text")]
    | Annotated[JsonObjectText, Tag(f"{UNION_TAG}json_object")]
    | Annotated[JsonSchemaText, Tag(f"{UNION_TAG}json_schema")],
    Discriminator(_kind),
    _known(("text", "json_object", "json_schema")),
]


class TextOptions(ApiModel):
    """What the text is like."""

    format: Format | None = None
    verbosity: Annotated[str | None, Only(values=(None, "medium"))] = None


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
_SUMMARY = Only("not supported; reasoning comes as it is, as the content of its item", (None, "auto"))


class ReasoningOptions(ApiModel):
    """How the model reasons: as far as its chat template can be told."""

    effort: Effort | None = None
    summary: Annotated[str | None, _SUMMARY] = None
    generate_summary: Annotated[str | None, _SUMMARY] = None
    context: Annotated[str | None, Only("not supported; the chat template decides", (None, "auto"))] = None
    mode: Annotated[str | None, Only(values=(None, "standard"))] = None


class ResponsesStreamOptions(StreamOptions):
    """``stream_options``. The usage is always in the last event."""

    continuous_usage_stats: Annotated[bool, Only(values=(False,))] = False
    include_obfuscation: Annotated[bool | None, Only(values=(None, False))] = None


Included = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]
_NO_STATE = Only("this server keeps no responses; send the whole conversation as input")
_NO_PROMPTS = Only("this server keeps no prompts; send it as instructions")
_Nothing = Annotated[Any, Only()]


class ResponsesRequest(SamplingFields):
    """``POST /v1/responses``."""

    expected: ClassVar[Mapping[str, str]] = {name: EXPECTED[name] for name in ("stop", "tool_choice")}

    input: Input
    instructions: str | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    max_output_tokens: int | None = None
    top_logprobs: int | None = None
    include: Annotated[
        list[Included],
        Field(fail_fast=True, description="What this server has: log-probabilities. There is none of the others."),
    ] | None = None  # fmt: skip
    stream_options: ResponsesStreamOptions | None = None
    metadata: Metadata | None = None
    truncation: Annotated[
        Literal["auto", "disabled"] | None,
        Field(description="`auto`: items are left out from the front of `input` until it fits."),
    ] = None
    store: Annotated[bool | None, Field(description="Accepted; nothing is stored, and the answer says so.")] = None
    max_tool_calls: Annotated[
        int | None, Field(ge=0, le=MAX_INT, description="Of hosted tools, of which there are none: it always holds.")
    ] = None
    safety_identifier: Annotated[str | None, Field(description="As `user`, which counts where both are given.")] = None
    prompt_cache_key: Annotated[str | None, Field(description="Prefixes are cached without one.")] = None

    # Beyond OpenAI's.
    chat_template_kwargs: TemplateVariables | None = None

    # Known, and refused when set.
    previous_response_id: Annotated[Any, _NO_STATE] = None
    conversation: Annotated[Any, _NO_STATE] = None
    prompt: Annotated[Any, _NO_PROMPTS] = None
    background: Annotated[bool | None, Only("not supported; use stream", (None, False))] = None
    service_tier: Annotated[str | None, Only("there is one tier", (None, "auto", "default"))] = None
    prompt_cache_retention: Annotated[str | None, Only(values=(None, "in_memory"))] = None
    prompt_cache_options: _Nothing = None
    context_management: _Nothing = None
    background_options: _Nothing = None
    moderation: _Nothing = None
    access_programs: _Nothing = None
    image: _Nothing = None

    # Of chats.
    messages: Annotated[Any, not_here("input")] = None
    response_format: Annotated[Any, not_here("text.format")] = None
    max_tokens: Annotated[Any, not_here("max_output_tokens")] = None
    max_completion_tokens: Annotated[Any, not_here("max_output_tokens")] = None
    logprobs: Annotated[Any, not_here(f"include: ['{LOGPROBS}']")] = None
    functions: Annotated[Any, not_here("tools")] = None
    function_call: Annotated[Any, not_here("tool_choice")] = None
    reasoning_effort: Annotated[Any, not_here("reasoning.effort")] = None
    n: Annotated[int | None, Only("a response has one output", (None, 1))] = 1
    prompt_logprobs: Annotated[Any, not_here("/v1/chat/completions")] = None
