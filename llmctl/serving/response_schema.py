"""What the server answers, as models: for ``/openapi.json`` and for tests, which hold real answers against them.

Nothing is made or checked with these while serving: ``llmctl.serving.responses`` builds plain dicts.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import SkipJsonSchema

Absent = SkipJsonSchema[None]
"""Of a member that may be left out, and is not null when it is there."""
Count = Annotated[int, Field(ge=0)]
LogProb = Annotated[float, Field(le=0, ge=-9999, description="-9999 stands for -inf.")]
FinishReason = Literal["stop", "length"]
ChatFinishReason = Annotated[
    Literal["stop", "length", "tool_calls", "function_call"],
    Field(description="`tool_calls` (of `functions`: `function_call`): there are calls, and all are whole."),
]
StopReason = Annotated[int | str | None, Field(description="The stop string or the stop token's id that ended it.")]


class ResponseModel(BaseModel):
    """Base of what is answered: exactly these members."""

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=(), defer_build=True)


class ErrorDetail(ResponseModel):
    """OpenAI's error."""

    message: str
    type: str
    param: Annotated[str | None, Field(description="The field of the request at fault.")]
    code: str | None


class ErrorResponse(ResponseModel):
    """What every refusal and failure answers."""

    error: ErrorDetail


class PromptTokensDetails(ResponseModel):
    """Of the prompt's tokens."""

    cached_tokens: Annotated[Count, Field(description="Found in the prefix cache.")]


class Usage(ResponseModel):
    """Tokens of one request; a prompt counts once, however many samples are drawn of it."""

    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(ResponseModel):
    """Log-probabilities of a completion: lists of one length, an entry a token."""

    text_offset: list[Count]
    token_logprobs: list[LogProb | None]
    tokens: list[str]
    top_logprobs: list[dict[str, LogProb] | None]


class PromptTokenLogprob(ResponseModel):
    """A token in a place of the prompt."""

    logprob: LogProb
    rank: Annotated[int, Field(ge=1, description="1 is the most likely token.")]
    decoded_token: Annotated[str | None, Field(description="Null where the tokenizer has no such token.")]


PromptLogprobs = Annotated[
    list[dict[str, PromptTokenLogprob] | None] | Absent,
    Field(
        description="With `prompt_logprobs`: per token of the prompt, by their ids, it and the most likely ones in its "
        "place; null for the first."
    ),
]


class CompletionChunkChoice(ResponseModel):
    """What one event of a stream adds to a completion."""

    index: Count
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: StopReason


class CompletionChoice(ResponseModel):
    """One completion."""

    index: Count
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    stop_reason: StopReason
    prompt_logprobs: PromptLogprobs = None


class Completion(ResponseModel):
    """The answer of ``/v1/completions``. Choices: all samples of the first prompt, then of the next."""

    id: str
    object: Literal["text_completion"]
    created: Count
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunk(ResponseModel):
    """An event of ``/v1/completions`` with ``stream``; the last before ``[DONE]`` may be ``usage`` alone."""

    id: str
    object: Literal["text_completion"]
    created: Count
    model: str
    choices: Annotated[list[CompletionChunkChoice], Field(max_length=1)]
    usage: Annotated[Usage | None, Field(description="With `stream_options.include_usage`.")] = None


class TokenLogprob(ResponseModel):
    """A token and how likely it was."""

    token: str
    logprob: LogProb
    bytes: Annotated[
        list[Annotated[int, Field(ge=0, le=255)]] | None,
        Field(description="Null where the tokenizer has no such token."),
    ]


class SampledTokenLogprob(TokenLogprob):
    """A sampled token, and the most likely ones in its place, best first."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(ResponseModel):
    """Log-probabilities of an answer, an entry a token."""

    content: list[SampledTokenLogprob]


class FunctionCall(ResponseModel):
    """A call of a function: a whole JSON object as ``arguments``, if the ``finish_reason`` says so."""

    name: str
    arguments: str


class ToolCall(ResponseModel):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class AssistantMessage(ResponseModel):
    """The model's message."""

    role: Literal["assistant"]
    content: Annotated[str | None, Field(description="Null beside calls or reasoning when there is no text.")]
    refusal: None
    reasoning_content: Annotated[str | None, Field(description="With `--reasoning-parser`.")] = None
    tool_calls: Annotated[list[ToolCall] | Absent, Field(min_length=1)] = None
    function_call: Annotated[FunctionCall | Absent, Field(description="Of requests with `functions`.")] = None


