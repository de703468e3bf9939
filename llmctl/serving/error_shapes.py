"""Errors as JSON documents, in the shape of the API that a path belongs to: one table of paths.

The checks behind all APIs are the same, and name the fields of OpenAI's: a shape also knows what its API calls them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from llmctl.errors import LlmctlError


@dataclass(frozen=True, slots=True)
class Problem:
    """What goes into the document of an error. ``type`` and ``code`` are OpenAI's."""

    status: int
    message: str
    type: str
    param: str | None = None
    code: str | None = None


def problem_of(error: BaseException) -> Problem:
    """Any exception; of one that is not an ``LlmctlError`` no detail is shown to the client."""
    if isinstance(error, LlmctlError):
        return Problem(error.http_status, str(error), error.type, error.param, error.code)
    return Problem(500, "internal server error", "server_error", code="internal_error")


@dataclass(frozen=True, eq=False)
class ErrorShape:
    """How one API writes errors.

    Attributes:
        document: makes the document of a problem and the request's id.
        names: fields of requests, from their names here to the API's.
        id_header: the header that its clients look for the request's id in, beside ``X-Request-Id``.
    """

    document: Callable[[Problem, str], dict[str, Any]]
    names: Mapping[str, str] = field(default_factory=dict)
    id_header: str | None = None

    def body(self, problem: Problem, request_id: str = "") -> dict[str, Any]:
        """The document of a problem, with fields as the API calls them."""
        return self.document(self._renamed(problem), request_id)

    def headers(self, request_id: str) -> dict[str, str]:
        """Headers of every answer on the API's paths."""
        return {self.id_header: request_id} if self.id_header and request_id else {}

    def _renamed(self, problem: Problem) -> Problem:
        if not self.names:
            return problem
        # A message begins with its field; further inside only what can be no word of a sentence is a field's name.
        # In quotes it is a client's word.
        found = [rf"(?<![\w'.]){name}(?![\w'])" if "_" in name else rf"^{name}(?=[:.])" for name in self.names]
        message = re.sub("|".join(found), lambda match: self.names[match[0]], problem.message)
        param = problem.param
        return replace(problem, message=message, param=None if param is None else self.names.get(param, param))


def _openai(problem: Problem, _: str) -> dict[str, Any]:
    shown = {"message": problem.message, "type": problem.type, "param": problem.param, "code": problem.code}
    return {"error": shown}


_MESSAGES_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def _messages(problem: Problem, request_id: str) -> dict[str, Any]:
    type_ = _MESSAGES_TYPES.get(problem.status, "invalid_request_error" if problem.status < 500 else "api_error")
    return {
        "type": "error",
        "error": {"type": type_, "message": problem.message},
        "request_id": request_id or None,
    }


_TGI_TYPES = {401: "authentication", 403: "authentication", 429: "overloaded", 503: "overloaded"}


def _tgi(problem: Problem, _: str) -> dict[str, Any]:
    type_ = _TGI_TYPES.get(problem.status, "validation" if problem.status < 500 else "generation")
    return {"error": problem.message, "error_type": type_}


OPENAI = ErrorShape(_openai)
MESSAGES = ErrorShape(
    _messages,
    {
        "stop": "stop_sequences",
        "response_format": "output_config.format",
        "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
        "continue_final_message": "messages",
        "user": "metadata.user_id",
    },
    "Request-Id",
)
"""Anthropic's."""
TGI = ErrorShape(
    _tgi,
    {
        "prompt": "inputs",
        "max_tokens": "max_new_tokens",
        "n": "best_of",
        "logprobs": "top_n_tokens",
        "prompt_logprobs": "decoder_input_details",
        "guided_json": "grammar",
        "guided_regex": "grammar",
    },
)
SHAPES = {
    "/v1/messages": MESSAGES,
    "/generate": TGI,
    "/generate_stream": TGI,
    "/info": TGI,
    "/": TGI,
}
"""By path, with all that lies below it (nothing does below ``/``); any other is OpenAI's."""


def shape_of(path: str) -> ErrorShape:
    """The shape of errors on a path, be it an endpoint's or not, or empty where none is known."""
    below = (shape for at, shape in SHAPES.items() if path == at or (at != "/" and path.startswith(at + "/")))
    return next(below, OPENAI)
