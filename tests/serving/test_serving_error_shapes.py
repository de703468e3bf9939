"""Errors on the paths of other APIs: their shapes, their words for fields, and one table that says whose a path is."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llmctl.errors import (
    CapacityError,
    LlmctlError,
    ModelNotFoundError,
    NotReadyError,
    PermissionDeniedError,
    QueueFullError,
    RequestError,
)
from llmctl.serving.error_shapes import MESSAGES, OPENAI, SHAPES, TGI, Problem, problem_of, shape_of
from llmctl.serving.middleware import BodyTooLargeError
from llmctl.serving.openai_errors import error_response
from llmctl.serving.operations import ERROR_MODELS

ERRORS: list[tuple[Exception, str, str]] = [
    (RequestError("x"), "invalid_request_error", "validation"),
    (PermissionDeniedError("x"), "permission_error", "authentication"),
    (ModelNotFoundError("x"), "not_found_error", "validation"),
    (BodyTooLargeError("x"), "request_too_large", "validation"),
    (QueueFullError("x"), "rate_limit_error", "overloaded"),
    (NotReadyError("x"), "overloaded_error", "overloaded"),
    (LlmctlError("x"), "api_error", "generation"),
    (ValueError("a secret"), "api_error", "generation"),
]


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        *(("/v1/messages", MESSAGES), ("/v1/messages/count_tokens", MESSAGES), ("/v1/messages/batches/x", MESSAGES)),
        *(("/v1/messages/", MESSAGES), ("/v1/messagesx", OPENAI), ("/v1/chat/completions", OPENAI), ("", OPENAI)),
        *(
            ("/", TGI),
            ("//v1/completions", OPENAI),
            ("/generate", TGI),
            ("/generate_stream", TGI),
            ("/generated", OPENAI),
            ("/x", OPENAI),
        ),
    ],
)
def test_a_path_and_what_lies_below_it(path: str, shape: Any) -> None:
    assert shape_of(path) is shape


@pytest.mark.parametrize(("error", "messages", "tgi"), ERRORS, ids=lambda v: type(v).__name__)
def test_errors_have_the_words_of_their_api(error: Exception, messages: str, tgi: str) -> None:
    scope = {"path": "/v1/messages", "state": {"request_id": "mine"}}
    answer = error_response(error, scope)
    document = json.loads(answer.body)
    ERROR_MODELS[MESSAGES].model_validate(document)
    assert (document["error"]["type"], document["request_id"]) == (messages, "mine")
    assert answer.headers["Request-Id"] == "mine"
    assert answer.status_code == problem_of(error).status
    other = error_response(error, {"path": "/generate"})
    ERROR_MODELS[TGI].model_validate_json(other.body)
    assert json.loads(other.body)["error_type"] == tgi
    assert "Request-Id" not in other.headers
    assert (answer.headers.get("Retry-After") is None) == (answer.status_code not in (429, 503))
    assert b"secret" not in answer.body + other.body


@pytest.mark.parametrize(
    ("shape", "error", "said"),
    [
        (MESSAGES, RequestError("stop: expected non-empty strings", param="stop"), "stop_sequences: expected non-"),
        (
            MESSAGES,
            RequestError("expected one description of the output, found response_format and tool_choice"),
            "found output_config.format and tool_choice",
        ),
        (MESSAGES, RequestError("a word: stop: or stop"), "a word: stop: or stop"),
        (MESSAGES, RequestError("no tool 'response_format'"), "no tool 'response_format'"),
        (
            TGI,
            CapacityError("5 were requested", fix="shorten the prompt or lower max_tokens", param="max_tokens"),
            "(shorten the prompt or lower max_new_tokens)",
        ),
        (TGI, RequestError("n: expected at least 1", param="n"), "best_of: expected at least 1"),
        (OPENAI, RequestError("stop: expected non-empty strings", param="stop"), "stop: expected"),
    ],
)
def test_fields_are_called_as_the_api_calls_them(shape: Any, error: LlmctlError, said: str) -> None:
    assert said in json.dumps(shape.body(problem_of(error)))


def test_the_field_at_fault_is_renamed_too() -> None:
    seen: list[Problem] = []

    def keep(problem: Problem, _: str) -> dict[str, Any]:
        seen.append(problem)
        return {}

    shape = type(TGI)(keep, TGI.names)
    shape.body(Problem(400, "x", "y", "max_tokens"))
    shape.body(Problem(400, "x", "y", "seed"))
    assert [problem.param for problem in seen] == ["max_new_tokens", "seed"]


def test_no_row_is_shadowed() -> None:
    assert all(shape_of(path) is shape for path, shape in SHAPES.items())
