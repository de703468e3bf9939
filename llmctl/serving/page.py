"""The page at ``/`` and ``/docs``: the files of ``ui/``, read once, under headers that let nothing else run in it.

The files are the same on every server and say nothing of this one, so they need no key: the page asks for it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

FOLDER = Path(__file__).with_name("ui")
SHELL = "index.html"
SHELL_PATHS = ("/", "/docs")
"""Which of its views the page begins with is up to its path."""
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "base-uri 'none'",
        "frame-ancestors 'none'",
        "form-action 'none'",
    )
)
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # kept, and asked about by its ETag: an upgraded server has its new page at once
}


@dataclass(frozen=True)
class PageFile:
    """One file of the page. ``etag``: of its content."""

    body: bytes
    content_type: str
    etag: str

    @classmethod
    def read(cls, path: Path) -> PageFile:
        """The file at ``path``, whose suffix says what it is."""
        body = path.read_bytes()
        return cls(body, _TYPES[path.suffix], f'"{hashlib.sha256(body).hexdigest()[:32]}"')

    def response(self, request: Request) -> Response:
        """The file, or 304 to who has it."""
        headers = {**_HEADERS, "ETag": self.etag}
        held = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        if self.etag in held or held == ["*"]:
            return Response(status_code=304, headers=headers)
        return Response(self.body, headers={**headers, "Content-Type": self.content_type})


class Page:
    """All files of the page.

    Attributes:
        routes: what serves them. paths: every path that is one of them.
    """

    def __init__(self, folder: Path = FOLDER) -> None:
        self._files = {path.name: PageFile.read(path) for path in sorted(folder.iterdir()) if path.suffix in _TYPES}
        self.routes = [
            *(Route(path, self._shell, methods=["GET"], include_in_schema=False) for path in SHELL_PATHS),
            Route("/ui/{name}", self._file, methods=["GET"], include_in_schema=False),
        ]
        self.paths = frozenset((*SHELL_PATHS, *(f"/ui/{name}" for name in self._files)))

    async def _shell(self, request: Request) -> Response:
        given = request.scope.get("raw_path", b"")
        if given.endswith(b"/docs/"):  # the page's own addresses are relative
            return RedirectResponse("../docs", headers=_HEADERS)
        return self._files[SHELL].response(request)

    async def _file(self, request: Request) -> Response:
        file = self._files.get(request.path_params["name"])
        if file is None:
            raise HTTPException(404)
        return file.response(request)