class ChatChoice(ResponseModel):
    """One answer."""

    index: Count
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason
    stop_reason: StopReason


class ChatCompletion(ResponseModel):
    """The answer of ``/v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"]
    created: Count
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs = None


class FunctionCallDelta(ResponseModel):
    """What one event adds to a call: its name, then pieces of its arguments."""

    name: str | Absent = None
    arguments: str


class ToolCallDelta(ResponseModel):
    """What one event adds to the call with this ``index``; ``id`` and ``type`` come with its name."""

    index: Count
    id: str | Absent = None
    type: Literal["function"] | Absent = None
    function: FunctionCallDelta


class MessageDelta(ResponseModel):
    """What one event adds to a message: its role first, then one of the others; nothing with the reason of its end."""

    role: Literal["assistant"] | Absent = None
    content: str | None = None
    reasoning_content: str | Absent = None
    tool_calls: Annotated[list[ToolCallDelta] | Absent, Field(min_length=1, max_length=1)] = None
    function_call: FunctionCallDelta | Absent = None


class ChatChunkChoice(ResponseModel):
    """What one event of a stream adds to an answer."""

    index: Count
    delta: MessageDelta
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason | None
    stop_reason: Annotated[int | str | None, Field(description="Only with a `finish_reason`.")] = None


class ChatCompletionChunk(ResponseModel):
    """An event of ``/v1/chat/completions`` with ``stream``; the last before ``[DONE]`` may be ``usage`` alone."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: Count
    model: str
    choices: Annotated[list[ChatChunkChoice], Field(max_length=1)]
    usage: Annotated[Usage | None, Field(description="With `stream_options.include_usage`.")] = None


class ModelCard(ResponseModel):
    """The served model, or an adapter."""

    id: str
    object: Literal["model"]
    created: Count
    owned_by: Literal["llmctl"]
    root: Annotated[str, Field(description="`--model` as it was given; of an adapter, its folder.")]
    parent: Annotated[str | None, Field(description="Of an adapter, the model that it is for.")]
    max_model_len: Annotated[
        Annotated[int, Field(ge=1)] | Absent,
        Field(description="Tokens, prompt and output; once the engine is there."),
    ] = None


class ModelList(ResponseModel):
    """All models: the served one."""

    object: Literal["list"]
    data: Annotated[list[ModelCard], Field(min_length=1, max_length=1)]


class TokenizeResponse(ResponseModel):
    """Token ids of a text."""

    count: Count
    max_model_len: Annotated[int, Field(ge=1)]
    tokens: list[Count]
    token_strs: Annotated[
        list[str | None] | Absent, Field(description="With `return_token_strs`: the vocabulary's spelling.")
    ] = None


class DetokenizeResponse(ResponseModel):
    """The text of token ids."""

    prompt: str


class TokenizerInfo(BaseModel):
    """The model's ``tokenizer_config.json``, with the special tokens and the chat template that are used."""

    model_config = ConfigDict(strict=True, extra="allow", defer_build=True)

    tokenizer_class: str
    chat_template: str | Absent = None


class Alive(ResponseModel):
    """The server lives; its engine may be starting."""

    status: Literal["ok"]
    engine: str


class Dead(ResponseModel):
    """The engine is dead, and the server about to end."""

    status: Literal["dead"]
    reason: str


class Ready(ResponseModel):
    """A request would be served now."""

    status: Literal["ready"]


class NotReady(ResponseModel):
    """A request would not be served now."""

    status: Annotated[str, Field(description="The first word or words of the reason, as `starting` or `stalled`.")]
    reason: str


class Version(ResponseModel):
    """The version of llmctl."""

    version: str
