"""HTTP requests as Prometheus series, under the names of prometheus-fastapi-instrumentator, which vLLM shows.

That library's middleware is not used: it puts a coroutine around each chunk of a stream, where a function is enough,
and it matches every request's path against the routes a second time.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Summary
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmctl.serving.histogram import Histogram

UNKNOWN_PATH = "none"
OTHER_METHOD = "other"
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "CONNECT", "TRACE"})
UNCOUNTED = frozenset({"/health", "/ready", "/version", "/metrics"})
"""What probes and scrapes ask for, as in vLLM."""

_BUCKETS = (0.1, 0.5, 1.0)
_FINE_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 7.5, 10.0, 30.0, 60.0,
)  # fmt: skip


class HttpSeries:
    """The series of all HTTP requests, without the server's prefix, as vLLM has them.

    ``handler`` is a route's template or ``none``, ``method`` a known one or ``other``, ``status`` its hundred, such as
    ``2xx``: clients cannot make label values.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "http_requests", "Requests answered.", ("method", "status", "handler"), registry=registry
        )
        self._request_bytes = Summary(
            "http_request_size_bytes", "Content-Length of requests; 0 without one.", ("handler",), registry=registry
        )
        self._response_bytes = Summary(
            "http_response_size_bytes",
            "Content-Length of responses; 0 without one, such as a stream.",
            ("handler",),
            registry=registry,
        )
        self._seconds = Histogram(
            "http_request_duration_seconds", "Request to end of response.", _BUCKETS, ("method", "handler"), registry
        )
        self._all_seconds = Histogram(
            "http_request_duration_highr_seconds",
            "Request to end of response, all routes.",
            _FINE_BUCKETS,
            (),
            registry,
        ).labels()

    def count(
        self, method: str, handler: str, status: int, seconds: float, request_bytes: int, response_bytes: int
    ) -> None:
        """Count one request."""
        method = method if method in METHODS else OTHER_METHOD
        self._requests.labels(method, f"{status // 100}xx", handler).inc()
        self._request_bytes.labels(handler).observe(request_bytes)
        self._response_bytes.labels(handler).observe(response_bytes)
        self._seconds.labels(method, handler).observe(seconds)
        self._all_seconds.observe(seconds)


class HttpMetrics:
    """Counts every request but those of ``UNCOUNTED``; one that ends with an exception and no response is a 500.

    Args:
        routes: what requests are matched with that a gate refused before they were routed.
    """

    def __init__(self, app: ASGIApp, series: HttpSeries, routes: Sequence[BaseRoute]) -> None:
        self._app = app
        self._series = series
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        start: Message = {"status": 500, "headers": ()}

        def watched(message: Message) -> Awaitable[None]:  # not a coroutine: it is called for every chunk of a stream
            nonlocal start
            if message["type"] == "http.response.start":
                start = message
            return send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            handler = self._template(scope)
            if handler not in UNCOUNTED:
                self._series.count(
                    scope["method"],
                    handler,
                    start["status"],
                    time.perf_counter() - began,
                    _content_length(scope["headers"]),
                    _content_length(start.get("headers", ())),
                )

    def _template(self, scope: Scope) -> str:
        """The path of the route that took a request, or would have."""
        route = scope.get("route")
        if route is None:
            route = next((r for r in self._routes if r.matches(scope)[0] is not Match.NONE), None)
        return str(getattr(route, "path", UNKNOWN_PATH))


def _content_length(headers: Iterable[tuple[bytes, bytes]]) -> int:
    value = next((value for name, value in headers if name == b"content-length"), b"")
    return int(value) if value.isdigit() else 0
