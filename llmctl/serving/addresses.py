"""What else an endpoint may be called: other servers' paths, a slash too many, a prefix that a proxy left; and the
origins of pages that may use it."""

from __future__ import annotations

import json
import re

from starlette.types import ASGIApp, Receive, Scope, Send

from llmctl.errors import UsageError

ALIASES = {
    "/chat/completions": "/v1/chat/completions",
    "/completions": "/v1/completions",
    "/embeddings": "/v1/embeddings",
    "/messages": "/v1/messages",
    "/models": "/v1/models",
    "/ping": "/health",
    "/responses": "/v1/responses",
    "/v1/health": "/health",
}
"""Paths of vLLM, llama.cpp and SageMaker, and which endpoint each is."""


class Addresses:
    """Gives every request the path of the endpoint that it means, before anything looks at it.

    Args:
        root_path: what a proxy in front serves this server under, such as ``/llm``, whether it strips it or not.
    """

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self._app = app
        self._root = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (path := meant_path(scope["path"], self._root)) != scope["path"]:
            scope = {**scope, "path": path}
        await self._app(scope, receive, send)


def meant_path(path: str, root_path: str) -> str:
    """The path of the endpoint that a request's path means."""
    if root_path and path.startswith(root_path + "/"):
        path = path[len(root_path) :]
    path = path.rstrip("/") or "/"
    return ALIASES.get(path, path)


_ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/?#\s,]+")


def parse_origins(text: str) -> list[str]:
    """The origins of ``--allowed-origins``: comma-separated, or a JSON list, as vLLM has it.

    Raises:
        UsageError: none, or what is no origin.
    """
    try:
        found = json.loads(text) if text.lstrip().startswith("[") else [part.strip() for part in text.split(",")]
    except ValueError:
        found = []
    wrong = next((origin for origin in found if not isinstance(origin, str) or not _ORIGIN.fullmatch(origin)), None)
    if not found or wrong is not None:
        shown = repr(text if wrong is None else wrong)
        raise UsageError(
            f"--allowed-origins: expected origins such as https://example.com, or *, found {shown}",
            fix="scheme, host and port, without a path",
            param="allowed_origins",
        )
    return found
