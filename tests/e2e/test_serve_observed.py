"""A real server with keys in a file, every log switched on, and a collector of traces."""

from __future__ import annotations

import base64
import http.client
import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import pytest
from fixtures import ServerProcess, fetch

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs the extra otel")

from otlp_collector import Collector, attributes
from serving.request_records import wait_until

from llmctl.serving.keys import key_digest

OPTION_KEY = "sk-option/Kq8+T0vNw2=="
FILE_KEY = "sk-file_9fG.hR-27~xB"
PROMPT = "x é"


def entry(name: str, key: str) -> str:
    return f"{name} sha256:{key_digest(key.encode()).hex()} priority\n"


class Observed:
    """The server, its collector and its files."""

    def __init__(self, engine: Path, folder: Path, collector: Collector) -> None:
        self.collector = collector
        self.keys, self.log = folder / "keys", folder / "requests.jsonl"
        self.keys.write_text(entry("alice", FILE_KEY))
        self.server = ServerProcess(
            *("--model", str(engine), "--log-level", "debug", "--request-log", str(self.log), "--request-log-text"),
            *("--otlp-traces-endpoint", collector.url, "--max-num-seqs", "4", "--api-key-file", str(self.keys)),
            env={"LLMCTL_API_KEY": OPTION_KEY, "OTEL_BSP_SCHEDULE_DELAY": "50"},
        )

    def post(self, key: str = FILE_KEY, headers: dict[str, str] | None = None, **body: object) -> tuple[int, str]:
        data = json.dumps({"prompt": PROMPT, "temperature": 0, "max_tokens": 4, **body}).encode()
        given = {"Authorization": f"Bearer {key}", **(headers or {})}
        return fetch(self.server.url + "/v1/completions", data, given)

    def line(self, request_id: str) -> dict[str, Any]:
        """A request's line of the log, once it is there."""
        return wait_until(lambda: next((one for one in self.lines() if one["request_id"] == request_id), None))

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def span(self, request_id: str) -> Any:
        """A request's span, once the collector has it."""
        return wait_until(
            lambda: next(
                (s for s in list(self.collector.spans) if attributes(s).get("gen_ai.request.id") == request_id), None
            )
        )

    def reload(self, said: str) -> None:
        """SIGHUP, and until the server says so."""
        before = self.server.output.count(said)
        self.server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: self.server.output.count(said) > before)


@pytest.fixture(scope="module")
def observed(tiny_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observed]:
    with Collector() as collector:
        made = Observed(tiny_engine, tmp_path_factory.mktemp("observed"), collector)
        with made.server:
            made.server.wait_ready()
            yield made


def test_an_answer_is_one_line_and_one_trace(observed: Observed) -> None:
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    headers = {"X-Request-Id": "answered", "traceparent": f"00-{trace}-{parent}-01"}
    for stream in (False, True):
        headers["X-Request-Id"] = f"answered-{stream}"
        status, _ = observed.post(headers=headers, stream=stream, n=2, priority=-1, max_tokens=8)
        assert status == 200
        line = observed.line(f"answered-{stream}")
        assert (line["tenant"], line["status"], line["stream"], line["n"]) == ("key alice", 200, stream, 2)
        assert (line["prompt_tokens"], line["output_tokens"], line["max_tokens"], line["priority"]) == (4, 16, 8, -1)
        assert line["finish_reasons"] == ["length", "length"]
        assert line["prompts"] == [PROMPT]
        assert line["outputs"] == ["日🎉\ufffd"] * 2
        assert 0 <= line["queue_s"] <= line["ttft_s"] <= line["e2e_s"]
        assert line["itl_s"] > 0
        span = observed.span(f"answered-{stream}")
        assert (span.trace_id.hex(), span.parent_span_id.hex()) == (trace, parent)
        found = attributes(span)
        assert found["gen_ai.usage.completion_tokens"] == 16
        assert found["gen_ai.latency.e2e"] == pytest.approx(line["e2e_s"], abs=1e-5)
        inside = wait_until(lambda s=span: {o.name for o in observed.collector.spans if o.parent_span_id == s.span_id})
        assert inside == {"queue", "prefill", "decode"}


