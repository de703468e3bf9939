"""The OpenAPI document of one server, put together once from ``operations`` and the models that they name.

One made of types alone would know neither streams nor what the gates and the HTTP protocol answer.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, models_json_schema
from pydantic_core import core_schema

from llmctl import __version__
from llmctl.engine.sampling_params import RANGES, Range
from llmctl.serving.addresses import ALIASES
from llmctl.serving.error_shapes import OPENAI, SHAPES, ErrorShape, shape_of
from llmctl.serving.middleware import LIVENESS_PATHS
from llmctl.serving.operations import ALWAYS, ERROR_MODELS, OPERATIONS, TAGS, Operation
from llmctl.serving.protocol import MAX_PROMPT_LOGPROBS, SamplingFields
from llmctl.serving.response_schema import ErrorResponse

_ALIASES = "; ".join(f"`{path}` is `{meant}`" for path, meant in ALIASES.items())
_DESCRIPTION = f"""\
An OpenAI-compatible server for one model.

A path answers other methods than those described here with 405 and `Allow`, but HEAD wherever GET is described; other
paths answer 404. Integers are written without a fraction: `5.0` is refused. Of a name that an object repeats, the last
value counts. Fields that are not described are ignored.

`GET /` and `GET /docs` are a page for people, unless the server has `--no-ui`.

A slash at the end of a path is passed over, and some endpoints have further paths, as on other servers:
{_ALIASES}.

Beyond what the schemas say, 400 is the answer to

* what does not fit the model: its context length, the ids of its vocabulary, and the `dimensions` of its embeddings;
* a prompt or an input without a token, or more sequences (inputs, or prompts times `n`) than the queue holds;
* a description of the output that cannot be compiled, is given twice (`response_format` and the fields that other
  servers have for it are one thing), or says nothing;
* messages that the chat template refuses, a `chat_template` on a server without `--trust-request-chat-template`, an
  empty last message with `continue_final_message`, a message without `content` that is not the assistant's, or
  `arguments` of its calls that are not a JSON object;
* fields that disagree: `min_tokens` above `max_tokens`, `best_of` other than `n`, `stream_options` without `stream`,
  `top_logprobs` without `logprobs`, `continue_final_message` with `add_generation_prompt`, `prompt_logprobs` with
  `stream`, `tool_choice` without `tools` or for one that is not there, `functions` beside `tools`;
* the same of `/v1/responses`, whose `input` items are messages and calls;
* of messages as Anthropic's API has them: a last turn of the assistant that does not end in text, a block that is none
  of its message's role, a `tool_result` for no `tool_use` before it;
* of TGI's parameters: `best_of` without sampling or in a stream, `decoder_input_details` in a stream, `top_n_tokens`
  without `details` where there is no stream;
* more than {MAX_PROMPT_LOGPROBS} log-probabilities of prompts in one answer;
* a `priority` or a `deadline` on a server with `--scheduling-policy fcfs`, `bad_words` that are nothing but white
  space, and JSON that is too deep (about 200 levels).
