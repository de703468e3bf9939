"""Request bodies of the OpenAI-compatible endpoints.

Types are checked strictly (``"5"`` is not 5). Unknown fields are accepted and ignored, as other servers do; known ones
that are never honoured are refused here (``refused_fields``), others by ``intake``. Ranges are checked by
``SamplingParams``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from llmctl.engine.deadline import MAX_CHARS, PATTERN
from llmctl.engine.sampling_params import (
    LOGIT_BIAS,
    MAX_BAD_WORD_CHARS,
    MAX_BAD_WORDS,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
)
from llmctl.serving.refused_fields import Only

MAX_PROMPT_LOGPROBS = 2**21
"""Log-probabilities of all prompts of a request: some hundred bytes each while its answer is written."""
# A list that is wrong ends at its first item that is: one problem is told, and a list has many items.
_FAILS_FAST = Field(fail_fast=True)
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], _FAILS_FAST]
Texts = Annotated[list[str], _FAILS_FAST]
Objects = Annotated[list[dict[str, Any]], _FAILS_FAST]


def only_numbers(given: dict[str, Any]) -> dict[str, Any]:
    """The same, if all are numbers; else the first that is not. pydantic's own would describe every one."""
    for name, value in given.items():
        if type(value) is not float and type(value) is not int:
            found = {"name": name[:40], "found": type(value).__name__}
            raise PydanticCustomError("not_number", "expected numbers, found {found} for '{name}'", found)
    return given


TOKEN_ID_KEY = "0|[1-9][0-9]{0,18}"
"""A token id as a key of an object, as a regular expression for the whole of it."""
LogitBias = Annotated[
    dict[str, Any],
    AfterValidator(only_numbers),
    WithJsonSchema(
        {
            "type": "object",
            "patternProperties": {
                f"^({TOKEN_ID_KEY})$": {"type": "number", "minimum": LOGIT_BIAS.low, "maximum": LOGIT_BIAS.high}
            },
            "additionalProperties": False,
        }
    ),
]
_STOP_STRING = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
Stop = Annotated[
    str | Texts,
    WithJsonSchema({"anyOf": [_STOP_STRING, {"type": "array", "items": _STOP_STRING, "maxItems": MAX_STOP_STRINGS}]}),
]
StopStrings = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]],
    Field(max_length=MAX_STOP_STRINGS, fail_fast=True),
]
BadWords = Annotated[
    Texts,
    WithJsonSchema(
        {
            "type": "array",
            "items": {"type": "string", "pattern": r"\S", "maxLength": MAX_BAD_WORD_CHARS},
            "maxItems": MAX_BAD_WORDS,
        }
    ),
]


DeadlineText = Annotated[str, WithJsonSchema({"type": "string", "pattern": PATTERN, "maxLength": MAX_CHARS})]

_SOME_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
Prompts = Annotated[
    str | TokenIds | Texts | Annotated[list[TokenIds], _FAILS_FAST],
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1},
                _SOME_IDS,
                {"type": "array", "items": _SOME_IDS, "minItems": 1},
            ]
        }
    ),
]
# A template is given these by fields of the request.
OWN_VARIABLES = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
TemplateVariables = Annotated[
    dict[str, Any],
    WithJsonSchema({"type": "object", "propertyNames": {"not": {"enum": sorted(OWN_VARIABLES)}}}),
]


JsonSchema = dict[str, Any] | bool
Choices = Annotated[list[str], Field(min_length=1, fail_fast=True)]


MOST = 1e6
"""Of temperatures and penalties in APIs that bound them by types; beyond it a distribution changes no more."""

# A union fails with one problem per alternative; these say what the field accepts in one phrase.
PROMPTS_EXPECTED = "a string, a list of token ids (integers >= 0), or a list of either"
EXPECTED = {
    "prompt": PROMPTS_EXPECTED,
    "stop": "a string or a list of strings",
    "tool_choice": "'none', 'auto', 'required' or an object naming a function",
}


class ApiModel(BaseModel):
    """Base of request bodies: strict types, unknown fields kept aside. ``expected``: what fields accept, in words.

    Its validators are not made with the classes but when they are first used, or by ``body.build_models``: to make them
    takes a third as long as a start.
    """

    expected: ClassVar[Mapping[str, str]] = EXPECTED
    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=(), defer_build=True)


class StreamOptions(ApiModel):
    """OpenAI's ``stream_options``."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class JsonSchemaFormat(ApiModel):
    """The ``json_schema`` of a ``response_format``. Enforced with and without ``strict``."""

    name: str | None = None
    description: str | None = None
    schema_: Annotated[JsonSchema | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(ApiModel):
    """OpenAI's ``response_format``; beside ``json_object``, ``schema`` is llama.cpp's, and ``value`` TGI's."""

    type: Annotated[str, WithJsonSchema({"enum": ["text", "json_object", "json_schema"]})]
    json_schema: JsonSchemaFormat | None = None
    schema_: Annotated[JsonSchema | None, Field(alias="schema")] = None
    value: JsonSchema | None = None