def test_a_stop_string_and_a_chat(observed: Observed) -> None:
    observed.post(headers={"X-Request-Id": "stopped"}, stop=["🎉"], max_tokens=20)
    line = observed.line("stopped")
    assert (line["finish_reasons"], line["output_tokens"]) == (["stop"], 7)
    assert line["e2e_s"] >= line["ttft_s"]
    body = json.dumps({"messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}).encode()
    headers = {"Authorization": f"Bearer {OPTION_KEY}", "X-Request-Id": "chat"}
    assert fetch(observed.server.url + "/v1/chat/completions", body, headers)[0] == 200
    line = observed.line("chat")
    assert (line["endpoint"], line["tenant"]) == ("/v1/chat/completions", "key 0")
    assert "hello" in line["prompts"][0]


def test_a_refusal_is_a_line_and_an_errors_span(observed: Observed) -> None:
    status, _ = observed.post(headers={"X-Request-Id": "refused"}, max_tokens=10_000)
    assert status == 400
    line, span = observed.line("refused"), observed.span("refused")
    assert (line["status"], line["error"], line["finish_reasons"]) == (400, "context_length_exceeded", [])
    assert (span.status.code, attributes(span)["error.type"]) == (2, "context_length_exceeded")
    assert observed.post(OPTION_KEY, {"X-Request-Id": "forbidden"}, priority=1)[0] == 403
    assert observed.line("forbidden")["error"] == "permission_denied"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_is_a_line(observed: Observed, stream: bool) -> None:
    name = f"gone-{stream}"
    body = json.dumps({"prompt": PROMPT, "max_tokens": 400, "temperature": 0, "stream": stream}).encode()
    connection = http.client.HTTPConnection("127.0.0.1", observed.server.port)
    headers = {"Authorization": f"Bearer {FILE_KEY}", "Content-Type": "application/json", "X-Request-Id": name}
    connection.request("POST", "/v1/completions", body, headers)
    if stream:
        connection.getresponse().read(1)
    else:
        key = {"Authorization": f"Bearer {FILE_KEY}"}
        wait_until(lambda: "requests_running{" in fetch(observed.server.url + "/metrics", headers=key)[1])
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    line = observed.line(name)
    assert (line["error"], line["finish_reasons"]) == ("client_disconnected", ["abort"])
    assert line["status"] == (200 if stream else None)


def requests_with(key: str) -> list[bytes]:
    """A key in every place that a request over HTTP has for text, plain and coded."""
    auth = f"Authorization: Bearer {FILE_KEY}\r\n"
    targets = [
        *(f"/v1/models?api_key={key}", f"/v1/models?{key}", f"/v1/models?a=b&{key}=c#{key}"),
        *(f"/{key}", f"/v1/models/{key}", f"/v1/models/{key}/x", f"/v1/{key};{key}", f"/v1/models/x:{key}@h"),
        *(f"//user:{key}@host/v1/models", f"http://user:{key}@host/v1/models?key={key}", f"http://{key}/v1/models"),
        *("/" + quote(key, safe=""), "/" + quote(quote(key, safe=""), safe=""), "/" + "a" * 300 + key),
    ]
    headers = [
        *(f"Authorization: {key}", f"Authorization: Basic {key}", f"Authorization: Bearer {key} x"),
        *(f"X-Api-Key: {key}", f"traceparent: 00-{'1' * 32}-{'2' * 16}-01\r\ntracestate: k={key}"),
        *(f"X-Request-Id: {key}", f"X-Request-Id: id={key};", f"User-Agent: {key}", f"Cookie: k={key}"),
        *(f"Referer: http://h/?k={key}", f"traceparent: {key}"),
        *(f"Host: {key}", f"Authorisation: Bearer {key}", f"{key}: x", f"Bearer {key}", f"Content-Type: {key}"),
        *(f"X-Forwarded-For: {key}", f"Expect: {key}", f"Upgrade: {key}\r\nConnection: upgrade", f"Connection: {key}"),
        *(f"Transfer-Encoding: {key}", f"Content-Length: {key}"),
    ]  # fmt: skip
    bodies: list[object] = [
        *({"prompt": key}, {"model": key, "prompt": "x"}, {"prompt": "x", "user": key}, {"prompt": "x", key: key}),
        *({"prompt": "x", "cache_salt": key}, {"prompt": "x", "stop": [key]}, {"prompt": "x", "temperature": key}),
        *({"prompt": "x", "logit_bias": {key: 1}}, key, [key]),
    ]
    made = [f"GET {target} HTTP/1.1\r\nHost: x\r\n{auth}\r\n" for target in targets]
    made += [f"POST {target} HTTP/1.1\r\nHost: x\r\n\r\n" for target in targets]
    made += [f"GET /v1/models HTTP/1.1\r\n{header}\r\n\r\n" for header in headers]
    made += [
        f"{key} /v1/models HTTP/1.1\r\n\r\n",
        f"GET /v1/models {key}\r\n\r\n",
        f"CONNECT {key}:443 HTTP/1.1\r\n\r\n",
    ]
    for header in ["", *headers]:
        text = '{"prompt": "x", "max_tokens": 1}'
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{header + chr(13) + chr(10) if header else ''}{auth}"
        made.append(f"{head}Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n{text}")
    for body in bodies:
        text = json.dumps({"max_tokens": 1, **body} if isinstance(body, dict) else body)
        head = f"POST /v1/completions?k={key} HTTP/1.1\r\nHost: x\r\n{auth}Content-Type: application/json\r\n"
        made.append(f"{head}Content-Length: {len(text)}\r\n\r\n{text}")
    return [text.encode() for text in made]


def test_no_key_is_shown_anywhere(observed: Observed) -> None:
    server = observed.server
    for key in (OPTION_KEY, FILE_KEY):
        for data in requests_with(key):
            with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65536):
                    pass
    assert observed.post(headers={"X-Request-Id": "last"})[0] == 200
    observed.line("last")
    observed.span("last")
    shown = "\n".join([server.output, observed.log.read_text(), *map(str, observed.collector.spans)])
    assert "[redacted]" in server.output
    assert "[redacted]" in observed.log.read_text()
    assert shown.count("uvicorn.access") > 100
    for key in (OPTION_KEY, FILE_KEY):
        for form in (key, quote(key), quote(key, safe=""), base64.b64encode(key.encode()).decode()):
            assert form not in shown
        assert key not in str(psutil.Process(server.worker_pid).environ())


def test_sighup_reads_keys_and_opens_the_log_again(observed: Observed) -> None:
    keys, log = observed.keys, observed.log
    before = keys.read_text()
    moved = log.with_name("moved")
    log.rename(moved)
    keys.write_text(entry("bob", "sk-new-one"))
    try:
        os.kill(observed.server.worker_pid, signal.SIGHUP)  # service managers signal the whole group
        observed.reload("SIGHUP: 2 API keys")
        assert observed.post("sk-new-one", {"X-Request-Id": "by-bob"})[0] == 200
        assert observed.post(FILE_KEY)[0] == 401
        assert observed.line("by-bob")["tenant"] == "key bob"
        assert "by-bob" not in moved.read_text()
        keys.write_text("sk-new-one\n")
        observed.reload("line 1: expected NAME sha256:HEX [priority], found 1 word")
        assert observed.post("sk-new-one")[0] == 200
        assert "sk-new-one" not in observed.server.output
    finally:
        keys.write_text(before)
        observed.reload("SIGHUP: 2 API keys")
    assert observed.post()[0] == 200


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_the_end_of_the_server_is_the_end_of_the_log(observed: Observed) -> None:
    """Ends the server, the last test of this file: with a log that cannot be written, which it says at its end."""
    observed.post(headers={"X-Request-Id": "written"})
    observed.line("written")
    observed.log.unlink()
    observed.log.symlink_to("/dev/full")
    observed.reload("SIGHUP: 2 API keys")
    assert observed.post()[0] == 200
    wait_until(lambda: "No space left on device; the server goes on" in observed.server.output)
    assert observed.post()[0] == 200
    observed.server.process.send_signal(signal.SIGTERM)
    assert observed.server.process.wait(20) == 0
    assert f"--request-log {observed.log}: the last 2 records are lost" in observed.server.output
    assert "Traceback" not in observed.server.output
    assert "restarting" not in observed.server.output