"""
_MAX_TOKENS = Range(-1)
_RANGES = RANGES | {
    "max_tokens": _MAX_TOKENS,
    "best_of": RANGES["n"],
    "top_logprobs": RANGES["logprobs"],
    "max_completion_tokens": _MAX_TOKENS,
    "max_output_tokens": _MAX_TOKENS,
}
_ERRORS = {
    400: (
        "BadRequest",
        "Malformed, or never to be served: `param` names the field, the message what was expected.",
    ),
    401: ("Unauthorized", "No API key of this server's."),
    403: ("Forbidden", "This API key may not set `priority` or `deadline`."),
    404: ("NotFound", "Not the served model's name."),
    405: ("MethodNotAllowed", "Another method than those described."),
    408: ("RequestTimeout", "The request's headers or body came too slowly."),
    413: ("ContentTooLarge", "The body is larger than `--max-body`."),
    415: ("UnsupportedMediaType", "The body is not declared to be `application/json`."),
    429: ("TooManyRequests", "Too many requests wait; with `--shed`, too many for this one's deadline."),
    431: ("HeadersTooLarge", "More than 64 KiB of headers."),
    500: ("InternalError", "A fault of the server's, or a request that ended two of its workers."),
    503: ("Unavailable", "The engine is starting, restarting, draining or dead."),
}
_ERROR_HEADERS = {401: ("WWW-Authenticate",), 405: ("Allow",), 429: ("Retry-After",), 503: ("Retry-After",)}
_HEADERS = {
    "X-Request-Id": ("The request's own `X-Request-Id`, or a new one.", {"type": "string", "minLength": 1}),
    "Request-Id": ("The same, where Anthropic's clients look for it.", {"type": "string", "minLength": 1}),
    "X-Llmctl-Warning": (
        "What was asked for and is without effect, as `tools` that the chat template does not show to the model.",
        {"type": "string"},
    ),
    "Retry-After": ("Seconds until it is worth another try.", {"type": "integer", "minimum": 1}),
    "WWW-Authenticate": ("How to authenticate.", {"type": "string", "const": "Bearer"}),
    "Allow": ("The path's methods.", {"type": "string"}),
}
_REQUEST_ID = {
    "name": "X-Request-Id",
    "in": "header",
    "description": "Comes back with the answer, if it is 1 to 128 visible ASCII characters.",
    "schema": {"type": "string"},
}


def describe(model_name: str, *, with_keys: bool, root_path: str = "") -> dict[str, Any]:
    """The document of a server that serves ``model_name``, with API keys or without, under a proxy's ``root_path``."""
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        guarded = with_keys and operation.path not in LIVENESS_PATHS
        paths.setdefault(operation.path, {})[operation.method] = _described(operation, model_name, guarded, with_keys)
    document: dict[str, Any] = {
        "openapi": "3.2.0",  # the first in which a stream's events can be described
        "info": {"title": "llmctl", "version": __version__, "description": _DESCRIPTION},
        "tags": [{"name": name, "description": text} for name, text in TAGS.items()],
        "paths": paths,
        "components": {
            "schemas": _schemas(OPERATIONS),
            "responses": {
                _error_name(shape, status): _error(shape, status)
                for shape in (OPENAI, *dict.fromkeys(SHAPES.values()))
                for status in _ERRORS
                if (with_keys or status != 401) and (shape is OPENAI or status != 431)
            },
            "headers": {
                name: {"description": text, "required": name != "X-Llmctl-Warning", "schema": schema}
                for name, (text, schema) in _HEADERS.items()
            },
            "parameters": {"RequestId": _REQUEST_ID},
        },
    }
    if root_path:
        document["servers"] = [{"url": root_path}]
    if with_keys:
        document["components"]["securitySchemes"] = {
            "apiKey": {
                "type": "http",
                "scheme": "bearer",
                "description": "One of the keys of `--api-key`, `--priority-keys` or `--api-key-file`.",
            },
            "apiKeyHeader": {"type": "apiKey", "in": "header", "name": "X-Api-Key", "description": "The same."},
        }
        document["security"] = [{"apiKey": []}, {"apiKeyHeader": []}]
    return document


def _described(operation: Operation, model_name: str, guarded: bool, with_keys: bool) -> dict[str, Any]:
    parameters: list[Any] = [{"$ref": "#/components/parameters/RequestId"}]
    if "{name}" in operation.path:
        parameters.append(
            {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}, "example": model_name}
        )
    made: dict[str, Any] = {
        "operationId": operation.id,
        "tags": [operation.tag],
        "summary": operation.summary,
        "parameters": parameters,
        "responses": _responses(operation, guarded),
    }
    if operation.bodies:
        made["requestBody"] = _request_body(operation, model_name)
    if with_keys and not guarded:
        made["security"] = []
    return made


def _request_body(operation: Operation, model_name: str) -> dict[str, Any]:
    schemas = [_ref(model) for model in operation.bodies]
    content = {
        "schema": schemas[0] if len(schemas) == 1 else {"oneOf": schemas},
        "examples": {name: {"value": {"model": model_name, **body}} for name, body in operation.examples.items()},
    }
    return {"required": True, "content": {"application/json": content}}


