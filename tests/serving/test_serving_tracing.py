"""Traces: what a real collector receives over HTTP, and what happens without one, or without OpenTelemetry."""

from __future__ import annotations

import logging
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from request_records import UNIX_OFFSET, record, refused, wait_until

from llmctl.errors import UsageError
from llmctl.extras import install_command
from llmctl.serving import tracing
from llmctl.serving.app import GENERATING
from llmctl.serving.tracing import RequestTracer, traces_url

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs the extra otel")

from otlp_collector import Collector, attributes

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as made:
        yield made


@pytest.fixture(autouse=True)
def _loggers() -> Iterator[None]:
    """As they were."""
    sdk, transport = logging.getLogger("opentelemetry"), logging.getLogger("urllib3")
    before = (sdk.propagate, list(sdk.handlers), transport.level)
    yield
    sdk.propagate, sdk.handlers = before[:2]
    transport.setLevel(before[2])


def sent(collector: Collector, *records: Any) -> dict[str, Any]:
    """Spans by name."""
    tracer = RequestTracer(collector.url)
    for one in records:
        tracer.trace(one)
    tracer.close()
    return {span.name: span for span in collector.spans}


def test_a_request_is_a_span_with_its_phases_inside(collector: Collector) -> None:
    spans = sent(collector, record())
    assert set(spans) == {"llm_request", "queue", "prefill", "decode"}
    root = spans["llm_request"]
    assert (len(root.trace_id), root.parent_span_id, root.kind, root.status.code) == (16, b"", 2, 0)

    def times(name: str) -> tuple[float, float]:
        span = spans[name]
        return tuple(  # type: ignore[return-value]
            round(at / 1e9 - UNIX_OFFSET, 3) for at in (span.start_time_unix_nano, span.end_time_unix_nano)
        )

    assert times("llm_request") == (10.0, 12.5)
    assert [times(name) for name in ("queue", "prefill", "decode")] == [(10.1, 10.4), (10.4, 11.0), (11.0, 12.0)]
    for name in ("queue", "prefill", "decode"):
        assert (spans[name].parent_span_id, spans[name].trace_id) == (root.span_id, root.trace_id)
    found = attributes(root)
    assert {name: found[name] for name in found if not name.startswith("gen_ai.latency")} == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": "m",
        "gen_ai.response.model": "m",
        "gen_ai.request.id": "r0",
        "gen_ai.request.max_tokens": 3,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.n": 1,
        "gen_ai.request.stream": True,
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.usage.input_tokens": 7,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.usage.prompt_tokens": 7,
        "gen_ai.usage.completion_tokens": 3,
        "gen_ai.usage.cache_read.input_tokens": 4,
        "gen_ai.usage.num_sequences": 1,
        "http.response.status_code": 200,
        "url.path": "/v1/completions",
        "llmctl.tenant": "key alice",
        "llmctl.priority": -1,
    }
    assert {name[15:]: round(found[name], 6) for name in found if name.startswith("gen_ai.latency")} == {
        "time_in_queue": 0.3,
        "time_to_first_token": 0.9,
        "e2e": 1.9,
    }


def test_an_error_is_the_spans_status(collector: Collector) -> None:
    spans = sent(collector, refused())
    assert set(spans) == {"llm_request"}
    root = spans["llm_request"]
    assert (root.status.code, root.status.message) == (2, "bad")
    assert attributes(root)["error.type"] == "bad"
    assert attributes(root)["http.response.status_code"] == 400


def test_the_clients_trace_goes_on_as_it_was_sampled(collector: Collector) -> None:
    taken = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=x"}
    left = {"traceparent": f"00-{'1' * 32}-{PARENT}-00"}
    broken = {"traceparent": "00-nonsense"}
    sent(collector, refused(), *[record(i, trace_context=c) for i, c in enumerate((taken, left, broken))])
    roots = {attributes(span)["gen_ai.request.id"]: span for span in collector.spans if span.name == "llm_request"}
    assert set(roots) == {"r", "r0", "r2"}
    assert (roots["r0"].trace_id.hex(), roots["r0"].parent_span_id.hex()) == (TRACE, PARENT)
    assert roots["r0"].trace_state == "vendor=x"
    assert roots["r2"].parent_span_id == b""
    assert {span.trace_id.hex() for span in collector.spans}.isdisjoint({"1" * 32})


def test_the_service_is_named_by_the_environment_first(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    sent(collector, refused())
    assert collector.services == ["llmctl"]
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    sent(collector, refused())
    assert collector.services == ["llmctl", "mine"]


def test_a_collector_that_is_not_there_is_said_once_a_minute_and_keeps_nobody(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "0.1")
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "8")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "4")
    monkeypatch.setattr(tracing, "CLOSE_SECONDS", 0.1)
    now = 1000.0
    monkeypatch.setattr(tracing.time, "monotonic", lambda: now)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with caplog.at_level(logging.DEBUG):
            tracer = RequestTracer(f"http://127.0.0.1:{unused.getsockname()[1]}")
            handler = logging.getLogger("opentelemetry").handlers[0]
            for number in range(500):
                tracer.trace(record(number))

            def kept_back() -> bool:
                tracer.trace(record())  # a fast machine loses the 500 before three lines are made of them
                return bool(handler._kept_back > 3)  # type: ignore[attr-defined]

            wait_until(kept_back)
            assert len(caplog.records) == 1
            now += tracing.SECONDS_BETWEEN_LINES
            tracer.trace(record())
            wait_until(lambda: len(caplog.records) == 2)
            tracer.close()
    assert all(line.startswith("traces: ") and "\n" not in line for line in caplog.messages)
    assert "lines since the last one)" in caplog.messages[1]


def test_the_end_of_the_server_does_not_wait_for_a_collector_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "CLOSE_SECONDS", 0.05)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "0.3")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        tracer = RequestTracer(f"http://127.0.0.1:{silent.getsockname()[1]}")
        tracer.trace(record())
        tracer.close()
        (closing,) = [thread for thread in threading.enumerate() if thread.name == "traces-close"]
    closing.join()


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("http://c:4318", "http://c:4318/v1/traces"),
        ("https://c/", "https://c/v1/traces"),
        ("http://c:4318/other", "http://c:4318/other"),
        ("http://c?x=y", "http://c/v1/traces?x=y"),
    ],
)
def test_a_url_without_a_path_has_the_usual_one(given: str, url: str) -> None:
    assert traces_url(given) == url


@pytest.mark.parametrize("given", ["c:4317", "grpc://c:4317", "http://", "http://c:x", "", "http://user:secret@c:x"])
def test_what_is_no_url_of_http(given: str) -> None:
    with pytest.raises(UsageError, match="expected the URL of an OTLP/HTTP collector") as caught:
        traces_url(given)
    assert "secret" not in str(caught.value)


def test_without_opentelemetry_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("opentelemetry.sdk", "opentelemetry.sdk.trace"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match="OpenTelemetry is not installed") as caught:
        traces_url("http://c")
    assert caught.value.fix == install_command("otel")


@pytest.mark.parametrize(
    ("name", "value"), [("OTEL_BSP_MAX_QUEUE_SIZE", "0"), ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "many")]
)
def test_a_variable_that_the_sdk_refuses_is_an_error_in_words(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=r"--otlp-traces-endpoint: OpenTelemetry refuses its variables: .* integer"):
        RequestTracer("http://127.0.0.1:1")


def test_every_endpoint_that_generates_has_an_operation() -> None:
    assert {route.path for route in GENERATING} == tracing._OPERATIONS.keys()
