"""Errors as HTTP answers, with the right status: in OpenAI's shape, or in that of the path's own API."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import Scope

from llmctl.errors import LlmctlError, RequestError
from llmctl.serving.error_shapes import OPENAI, Problem, problem_of, shape_of
from llmctl.serving.protocol import EXPECTED
from llmctl.serving.refused_fields import NOT_SUPPORTED

log = logging.getLogger("llmctl.serving")

RETRY_SOON = {"Retry-After": "1"}
"""Headers of an answer that the server is not ready."""

_MOST_NAME_SHOWN = 80  # characters; names of members are the client's

UNION_TAG = "="
"""Begins the tag of a model in a union. Tags stand in pydantic's paths to a problem, and are no part of the body's."""

_HTTP_CODES = {401: "invalid_api_key", 404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}


def body_of(error: BaseException) -> dict[str, Any]:
    """OpenAI's document for any exception."""
    return OPENAI.body(problem_of(error))


def status_of(error: BaseException) -> int:
    """HTTP status of any exception."""
    return error.http_status if isinstance(error, LlmctlError) else 500


def json_response(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON response encoded by msgspec."""
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")


def request_id_of(scope: Scope) -> str:
    """The request's id, as ``BoundedHttpProtocol`` has it; empty where another protocol brought it."""
    return str(scope.get("state", {}).get("request_id", ""))


def refusal(problem: Problem, scope: Scope, headers: Mapping[str, str] | None = None) -> Response:
    """The HTTP response that tells a problem of a request."""
    shape, name = shape_of(scope["path"]), request_id_of(scope)
    return json_response(shape.body(problem, name), problem.status, {**(headers or {}), **shape.headers(name)})


def error_response(error: BaseException, scope: Scope) -> Response:
    """The HTTP response for any exception; one that is for now says when to retry, as does a server not ready."""
    headers = None
    if isinstance(error, LlmctlError) and error.retry_after is not None:
        headers = {"Retry-After": str(error.retry_after)}
    elif status_of(error) == 503:
        headers = RETRY_SOON
    return refusal(problem_of(error), scope, headers)


def from_validation_error(
    error: ValidationError, expected: Mapping[str, str] = EXPECTED, indices: Sequence[int] = ()
) -> RequestError:
    """One clear RequestError out of pydantic's list: the field, what was expected, what was found.

    Args:
        expected: of fields that are unions, what they accept. indices: in place of the first ones in the path.
    """
    made = problem_told(error, expected, indices)
    assert made is not None
    return made


def problem_told(
    error: ValidationError,
    expected: Mapping[str, str],
    indices: Sequence[int] = (),
    counts: Callable[[ErrorDetails], bool] = lambda _: True,
) -> RequestError | None:
    """The same of the first problem that ``counts``; None: there is none."""
    # What was found is made into objects of Python, be it the whole body: only where it is told.
    problems = error.errors(include_url=False, include_input=False)
    place = next((index for index, problem in enumerate(problems) if counts(problem)), None)
    if place is None:
        return None
    first = problems[place]
    if first["type"] == "json_invalid":
        return RequestError(f"the request body is not valid JSON: {first['ctx']['error']}")
    param = str(first["loc"][0]) if first["loc"] else None
    if param is None:
        return RequestError(f"the request body: {first['msg']}")
    if param in expected and first["type"] != "missing":
        return RequestError(f"{param}: expected {expected[param]}", param=param)
    if first["type"] not in _TELL_ALL and first.get("ctx", {}).get("field_type") not in _KINDS:
        first = error.errors(include_url=False)[place]
    given = iter(indices)
    places = (next(given, place) if isinstance(place, int) else place for place in first["loc"])
    path = ".".join(part[:_MOST_NAME_SHOWN] for part in map(str, places) if not part.startswith(UNION_TAG))
    return RequestError(f"{path}: {_said(first)}", param=param)


_KINDS = {"List": "list", "Dictionary": "dict"}
"""What pydantic calls that of which there is too much or too little."""
_TELL_ALL = ("missing", "not_number", NOT_SUPPORTED, "union_tag_invalid")
"""Types of problems whose message and context say what was found."""


def _said(problem: ErrorDetails) -> str:
    """What was expected and what was found; of a word that is none of some, the word."""
    kind = problem["type"]
    if kind == "union_tag_invalid":
        return f"expected type {problem['ctx']['expected_tags']}, found '{problem['ctx']['tag'][:40]}'"
    if kind in _TELL_ALL:
        return problem["msg"]
    if "input" not in problem:
        return f"{problem['msg']}, found {_KINDS[problem['ctx']['field_type']]}"
    found = problem["input"]
    named = kind == "literal_error" and isinstance(found, str)
    return f"{problem['msg']}, found {repr(found[:40]) if named else type(found).__name__}"


def _methods(request: Request, known: str) -> list[str]:
    """What a path answers, by all its routes, and those that are ``known``."""
    routes = [route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE]
    return sorted({*filter(None, known.split(", ")), *(m for route in routes for m in getattr(route, "methods", ()))})


def install_handlers(app: Starlette) -> None:
    """Make every error of ``app`` answer in the shape of its path."""

    async def on_llmctl_error(request: Request, error: Exception) -> Response:
        return error_response(error, request.scope)

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = {
            404: f"no such endpoint: {request.method} {request.url.path}",
            405: f"{request.url.path} does not answer {request.method}",
        }.get(error.status_code, str(error.detail))
        code = _HTTP_CODES.get(error.status_code)
        problem = Problem(error.status_code, message, "invalid_request_error", code=code)
        headers = {**(error.headers or {})}
        if error.status_code == 405:  # whose first route knows only its own
            headers["Allow"] = ", ".join(_methods(request, headers.get("Allow", "")))
        return refusal(problem, request.scope, headers)

    async def on_client_gone(request: Request, __: Exception) -> Response:
        # In the middle of its body: nobody reads the answer, and it is no fault of ours that the log should tell.
        return error_response(RequestError("the client closed the connection"), request.scope)

    async def on_bug(request: Request, error: Exception) -> Response:
        name = request_id_of(request.scope) or "without an id"
        log.error("%s %s failed, request %s", request.method, request.url.path, name, exc_info=error)
        return error_response(error, request.scope)

    app.add_exception_handler(LlmctlError, on_llmctl_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(ClientDisconnect, on_client_gone)
    app.add_exception_handler(Exception, on_bug)
