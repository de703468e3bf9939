"""HTTP series: what is counted under which labels, and that nothing but a function stands between chunks and socket."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from llmctl.config import ServeConfig
from llmctl.errors import RequestError
from llmctl.serving.app import create_app
from llmctl.serving.client import AsyncEngineClient
from llmctl.serving.context import ServerContext
from llmctl.serving.http_metrics import HttpMetrics, HttpSeries
from llmctl.serving.keys import ServerKeys
from llmctl.serving.metrics import ServerMetrics
from llmctl.serving.openai_errors import install_handlers
from llmctl.serving.redaction import Redactor


class Streamed(Response):
    """Three chunks, no Content-Length."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for more in (True, True, False):
            await send({"type": "http.response.body", "body": b"xy", "more_body": more})


async def stream(_: Request) -> Response:
    return Streamed()


async def item(request: Request) -> Response:
    return Response(request.path_params.get("name", ""))


async def refused(_: Request) -> Response:
    raise RequestError("no")


async def bug(_: Request) -> Response:
    raise RuntimeError("bug")


ROUTES = (
    Route("/stream", stream, methods=["POST"]),
    Route("/items/{name:path}", item),
    Route("/refused", refused),
    Route("/bug", bug),
    Route("/health", item),
)


class Site:
    """An app with the middleware, asked without a socket."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.app: Any = Starlette(routes=ROUTES)
        install_handlers(self.app)
        self.app.add_middleware(HttpMetrics, series=HttpSeries(self.registry), routes=ROUTES)

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)


def ask(
    app: Any, method: str, path: str, body: bytes = b"", headers: tuple[tuple[str, str], ...] = ()
) -> list[Message]:
    """The messages of a response."""
    scope = {
        "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"",
        "http_version": "1.1", "scheme": "http", "headers": [(a.encode(), b.encode()) for a, b in headers],
    }  # fmt: skip
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    return sent


@pytest.fixture
def site() -> Site:
    return Site()


@pytest.mark.parametrize(
    ("method", "path", "handler", "counted", "status"),
    [
        ("POST", "/stream", "/stream", "POST", "2xx"),
        ("GET", "/items/a/b", "/items/{name:path}", "GET", "2xx"),
        ("GET", "/items/c", "/items/{name:path}", "GET", "2xx"),
        ("GET", "/refused", "/refused", "GET", "4xx"),
        ("DELETE", "/stream", "/stream", "DELETE", "4xx"),
        ("BREW", "/stream", "/stream", "other", "4xx"),
        ("GET", "/nowhere/1", "none", "GET", "4xx"),
    ],
)
def test_labels_are_of_a_few_values(
    site: Site, method: str, path: str, handler: str, counted: str, status: str
) -> None:
    ask(site.app, method, path)
    assert site.value("http_requests_total", method=counted, status=status, handler=handler) == 1
    assert site.value("http_request_duration_seconds_count", method=counted, handler=handler) == 1
    assert site.value("http_request_duration_highr_seconds_count") == 1


def test_a_bug_is_a_5xx(site: Site) -> None:
    with pytest.raises(RuntimeError, match="bug"):
        ask(site.app, "GET", "/bug")
    assert site.value("http_requests_total", method="GET", status="5xx", handler="/bug") == 1


def test_probes_are_not_counted(site: Site) -> None:
    ask(site.app, "GET", "/health")
    assert site.value("http_request_duration_highr_seconds_count") == 0


def test_sizes_are_those_of_the_headers(site: Site) -> None:
    ask(site.app, "POST", "/stream", b"abcde", (("content-length", "5"),))
    ask(site.app, "POST", "/stream", b"abcde", (("content-length", "-5"),))
    ask(site.app, "GET", "/items/four")
    assert site.value("http_request_size_bytes_sum", handler="/stream") == 5
    assert site.value("http_response_size_bytes_sum", handler="/stream") == 0
    assert site.value("http_response_size_bytes_count", handler="/stream") == 2
    assert site.value("http_response_size_bytes_sum", handler="/items/{name:path}") == 4


def test_chunks_go_straight_to_the_server() -> None:
    """What the app awaits for a chunk is the server's own coroutine."""
    served: list[object] = []

    async def nothing() -> None:
        pass

    def send(_: Message) -> Any:
        served.append(nothing())
        return served[-1]

    async def app(_: Scope, __: Receive, send: Send) -> None:
        awaited = send({"type": "http.response.body", "body": b"x", "more_body": True})
        assert awaited is served[-1]
        await awaited

    middleware = HttpMetrics(app, HttpSeries(CollectorRegistry()), [])
    asyncio.run(middleware({"type": "http", "method": "GET", "headers": []}, None, send))  # type: ignore[arg-type]
    assert len(served) == 1


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/v1/completions", (), 401),
        ("/v1/completions", (("authorization", "Bearer k"),), 415),
        ("/v1/completions", (("authorization", "Bearer k"), ("content-type", "application/json")), 503),
        ("/v1/models/x", (), 401),
        ("/v1/models/x", (("authorization", "Bearer k"), ("content-type", "application/json")), 405),
    ],
)
def test_what_a_gate_refuses_is_counted_under_the_route_it_was_for(
    path: str, headers: tuple[tuple[str, str], ...], status: int
) -> None:
    config, metrics, keys = ServeConfig(), ServerMetrics("m"), ServerKeys("k")
    client = AsyncEngineClient(config, metrics, stall_timeout=60)
    context = ServerContext(config, ("m",), client, metrics, keys, Redactor(keys))
    answer = ask(create_app(context), "POST", path, b"{}", headers)
    assert answer[0]["status"] == status
    handler = path.replace("/x", "/{name:path}")
    labels = {"method": "POST", "status": f"{status // 100}xx", "handler": handler}
    assert metrics.registry.get_sample_value("http_requests_total", labels) == 1
