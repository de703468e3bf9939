"""What ``/v1/responses`` answers, as models; see ``llmctl.serving.response_schema``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, RootModel

from llmctl.serving.response_schema import Count, LogProb, ResponseModel
from llmctl.serving.responses_api.protocol import Effort

ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputTokenLogprob(ResponseModel):
    """A token and how likely it was."""

    token: str
    logprob: LogProb
    bytes: Annotated[
        list[Annotated[int, Field(ge=0, le=255)]], Field(description="Empty where the tokenizer has no such token.")
    ]


class OutputSampledLogprob(OutputTokenLogprob):
    """A sampled token, and the most likely ones in its place, best first."""

    top_logprobs: list[OutputTokenLogprob]


class OutputText(ResponseModel):
    """The text of a message."""

    type: Literal["output_text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)]
    logprobs: Annotated[list[OutputSampledLogprob], Field(description="Empty unless asked for.")]


class OutputMessage(ResponseModel):
    """What the model says."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: ItemStatus
    content: Annotated[list[OutputText], Field(max_length=1)]


class OutputReasoningText(ResponseModel):
    """The text of reasoning."""

    type: Literal["reasoning_text"]
    text: str


class OutputReasoning(ResponseModel):
    """How the model reasons; with `--reasoning-parser`."""

    id: str
    type: Literal["reasoning"]
    summary: Annotated[list[Any], Field(max_length=0)]
    status: ItemStatus
    content: Annotated[list[OutputReasoningText], Field(max_length=1)]


class OutputFunctionCall(ResponseModel):
    """A call of a function: `arguments` are a whole JSON object, if its status is `completed`."""

    id: str
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    status: ItemStatus


OutputItem = Annotated[OutputMessage | OutputReasoning | OutputFunctionCall, Field(discriminator="type")]


class InputTokensDetails(ResponseModel):
    """Of the prompt's tokens."""

    cached_tokens: Annotated[Count, Field(description="Found in the prefix cache.")]
    cache_write_tokens: Literal[0]


class OutputTokensDetails(ResponseModel):
    """Of the answer's tokens."""

    reasoning_tokens: Annotated[Count, Field(description="What the text of the reasoning is as tokens.")]


class ResponseUsage(ResponseModel):
    """Tokens of one response."""

    input_tokens: Count
    input_tokens_details: InputTokensDetails
    output_tokens: Count
    output_tokens_details: OutputTokensDetails
    total_tokens: Count


class ResponseFault(ResponseModel):
    """Why a response failed."""

    code: Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]
    message: str
    param: str | None
    type: str


class IncompleteDetails(ResponseModel):
    """Why a response ends early."""

    reason: Annotated[Literal["max_output_tokens"], Field(description="Or the context is full.")]


class AskedReasoning(ResponseModel):
    """As it was asked for."""

    effort: Effort | None
    summary: Literal["auto"] | None


class AskedFormat(ResponseModel):
    """Text, or any JSON object."""

    type: Literal["text", "json_object"]


class AskedSchema(ResponseModel):
    """A JSON schema."""

    type: Literal["json_schema"]
    name: str
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    description: str | None
    strict: bool | None


class AskedText(ResponseModel):
    """As it was asked for."""

    format: AskedFormat | AskedSchema
    verbosity: Literal["medium"]


class AskedTool(ResponseModel):
    """As it was asked for."""

    type: Literal["function"]
    name: str
    description: str | None
    parameters: dict[str, Any] | None
    strict: bool | None


class ChosenFunction(ResponseModel):
    """A function by its name."""

    type: Literal["function"]
    name: str


class ChosenTools(ResponseModel):
    """Functions by their names."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[ChosenFunction]


class ResponseObject(ResponseModel):
    """The answer of ``/v1/responses``. What it repeats of the request is as it was done."""

    id: str
    object: Literal["response"]
    created_at: Count
    completed_at: Count | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: Literal[False]
    error: ResponseFault | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: Count | None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: None
    prompt_cache_key: str | None
    reasoning: AskedReasoning
    safety_identifier: str | None
    service_tier: Literal["default"]
    store: Annotated[Literal[False], Field(description="Nothing is kept, whatever was asked for.")]
    temperature: float
    text: AskedText
    tool_choice: Literal["none", "auto", "required"] | ChosenFunction | ChosenTools
    tools: list[AskedTool]
    top_logprobs: int
    top_p: float
    truncation: Literal["auto", "disabled"]
    usage: ResponseUsage | None
    user: str | None


class _Event(ResponseModel):
    """An event of a stream."""

    sequence_number: Count


class ResponseEvent(_Event):
    """The response at its beginning, or at its end."""

    type: Literal[
        "response.created", "response.in_progress", "response.completed", "response.incomplete", "response.failed"
    ]
    response: ResponseObject


class OutputItemEvent(_Event):
    """An item begins, or is over."""

    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: Count
    item: OutputItem


class _ItemEvent(_Event):
    """An event of an item that has begun."""

    item_id: str
    output_index: Count


class _PartEvent(_ItemEvent):
    """An event of a part of an item."""

    content_index: Literal[0]


class ContentPartEvent(_PartEvent):
    """A part of an item begins, or is over."""

    type: Literal["response.content_part.added", "response.content_part.done"]
    part: Annotated[OutputText | OutputReasoningText, Field(discriminator="type")]


class OutputTextDeltaEvent(_PartEvent):
    """More of a message."""

    type: Literal["response.output_text.delta"]
    delta: str
    logprobs: list[OutputSampledLogprob]


class OutputTextDoneEvent(_PartEvent):
    """The whole of a message."""

    type: Literal["response.output_text.done"]
    text: str
    logprobs: list[OutputSampledLogprob]


class ReasoningDeltaEvent(_PartEvent):
    """More reasoning."""

    type: Literal["response.reasoning_text.delta"]
    delta: str


class ReasoningDoneEvent(_PartEvent):
    """The whole of the reasoning."""

    type: Literal["response.reasoning_text.done"]
    text: str


class ArgumentsDeltaEvent(_ItemEvent):
    """More of a call's arguments."""

    type: Literal["response.function_call_arguments.delta"]
    delta: str


class ArgumentsDoneEvent(_ItemEvent):
    """All of a call's arguments."""

    type: Literal["response.function_call_arguments.done"]
    arguments: str


class ErrorEvent(_Event):
    """What went wrong; ``response.failed`` follows."""

    type: Literal["error"]
    code: str
    message: str
    param: str | None


class ResponseStreamEvent(
    RootModel[
        Annotated[
            ResponseEvent
            | OutputItemEvent
            | ContentPartEvent
            | OutputTextDeltaEvent
            | OutputTextDoneEvent
            | ReasoningDeltaEvent
            | ReasoningDoneEvent
            | ArgumentsDeltaEvent
            | ArgumentsDoneEvent
            | ErrorEvent,
            Field(discriminator="type"),
        ]
    ]
):
    """An event of ``/v1/responses`` with ``stream``; its name is its ``type``."""
