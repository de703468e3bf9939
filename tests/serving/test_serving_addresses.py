"""What endpoints and the model may be called, by whom, and with a key in which header; the engine is not started."""

from __future__ import annotations

import json
from typing import Any

import pytest
from serving.test_serving_http_metrics import ask

from llmctl.config import ServeConfig
from llmctl.errors import UsageError
from llmctl.serving.addresses import ALIASES, parse_origins
from llmctl.serving.app import create_app
from llmctl.serving.client import AsyncEngineClient
from llmctl.serving.context import ServerContext
from llmctl.serving.keys import ServerKeys
from llmctl.serving.metrics import ServerMetrics
from llmctl.serving.redaction import Redactor

PAGE = ("origin", "https://page.example")
PREFLIGHT = (PAGE, ("access-control-request-method", "POST"), ("access-control-request-headers", "authorization"))
JSON = ("content-type", "application/json")


class Site:
    """An app with a key, or without."""

    def __init__(self, key: str | None = None, names: tuple[str, ...] = ("m",), **options: Any) -> None:
        config, self.metrics, keys = ServeConfig(**options), ServerMetrics("m"), ServerKeys(key)
        client = AsyncEngineClient(config, self.metrics, stall_timeout=60)
        self.app = create_app(ServerContext(config, names, client, self.metrics, keys, Redactor(keys)))

    def ask(self, method: str, path: str, *headers: tuple[str, str]) -> tuple[int, dict[str, str], bytes]:
        start, *bodies = ask(self.app, method, path, b"{}" if method == "POST" else b"", headers)
        found = {name.decode(): value.decode() for name, value in start["headers"]}
        return start["status"], found, b"".join(body["body"] for body in bodies)


@pytest.mark.parametrize("path", ["/v1/completions", *ALIASES])
@pytest.mark.parametrize("root", ["", "/llm", "/v1"])
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("slash", ["", "/"])
def test_an_endpoint_by_any_of_its_paths(path: str, root: str, left: bool, slash: str) -> None:
    meant = ALIASES.get(path, path)
    method = "POST" if meant.endswith(("completions", "embeddings", "messages", "responses")) else "GET"
    site = Site(root_path=root)
    found = site.ask(method, (root if left else "") + path + slash, JSON)
    assert found[0] == site.ask(method, meant, JSON)[0] == (503 if method == "POST" else 200)
    if meant != "/health":
        labels = {"method": method, "status": f"{found[0] // 100}xx", "handler": meant}
        assert site.metrics.registry.get_sample_value("http_requests_total", labels) == 2


def test_the_prefix_alone_and_another_are_no_endpoint() -> None:
    site = Site(root_path="/llm")
    assert site.ask("GET", "/llm/nowhere")[0] == site.ask("GET", "/llmx/health")[0] == 404
    assert json.loads(site.ask("GET", "/llm/openapi.json")[2])["servers"] == [{"url": "/llm"}]


@pytest.mark.parametrize("type_", ["application/json", "text/plain", "multipart/form-data; boundary=x", ""])
@pytest.mark.parametrize("method", ["POST", "GET", "PUT"])
def test_an_unknown_path_is_404_whatever_comes_with_it(method: str, type_: str) -> None:
    status, headers, body = Site().ask(method, "/v2/completions", ("content-type", type_))
    assert (status, headers["content-type"]) == (404, "application/json")
    assert json.loads(body)["error"] == {
        **{"message": f"no such endpoint: {method} /v2/completions", "type": "invalid_request_error"},
        **{"param": None, "code": "not_found"},
    }


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ([("authorization", "Bearer k")], True),
        ([("x-api-key", "k")], True),
        ([("authorization", "Bearer none"), ("x-api-key", "k")], True),
        ([("x-api-key", "none"), ("authorization", "bearer k")], True),
        ([("x-api-key", "K")], False),
        ([("x-api-key", "k"), ("x-api-key", "K")], False),
        ([("authorization", "Bearer none"), ("authorization", "Bearer k")], False),
        ([("x-api-key", "Bearer k")], False),
        ([("authorization", "Basic k")], False),
        ([("authorization", "k")], False),
        ([], False),
    ],
)
def test_a_key_in_either_header(headers: list[tuple[str, str]], allowed: bool) -> None:
    site = Site("k")
    assert site.ask("GET", "/v1/models", *headers)[0] == (200 if allowed else 401)
    assert site.ask("GET", "/ping", *headers)[0] == 200


def test_several_names_of_one_model() -> None:
    site = Site(names=("first", "org/second"))
    listed = json.loads(site.ask("GET", "/v1/models")[2])["data"]
    assert [card["id"] for card in listed] == ["first", "org/second"]
    assert json.loads(site.ask("GET", "/v1/models/org/second")[2])["id"] == "org/second"
    status, _, body = site.ask("GET", "/v1/models/third")
    assert (status, json.loads(body)["error"]["code"]) == (404, "model_not_found")
    assert "this server has: first, org/second" in json.loads(body)["error"]["message"]


@pytest.mark.parametrize(
    "origins", ["https://page.example", '["https://page.example"]', "http://a:1, https://page.example"]
)
def test_a_page_of_an_allowed_origin(origins: str) -> None:
    site = Site("k", allowed_origins=origins)
    status, headers, _ = site.ask("OPTIONS", "/v1/chat/completions", *PREFLIGHT)
    assert (status, headers["access-control-allow-origin"]) == (200, "https://page.example")
    assert headers["access-control-allow-headers"] == "authorization"
    for known, key in ((200, "k"), (401, "x")):
        status, headers, _ = site.ask("GET", "/v1/models", PAGE, ("authorization", f"Bearer {key}"))
        assert (status, headers["access-control-allow-origin"]) == (known, "https://page.example")
        assert headers["access-control-expose-headers"] == "X-Request-Id, Retry-After"
    other = ("origin", "https://other.example")
    assert "access-control-allow-origin" not in site.ask("GET", "/health", other)[1]
    assert site.ask("OPTIONS", "/v1/models", other, *PREFLIGHT[1:])[0] == 400


def test_any_origin_and_none() -> None:
    assert Site(allowed_origins="*").ask("GET", "/health", PAGE)[1]["access-control-allow-origin"] == "*"
    site = Site("k")
    assert site.ask("OPTIONS", "/v1/models", *PREFLIGHT)[0] == 401
    assert "access-control-allow-origin" not in site.ask("GET", "/health", PAGE)[1]


@pytest.mark.parametrize("text", ["", "example.com", "https://a/b", "[", "[1]", "[]", "https://a,,https://b"])
def test_what_is_no_origin(text: str) -> None:
    with pytest.raises(UsageError, match=r"--allowed-origins: expected origins"):
        parse_origins(text)