def _responses(operation: Operation, guarded: bool) -> dict[str, Any]:
    statuses = {*ALWAYS, *operation.refusals, *((401,) if guarded else ())}
    shape = shape_of(operation.path)
    more = (*operation.headers, *_id_headers(shape))
    responses = {"200": _response("What was asked for.", _content(operation), more=more)}
    for status in sorted(statuses):
        name = _error_name(OPENAI if status == 431 else shape, status)  # with such headers, no path is known yet
        responses[str(status)] = {"$ref": f"#/components/responses/{name}"}
        if status == 503 and operation.unavailable is not ErrorResponse:
            content = {"application/json": {"schema": _ref(operation.unavailable)}}
            responses["503"] = _response(_ERRORS[status][1], content, 503)
    return responses


def _content(operation: Operation) -> dict[str, Any]:
    if operation.answer is None and operation.event is None:
        return {"text/plain": {"schema": {"type": "string"}}}
    content = {}
    if operation.answer is not None:
        content["application/json"] = {"schema": _ref(operation.answer)}
    if operation.event is not None:
        content["text/event-stream"] = {"itemSchema": _event(operation, operation.event)}
    return content


def _event(operation: Operation, model: type[BaseModel]) -> dict[str, Any]:
    said = "Comments while the first token takes its time. An error after the status line is an event"
    data: dict[str, Any] = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [_ref(model), _ref(ERROR_MODELS[shape_of(operation.path)])]},
    }
    if operation.done:
        said += "; `[DONE]` is always the last"
        data = {"anyOf": [{"const": "[DONE]"}, data]}
    properties = {"data": data}
    if operation.named_events:
        properties["event"] = {"type": "string", "description": "The `type` of the data."}
    return {
        "description": f"{'With `stream`. ' if operation.answer else ''}{said}.",
        "type": "object",
        "properties": properties,
        "required": list(properties),
    }


def _error_name(shape: ErrorShape, status: int) -> str:
    return ERROR_MODELS[shape].__name__.removesuffix("ErrorResponse") + _ERRORS[status][0]


def _error(shape: ErrorShape, status: int) -> dict[str, Any]:
    content = {"application/json": {"schema": _ref(ERROR_MODELS[shape])}}
    return _response(_ERRORS[status][1], content, status, more=_id_headers(shape))


def _id_headers(shape: ErrorShape) -> tuple[str, ...]:
    return () if shape.id_header is None else (shape.id_header,)


def _response(text: str, content: dict[str, Any], status: int = 200, more: tuple[str, ...] = ()) -> dict[str, Any]:
    headers = ("X-Request-Id", *_ERROR_HEADERS.get(status, ()), *more)
    return {
        "description": text,
        "headers": {name: {"$ref": f"#/components/headers/{name}"} for name in headers},
        "content": content,
    }


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}


class _Schemas(GenerateJsonSchema):
    """pydantic's schemas without what says nothing: a title that is the field's name, a default of null."""

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> dict[str, Any]:
        """Part of ``GenerateJsonSchema``."""
        if schema.get("default") is None:
            return self.generate_inner(schema["schema"])
        return super().default_schema(schema)

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002
        """Part of ``GenerateJsonSchema``."""
        return False


def _schemas(operations: Iterable[Operation]) -> dict[str, Any]:
    asked = {model: None for operation in operations for model in operation.bodies}
    answered = {
        model: None
        for operation in operations
        for model in (operation.answer, operation.event, operation.unavailable, ERROR_MODELS[shape_of(operation.path)])
        if model is not None
    }
    _, made = models_json_schema(
        [(model, "validation") for model in (*asked, *answered)],
        ref_template="#/components/schemas/{model}",
        schema_generator=_Schemas,
    )
    schemas: dict[str, Any] = made["$defs"]
    for model in asked:
        if issubclass(model, SamplingFields):
            for name, allowed in _RANGES.items():
                if name in model.model_fields:
                    _bound(schemas[model.__name__]["properties"][name], allowed)
    return schemas


def _bound(schema: dict[str, Any], allowed: Range) -> None:
    """Add a range to the schema of a field that is a number, or null; one that is always refused has none."""
    for number in schema.get("anyOf", ()):
        if number["type"] in ("integer", "number"):
            number["exclusiveMinimum" if allowed.open_low else "minimum"] = allowed.low
            if math.isfinite(allowed.high):
                number["maximum"] = allowed.high
            elif number["type"] == "number":
                number["maximum"] = sys.float_info.max
