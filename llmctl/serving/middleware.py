"""Pure ASGI gates in front of every endpoint: the API key, the content type, and the size of a request body.

Starlette's ``BaseHTTPMiddleware`` is avoided: it wraps the response stream in a task of its own and hides disconnects.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmctl.errors import RequestError
from llmctl.serving.addresses import meant_path
from llmctl.serving.error_shapes import Problem
from llmctl.serving.keys import KEY_SCOPE, ServerKeys
from llmctl.serving.openai_errors import error_response, refusal

LIVENESS_PATHS = frozenset({"/health", "/ready"})


_NO_KEY = Problem(
    401,
    "missing or wrong API key: send 'Authorization: Bearer <key>' or 'X-Api-Key: <key>'",
    "authentication_error",
    code="invalid_api_key",
)


def asks_for_liveness(said: bytes, root_path: str) -> bool:
    """Whether the first bytes of a connection ask for one of ``LIVENESS_PATHS``."""
    method, _, rest = said.partition(b" ")
    if method not in (b"GET", b"HEAD"):
        return False
    path = rest.partition(b" ")[0].partition(b"?")[0]
    return meant_path(path.decode("latin-1"), root_path) in LIVENESS_PATHS


class BodyTooLargeError(RequestError):
    """The client sent more than the limit."""

    http_status = 413
    code = "request_too_large"


class UnsupportedMediaTypeError(RequestError):
    """A POST body that is not declared to be JSON."""

    http_status = 415
    code = "unsupported_media_type"


class ApiKeyGate:
    """Refuses every request without a known key, but those to the liveness paths and those that read a path of
    ``public``. No keys: everything passes.
    """

    def __init__(self, app: ASGIApp, keys: ServerKeys, public: frozenset[str] = frozenset()) -> None:
        self._app = app
        self._keys = keys
        self._public = public

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._keys or self._is_open(scope) or self._allowed(scope):
            await self._app(scope, receive, send)
            return
        response = refusal(_NO_KEY, scope, {"WWW-Authenticate": "Bearer"})
        await response(scope, receive, send)

    def _is_open(self, scope: Scope) -> bool:
        path = scope["path"]
        # The page's path is also one that generates, by POST.
        return path in LIVENESS_PATHS or (path in self._public and scope["method"] in ("GET", "HEAD"))

    def _allowed(self, scope: Scope) -> bool:
        found = [self._keys.find(token) for token in _tokens(scope)]
        scope[KEY_SCOPE] = next((key for key in found if key is not None), None)
        return scope[KEY_SCOPE] is not None


def _tokens(scope: Scope) -> Iterator[bytes]:
    """What a request says its key is: clients that always send a Bearer token may have the key in the other header.

    A header that comes twice says nothing: a proxy in front may have looked at the other one.
    """
    names = Counter(name for name, _ in scope["headers"])
    for name, value in scope["headers"]:
        if names[name] > 1:
            continue
        words = value.split()  # of a key with white space no log would be cleared
        if name == b"authorization" and len(words) == 2 and words[0].lower() == b"bearer":
            yield words[1]
        elif name == b"x-api-key" and len(words) == 1:
            yield words[0]


class BodyGate:
    """Refuses bodies POSTed to ``paths`` that are not JSON (415) or are larger than ``max_bytes()`` (413).

    Other paths read no body: what they answer to POST, 404 or 405, is the router's.
    """

    def __init__(self, app: ASGIApp, max_bytes: Callable[[], int], paths: frozenset[str]) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in self._paths:
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if headers.get(b"content-type", b"").split(b";")[0].strip().lower() != b"application/json":
            # Browsers can send other types across origins without asking; a local server must not act on those.
            error = UnsupportedMediaTypeError("expected Content-Type: application/json")
            await error_response(error, scope)(scope, receive, send)
            return
        length = headers.get(b"content-length", b"")
        limit = self._max_bytes()
        if length.isdigit() and int(length) > limit:
            await error_response(_too_large(limit), scope)(scope, receive, send)
            return
        await self._app(scope, _limited(receive, limit), send)


def _limited(receive: Receive, limit: int) -> Receive:
    received = 0

    async def limited_receive() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > limit:
            raise _too_large(limit)
        return message

    return limited_receive


def _too_large(limit: int) -> BodyTooLargeError:
    return BodyTooLargeError(
        f"the request body is larger than the limit of {limit} bytes", fix="start the server with a larger --max-body"
    )
