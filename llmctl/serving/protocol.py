"""Request bodies of the OpenAI-compatible endpoints.

Types are checked strictly (``"5"`` is not 5). Unknown fields are accepted and ignored, as other servers do; a known
field that cannot be honoured is refused by ``llmctl.serving.intake``. Ranges are checked by ``SamplingParams``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

# A list that is wrong ends at its first item that is: one problem is told, and a list has many items.
_FAILS_FAST = Field(fail_fast=True)
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], _FAILS_FAST]
Texts = Annotated[list[str], _FAILS_FAST]
Objects = Annotated[list[dict[str, Any]], _FAILS_FAST]


def _numbers(given: dict[str, Any]) -> dict[str, Any]:
    """The same, if all are numbers; else the first that is not. pydantic's own would describe every one."""
    for name, value in given.items():
        if type(value) is not float and type(value) is not int:
            found = {"name": name[:40], "found": type(value).__name__}
            raise PydanticCustomError("not_number", "expected numbers, found {found} for '{name}'", found)
    return given


Numbers = Annotated[
    dict[str, Any],
    AfterValidator(_numbers),
    WithJsonSchema({"type": "object", "additionalProperties": {"type": "number"}}),
]


class ApiModel(BaseModel):
    """Base of request bodies: strict types, unknown fields kept aside."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class StreamOptions(ApiModel):
    """OpenAI's ``stream_options``."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class ResponseFormat(ApiModel):
    """OpenAI's ``response_format``; only ``text`` can be honoured."""

    type: str


class SamplingFields(ApiModel):
    """What completions and chat completions share. ``None`` means the model's default."""

    model: str | None = None
    n: int | None = 1
    seed: int | None = None
    stop: str | Texts | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Numbers | None = None
    response_format: ResponseFormat | None = None
    user: str | None = None

    # Beyond OpenAI's.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: TokenIds | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    allowed_token_ids: TokenIds | None = None
    bad_words: Texts | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = 0
    cache_salt: str | None = None
    skip_special_tokens: bool | None = True
    include_stop_str_in_output: bool | None = False

    # Known, and refused when set.
    use_beam_search: bool | None = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    structured_outputs: Any = None


class CompletionRequest(SamplingFields):
    """``POST /v1/completions``."""

    prompt: str | TokenIds | Texts | Annotated[list[TokenIds], _FAILS_FAST]
    max_tokens: int | None = 16
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    echo: bool | None = False
    best_of: int | None = None
    suffix: str | None = None
    add_special_tokens: bool = True


class ContentPart(ApiModel):
    """A part of a message's content; only ``text`` parts can be honoured."""

    type: str
    text: str | None = None


class ChatMessage(ApiModel):
    """One message; fields beyond these reach the chat template as they are."""

    role: str
    content: str | Annotated[list[ContentPart], _FAILS_FAST] | None = None


class ChatRequest(ApiModel):
    """What renders to a chat prompt; shared by chat completions and ``/tokenize``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    tools: Objects | None = None
    add_generation_prompt: bool = True
    add_special_tokens: bool = False
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: Objects | None = None


class ChatCompletionRequest(SamplingFields, ChatRequest):
    """``POST /v1/chat/completions``."""

    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    functions: Any = None
    function_call: Any = None


class TokenizeRequest(ApiModel):
    """``POST /tokenize`` with a prompt."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool | None = False


class TokenizeChatRequest(ChatRequest):
    """``POST /tokenize`` with messages."""

    model: str | None = None
    return_token_strs: bool | None = False


class DetokenizeRequest(ApiModel):
    """``POST /detokenize``."""

    model: str | None = None
    tokens: TokenIds