class StructuredOutputs(BaseModel):
    """vLLM's ``structured_outputs``: one of these."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        protected_namespaces=(),
        defer_build=True,
        json_schema_extra={"minProperties": 1, "maxProperties": 1},
    )

    json_: Annotated[str | JsonSchema | None, Field(alias="json")] = None
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: Annotated[bool | None, WithJsonSchema({"const": True})] = None


class RequestFields(ApiModel):
    """What all requests to the engine share. ``None`` means the default."""

    model: str | None = None
    user: str | None = None

    # Beyond OpenAI's.
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = 0
    deadline: DeadlineText | None = None
    cache_salt: str | None = None


class SamplingFields(RequestFields):
    """What completions and chat completions share. ``None`` means the model's default."""

    n: int | None = 1
    seed: int | None = None
    stop: Stop | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: LogitBias | None = None
    response_format: ResponseFormat | None = None

    # Beyond OpenAI's.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: TokenIds | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    allowed_token_ids: Annotated[TokenIds, WithJsonSchema(_SOME_IDS)] | None = None
    bad_words: BadWords | None = None
    skip_special_tokens: bool | None = True
    include_stop_str_in_output: bool | None = False
    prompt_logprobs: int | None = None
    return_tokens_as_token_ids: bool | None = False

    # What the output must match, as vLLM, SGLang and llama.cpp spell it. Of these and response_format, one.
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | JsonSchema | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    json_schema: str | JsonSchema | None = None
    regex: str | None = None
    ebnf: str | None = None
    grammar: str | None = None

    # Known, and refused when set.
    use_beam_search: Annotated[bool | None, Only(values=(None, False))] = None
    guided_decoding_backend: Annotated[Any, Only()] = None
    guided_whitespace_pattern: Annotated[Any, Only()] = None
    structural_tag: Annotated[Any, Only()] = None


class CompletionRequest(SamplingFields):
    """``POST /v1/completions``."""

    prompt: Prompts
    max_tokens: int | None = 16
    logprobs: int | None = None
    echo: bool | None = False
    best_of: Annotated[int | None, Field(description="Refused unless it equals `n`.")] = None
    suffix: Annotated[str | None, Only(values=(None, ""))] = None
    add_special_tokens: bool = True


# The field that holds the text of a part, by its type: chat's own, and those of OpenAI's Responses.
PART_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


class ContentPart(ApiModel):
    """A part of a message's content; only parts that are text can be honoured."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"properties": {"type": {"const": kind}}, "required": ["type", name]}
                for kind, name in PART_TEXTS.items()
            ]
        }
    )

    type: Annotated[str, WithJsonSchema({"enum": list(PART_TEXTS), "description": "Anything else is not supported."})]
    text: Annotated[str | None, WithJsonSchema({"type": "string"})] = None
    refusal: Annotated[str | None, WithJsonSchema({"type": "string"})] = None


class FunctionCallMade(ApiModel):
    """A call of a message: ``arguments`` as OpenAI writes them, or the object that they stand for."""

    name: str
    arguments: Annotated[
        str | dict[str, Any] | None, Field(description="A JSON object, as a string or as it is; empty: `{}`.")
    ] = None


class ToolCallMade(ApiModel):
    """A call of an assistant's message."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCallMade


class ChatMessage(ApiModel):
    """One message; fields beyond these, as ``tool_call_id``, reach the chat template as they are."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[ContentPart], _FAILS_FAST] | None = None
    tool_calls: Annotated[list[ToolCallMade], _FAILS_FAST] | None = None
    function_call: FunctionCallMade | None = None


_TOOL_NAME = "[a-zA-Z0-9_.:/-]{1,128}"
_TOOL_NAMES = re.compile(rf"(?:{_TOOL_NAME}\n)*")
ToolName = Annotated[str, Field(pattern=f"^{_TOOL_NAME}$")]


def are_tool_names(names: Sequence[str]) -> bool:
    """Whether all are names that a tool may have, in one pass over all."""
    text = "\n".join([*names, ""])
    return text.count("\n") == len(names) and _TOOL_NAMES.fullmatch(text) is not None


class FunctionDefinition(ApiModel):
    """A function that the model may call."""

    name: ToolName
    description: str | None = None
    parameters: Annotated[dict[str, Any] | None, Field(description="A JSON schema.")] = None
    strict: bool | None = None


class Tool(ApiModel):
    """A tool: a function."""

    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(ApiModel):
    """A function by its name."""

    name: str


class NamedTool(ApiModel):
    """A tool by its name."""

    type: Literal["function"]
    function: FunctionName


class ChatRequest(ApiModel):
    """What renders to a chat prompt; shared by chat completions and ``/tokenize``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    tools: Annotated[list[Tool], _FAILS_FAST] | None = None
    add_generation_prompt: bool = True
    add_special_tokens: bool = False
    continue_final_message: Annotated[
        bool,
        Field(
            description="With neither this nor `add_generation_prompt` a last message of the assistant's is continued, "
            "but on a server with `--no-prefill-assistant`."
        ),
    ] = False
    chat_template: Annotated[str | None, Field(description="Refused without `--trust-request-chat-template`.")] = None
    chat_template_kwargs: TemplateVariables | None = None
    documents: Objects | None = None


class ChatCompletionRequest(SamplingFields, ChatRequest):
    """``POST /v1/chat/completions``. ``clips_max_tokens``: ``max_tokens`` beyond the context's end is up to it."""

    clips_max_tokens: ClassVar[bool] = False

    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[list[FunctionDefinition], _FAILS_FAST] | None = None
    function_call: Literal["none", "auto"] | FunctionName | None = None


class TokenizeRequest(ApiModel):
    """``POST /tokenize`` with a prompt."""

    model_config = ConfigDict(json_schema_extra={"not": {"required": ["messages"]}})

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool | None = False


class TokenizeChatRequest(ChatRequest):
    """``POST /tokenize`` with messages."""

    model_config = ConfigDict(json_schema_extra={"not": {"required": ["prompt"]}})

    model: str | None = None
    return_token_strs: bool | None = False


class DetokenizeRequest(ApiModel):
    """``POST /detokenize``."""

    model: str | None = None
    tokens: TokenIds


def given_prompts(given: Prompts) -> list[Any]:
    """Prompts as given: texts, or lists of token ids."""
    one = isinstance(given, str) or (bool(given) and isinstance(given[0], int))
    return [given] if one else list(given)
