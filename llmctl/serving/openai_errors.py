"""Errors in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}`` with the right HTTP status."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from llmctl.errors import LlmctlError, RequestError

log = logging.getLogger("llmctl.serving")

RETRY_SOON = {"Retry-After": "1"}
"""Headers of an answer that the server is not ready."""

_PROMPTS = "a string, a list of token ids (integers >= 0), or a list of either"
# A union fails with one problem per alternative; these say what the field accepts in one phrase.
_UNIONS = {
    "prompt": _PROMPTS,
    "EmbeddingRequest.input": _PROMPTS,
    "stop": "a string or a list of strings",
    "tool_choice": "'none', 'auto', 'required' or an object naming a function",
}

# Problems whose messages say what was found.
_SAID_WHOLE = ("missing", "not_number", "not_supported")

_MOST_NAME_SHOWN = 80  # characters; names of members are the client's

UNION_TAG = "="
"""Begins the tag of a model in a union. Tags stand in pydantic's paths to a problem, and are no part of the body's."""

_HTTP_CODES = {401: "invalid_api_key", 404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}


def error_body(message: str, *, type_: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The JSON document of one error."""
    return {"error": {"message": message, "type": type_, "param": param, "code": code}}


def body_of(error: BaseException) -> dict[str, Any]:
    """The document for any exception; what is not an ``LlmctlError`` shows no detail to the client."""
    if isinstance(error, LlmctlError):
        return error_body(str(error), type_=error.type, param=error.param, code=error.code)
    return error_body("internal server error", type_="server_error", code="internal_error")


def status_of(error: BaseException) -> int:
    """HTTP status of any exception."""
    return error.http_status if isinstance(error, LlmctlError) else 500


def json_response(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON response encoded by msgspec."""
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")


def error_response(error: BaseException) -> Response:
    """The HTTP response for any exception; one that is for now says when to retry, as does a server not ready."""
    headers = None
    if isinstance(error, LlmctlError) and error.retry_after is not None:
        headers = {"Retry-After": str(error.retry_after)}
    elif status_of(error) == 503:
        headers = RETRY_SOON
    return json_response(body_of(error), status_of(error), headers)


def from_validation_error(error: ValidationError) -> RequestError:
    """One clear RequestError out of pydantic's list: the field, what was expected, what was found."""
    problems = error.errors(include_url=False)
    first = problems[0]
    if first["type"] == "json_invalid":
        return RequestError(f"the request body is not valid JSON: {first['ctx']['error']}")
    param = str(first["loc"][0]) if first["loc"] else None
    if param is None:
        return RequestError(f"the request body: {first['msg']}")
    union = _UNIONS.get(param) or _UNIONS.get(f"{error.title}.{param}")
    if union is not None and first["type"] != "missing":
        return RequestError(f"{param}: expected {union}", param=param)
    path = ".".join(part[:_MOST_NAME_SHOWN] for part in map(str, first["loc"]) if not part.startswith(UNION_TAG))
    found = "" if first["type"] in _SAID_WHOLE else f", found {type(first['input']).__name__}"
    return RequestError(f"{path}: {first['msg']}{found}", param=param)


def install_handlers(app: FastAPI) -> None:
    """Make every error of ``app`` answer in OpenAI's shape."""

    async def on_llmctl_error(_: Request, error: Exception) -> Response:
        return error_response(error)

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = {
            404: f"no such endpoint: {request.method} {request.url.path}",
            405: f"{request.url.path} does not answer {request.method}",
        }.get(error.status_code, str(error.detail))
        body = error_body(message, type_="invalid_request_error", code=_HTTP_CODES.get(error.status_code))
        return json_response(body, error.status_code, error.headers)

    async def on_client_gone(_: Request, __: Exception) -> Response:
        # In the middle of its body: nobody reads the answer, and it is no fault of ours that the log should tell.
        return error_response(RequestError("the client closed the connection"))

    async def on_bug(request: Request, error: Exception) -> Response:
        name = getattr(request.state, "request_id", "without an id")
        log.error("%s %s failed, request %s", request.method, request.url.path, name, exc_info=error)
        return error_response(error)

    app.add_exception_handler(LlmctlError, on_llmctl_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(ClientDisconnect, on_client_gone)
    app.add_exception_handler(Exception, on_bug)
