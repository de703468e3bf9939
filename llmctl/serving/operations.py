"""The operations that ``/openapi.json`` describes: what each is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from llmctl.serving.adapter_schema import LoadAdapterRequest, UnloadAdapterRequest
from llmctl.serving.embedding_schema import EmbeddingList, EmbeddingRequest
from llmctl.serving.error_shapes import MESSAGES, OPENAI, TGI, ErrorShape
from llmctl.serving.live_schema import EngineDocument, RunningRequests
from llmctl.serving.messages_api.protocol import CountTokensRequest, MessagesRequest
from llmctl.serving.messages_api.schema import MessagesErrorResponse, MessagesEvent, MessagesResponse, TokenCount
from llmctl.serving.protocol import (
    ApiModel,
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeRequest,
)
from llmctl.serving.response_schema import (
    Alive,
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    CompletionChunk,
    Dead,
    DetokenizeResponse,
    ErrorResponse,
    ModelCard,
    ModelList,
    NotReady,
    Ready,
    ResponseModel,
    TokenizeResponse,
    TokenizerInfo,
    Version,
)
from llmctl.serving.responses_api.protocol import ResponsesRequest
from llmctl.serving.responses_api.schema import ResponseObject, ResponseStreamEvent
from llmctl.serving.tgi_api.protocol import CompatGenerateRequest, GenerateRequest, GenerateStreamRequest
from llmctl.serving.tgi_api.schema import (
    CompatGenerateResponse,
    GenerateResponse,
    ServedInfo,
    StreamResponse,
    TgiErrorResponse,
)

TAGS = {
    "generation": "What the model writes, as OpenAI's API and vLLM's additions to it.",
    "embeddings": "What the model makes of texts, as vectors.",
    "messages": "What the model writes, as Anthropic's API.",
    "text generation": "What the model writes, as Hugging Face's text-generation-inference.",
    "models": "The served model, and its adapters.",
    "tokens": "Texts to token ids, and back.",
    "operation": "For who operates the server.",
}

ERROR_MODELS: Mapping[ErrorShape, type[ResponseModel]] = {
    OPENAI: ErrorResponse,
    MESSAGES: MessagesErrorResponse,
    TGI: TgiErrorResponse,
}

# Any request may be answered these; those of one that is not HTTP, too slow or too large come before it is routed.
ALWAYS = (400, 408, 431, 500)
_BODY = (404, 413, 415, 429, 503)


@dataclass(frozen=True)
class Operation:
    """One method of one path.

    Attributes:
        answer: the JSON of a 200; None when it is text, or a stream alone.
        event: the JSON of an event, where the answer can be a stream. named_events: events have names, their ``type``.
        done: ``[DONE]`` is the last event.
        bodies: what a request may be, one of these.
        examples: bodies by name, without ``model``.
        refusals: statuses it answers beside ``ALWAYS`` and, on a server with keys, 401.
        unavailable: the JSON of a 503. headers: that a 200 may have.
    """

    method: str
    path: str
    id: str
    tag: str
    summary: str
    answer: type[BaseModel] | None
    event: type[BaseModel] | None = None
    named_events: bool = False
    done: bool = True
    bodies: tuple[type[ApiModel], ...] = ()
    examples: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    refusals: tuple[int, ...] = ()
    unavailable: type[ResponseModel] = ErrorResponse
    headers: tuple[str, ...] = ()


_HELLO = [{"role": "user", "content": "Say hello."}]
_GREET: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "greet",
        "description": "Greet somebody.",
        "parameters": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
    },
}
_GREET_TOOL = {"name": "greet", "input_schema": _GREET["function"]["parameters"]}

OPERATIONS = (
    Operation(
        *("post", "/v1/completions", "createCompletion", "generation", "Continue one or more texts", Completion),
        event=CompletionChunk,
        bodies=(CompletionRequest,),
        examples={
            "text": {"prompt": "Once upon a time", "max_tokens": 8, "temperature": 0},
            "batch": {"prompt": ["One, two,", "Red, green,"], "n": 2, "max_tokens": 4, "seed": 7},
            "scored": {"prompt": "Once upon a time", "max_tokens": 0, "echo": True, "logprobs": 0},
            "stream": {
                **{"prompt": "Once upon a time", "max_tokens": 8, "stream": True},
                "stream_options": {"include_usage": True},
            },
        },
        refusals=(403, *_BODY),
    ),
    Operation(
        *("post", "/v1/chat/completions", "createChatCompletion", "generation", "Answer a conversation"),
        ChatCompletion,
        event=ChatCompletionChunk,
        bodies=(ChatCompletionRequest,),
        headers=("X-Llmctl-Warning",),
        examples={
            "chat": {"messages": _HELLO, "max_tokens": 8},
            "tools": {"messages": _HELLO, "tools": [_GREET], "max_tokens": 8},
            "logprobs": {"messages": _HELLO, "max_tokens": 4, "logprobs": True, "top_logprobs": 2},
            "stream": {
                **{"messages": _HELLO, "max_tokens": 8, "stream": True},
                "stream_options": {"include_usage": True},
            },
        },
        refusals=(403, *_BODY),
    ),
    Operation(
        *("post", "/v1/embeddings", "createEmbedding", "embeddings", "A vector for each of some texts", EmbeddingList),
        bodies=(EmbeddingRequest,),
        examples={
            "text": {"input": "Once upon a time"},
            "batch": {"input": ["One, two,", "Red, green,"], "encoding_format": "base64", "pooling": "mean"},
            "short": {"input": [5, 6, 7], "dimensions": 8},
        },
        refusals=(403, *_BODY),
    ),
    Operation(
        *("post", "/v1/responses", "createResponse", "generation", "Answer input items, as OpenAI's Responses API"),
        ResponseObject,
        event=ResponseStreamEvent,
        named_events=True,
        done=False,
        bodies=(ResponsesRequest,),
        headers=("X-Llmctl-Warning",),
        examples={
            "text": {"input": "Say hello.", "max_output_tokens": 8},
            "tools": {"input": _HELLO, "tools": [_GREET["function"] | {"type": "function"}], "max_output_tokens": 8},
            "logprobs": {
                **{"input": "Say hello.", "max_output_tokens": 4, "top_logprobs": 2},
                "include": ["message.output_text.logprobs"],
            },
            "stream": {"input": _HELLO, "instructions": "Be brief.", "max_output_tokens": 8, "stream": True},
        },
        refusals=(403, *_BODY),
    ),
    Operation(
        *("post", "/v1/messages", "createMessage", "messages", "Answer a conversation", MessagesResponse),
        event=MessagesEvent,
        named_events=True,
        done=False,
        bodies=(MessagesRequest,),
        headers=("X-Llmctl-Warning",),
        examples={
            "message": {"messages": _HELLO, "max_tokens": 8},
            "system": {"system": "Be brief.", "messages": _HELLO, "max_tokens": 8, "stop_sequences": ["."]},
            "tools": {"messages": _HELLO, "tools": [_GREET_TOOL], "tool_choice": {"type": "auto"}, "max_tokens": 8},
            "stream": {"messages": _HELLO, "max_tokens": 8, "stream": True},
        },
        refusals=(403, *_BODY),
    ),
    Operation(
        *("post", "/v1/messages/count_tokens", "countMessageTokens", "messages", "Tokens of a conversation's prompt"),
        TokenCount,
        bodies=(CountTokensRequest,),
        examples={"messages": {"messages": _HELLO}},
        refusals=_BODY,
    ),
    Operation(
        *("post", "/generate", "generate", "text generation", "Continue a text", GenerateResponse),
        bodies=(GenerateRequest,),
        examples={
            "text": {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 8}},
            "details": {
                "inputs": "Once upon a time",
                "parameters": {"max_new_tokens": 4, "details": True, "decoder_input_details": True, "top_n_tokens": 2},
            },
        },
        refusals=(403, *_BODY),
    ),
    Operation(
        *("post", "/generate_stream", "generateStream", "text generation", "Continue a text, as a stream", None),
        event=StreamResponse,
        done=False,
        bodies=(GenerateStreamRequest,),
        examples={"text": {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 8}, "stream": True}},
        refusals=(403, *_BODY),
    ),
    Operation(
        *("post", "/", "generateCompat", "text generation", "Continue a text", CompatGenerateResponse),
        event=StreamResponse,
        done=False,
        bodies=(CompatGenerateRequest,),
        examples={
            "text": {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 8}},
            "stream": {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 8}, "stream": True},
        },
        refusals=(403, *_BODY),
    ),
    Operation(
        *("get", "/info", "modelInfo", "text generation", "The served model and its limits", ServedInfo),
        refusals=(503,),
    ),
    Operation("get", "/v1/models", "listModels", "models", "List the served model and its adapters", ModelList),
    Operation(
        *("get", "/v1/models/{name}", "retrieveModel", "models", "The served model by its name", ModelCard),
        refusals=(404,),
    ),
    Operation(
        *("post", "/v1/load_lora_adapter", "loadAdapter", "models", "Offer a LoRA adapter below `--lora-dir`", None),
        bodies=(LoadAdapterRequest,),
        examples={"adapter": {"lora_name": "sql", "lora_path": "sql"}},
        refusals=(403, *_BODY),
    ),
    Operation(
        *("post", "/v1/unload_lora_adapter", "unloadAdapter", "models", "Offer a LoRA adapter no more", None),
        bodies=(UnloadAdapterRequest,),
        examples={"adapter": {"lora_name": "sql"}},
        refusals=(403, *_BODY),
    ),
    Operation(
        *("post", "/tokenize", "tokenize", "tokens", "Token ids of a text, or of a chat as its template renders it"),
        TokenizeResponse,
        bodies=(TokenizeRequest, TokenizeChatRequest),
        examples={
            "prompt": {"prompt": "Once upon a time", "return_token_strs": True},
            "messages": {"messages": _HELLO},
        },
        refusals=_BODY,
    ),
    Operation(
        *("post", "/detokenize", "detokenize", "tokens", "The text of token ids", DetokenizeResponse),
        bodies=(DetokenizeRequest,),
        examples={"tokens": {"tokens": [5, 6, 7]}},
        refusals=_BODY,
    ),
    Operation(
        *("get", "/tokenizer_info", "tokenizerInfo", "tokens", "The tokenizer's configuration", TokenizerInfo),
        refusals=(503,),
    ),
    Operation(
        *("get", "/health", "health", "operation", "Whether the server lives; also while its engine starts", Alive),
        refusals=(503,),
        unavailable=Dead,
    ),
    Operation(
        *("get", "/ready", "ready", "operation", "Whether a request would be served now", Ready),
        refusals=(503,),
        unavailable=NotReady,
    ),
    Operation("get", "/version", "version", "operation", "The version of llmctl", Version),
    Operation(
        *("get", "/requests", "listRequests", "operation", "What each unfinished request is doing", RunningRequests)
    ),
    Operation(
        *("get", "/engine", "engine", "operation", "The engine: graph, kernels, limits, memory", EngineDocument),
        refusals=(503,),
    ),
    Operation("get", "/metrics", "metrics", "operation", "Prometheus' text format", None),
)
