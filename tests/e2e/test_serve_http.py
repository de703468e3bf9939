"""The real server at the level of HTTP: malformed requests, disconnects, a hundred streams, metrics."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import time
import urllib.error
import urllib.request
from typing import Any

import aiohttp
import pytest
from fixtures import ServerProcess, fetch

COMPLETION = {"prompt": "a model is", "max_tokens": 4, "temperature": 0}


def raw_post(server: ServerProcess, path: str, data: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
    status, text = fetch(server.url + path, data, headers)
    return status, json.loads(text)["error"]


def test_sse_framing(server: ServerProcess) -> None:
    status, text = fetch(server.url + "/v1/chat/completions", _chat(stream=True, max_tokens=3))
    assert status == 200
    assert text.endswith("data: [DONE]\n\n")
    events = text.split("\n\n")
    assert events.pop() == ""
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    first = json.loads(events[0].removeprefix("data: "))
    assert first["object"] == "chat.completion.chunk"
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}


def _chat(**fields: object) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": "hello"}], **fields}).encode()


@pytest.mark.parametrize(
    ("data", "said", "param"),
    [
        (b"{", "not valid JSON", None),
        (b"", "not valid JSON", None),
        (b"\xff\xfe", "not valid JSON", None),
        (b"[1, 2]", "request body", None),
        (b"{}", "Field required", "prompt"),
        (b'{"prompt": {"a": 1}}', "a string, a list of token ids", "prompt"),
        (b'{"prompt": [1, -2]}', "token ids", "prompt"),
        (b'{"prompt": "a", "max_tokens": "5"}', "valid integer, found str", "max_tokens"),
        (b'{"prompt": "a", "max_tokens": 1.5}', "valid integer", "max_tokens"),
        (b'{"prompt": "a", "stream": "yes"}', "valid boolean", "stream"),
        (b'{"prompt": "a", "temperature": "hot"}', "valid number", "temperature"),
        (b'{"prompt": "a", "stop": [1]}', "list of strings", "stop"),
        (b'{"prompt": "a", "logit_bias": {"x": 1}}', "token ids as keys", "logit_bias"),
        (b'{"prompt": "a", "logit_bias": {"99999": 1}}', "outside the vocabulary", "logit_bias"),
        (b'{"prompt": [99999]}', "outside the vocabulary", "prompt"),
        (b'{"prompt": []}', "at least one prompt", "prompt"),
        (b'{"prompt": ""}', "at least one token", "prompt"),
        (b'{"prompt": "a", "suffix": "b"}', "not supported", "suffix"),
        (b'{"prompt": "a", "best_of": 3}', "not supported", "best_of"),
        (b'{"prompt": "a", "guided_regex": "(x"}', "unclosed group", "guided_regex"),
        (b'{"prompt": "a", "top_p": -1}', "top_p", "top_p"),
        (b'{"prompt": "a", "max_tokens": -2}', "max_tokens", "max_tokens"),
        (b'{"prompt": "a", "logprobs": 1000}', "logprobs", "logprobs"),
        (b'{"prompt": "a", "prompt_logprobs": 0, "stream": true}', "not available with stream", "prompt_logprobs"),
        (b'{"prompt": "a", "seed": 1%s}' % (b"0" * 400), "found 1000000000000000", "seed"),
        (b'{"prompt": %s}' % (b"[" * 9999 + b"]" * 9999), "recursion limit exceeded", None),
        (json.dumps({"prompt": [[5]] * 10_000, "n": 128, "max_tokens": 1}).encode(), "found 1280000", "n"),
    ],
)
def test_bad_bodies(server: ServerProcess, data: bytes, said: str, param: str | None) -> None:
    status, error = raw_post(server, "/v1/completions", data)
    assert status == 400
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert said in error["message"]
    assert error["param"] == param


def test_a_refused_body_leaves_the_connection_as_it_was(server: ServerProcess) -> None:
    deep = b"[" * 9999 + b"]" * 9999
    collides = _chat(chat_template_kwargs={"messages": []})
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    for path, body in [("/tokenize", deep), ("/v1/chat/completions", collides), ("/v1/completions", deep)] * 2:
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert (answer.status, json.loads(answer.read())["error"]["type"]) == (400, "invalid_request_error")
        assert not answer.will_close
    connection.close()


def test_a_client_that_leaves_amid_its_body_is_no_fault_of_ours(server: ServerProcess) -> None:
    before = len(server.output)
    with socket.create_connection(("127.0.0.1", server.port), 10) as sock:
        sock.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{"
        )
        time.sleep(0.2)
    time.sleep(0.5)
    assert server.get("/health")[0] == 200
    said = server.output[before:].splitlines()
    assert [line for line in said if not line.startswith("INFO ")] == []  # the status line may fall due meanwhile


def test_oversized_prompt(server: ServerProcess) -> None:
    status, error = raw_post(server, "/v1/completions", json.dumps({"prompt": "word " * 2000}).encode())
    assert (status, error["code"]) == (400, "context_length_exceeded")
    status, error = raw_post(server, "/v1/completions", json.dumps({"prompt": "a b c", "max_tokens": 511}).encode())
    assert (status, error["code"], error["param"]) == (400, "context_length_exceeded", "max_tokens")


def test_oversized_body(server: ServerProcess) -> None:
    with socket.create_connection(("127.0.0.1", server.port), 10) as sock:
        sock.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 99999999999\r\n\r\n"
        )
        assert sock.recv(100).startswith(b"HTTP/1.1 413 ")


def test_unknown_fields_are_ignored(server: ServerProcess) -> None:
    status, _ = server.post("/v1/completions", {**COMPLETION, "no_such_field": 1})
    assert status == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/completions", 405),
        ("GET", "/nowhere", 404),
        ("POST", "/health", 405),
        ("DELETE", "/v1/models", 405),
    ],
)
def test_wrong_paths_and_methods(server: ServerProcess, method: str, path: str, status: int) -> None:
    async def call() -> tuple[int, Any]:
        async with aiohttp.ClientSession() as session, session.request(method, server.url + path, json={}) as answer:
            return answer.status, await answer.json()

    found, body = asyncio.run(call())
    assert found == status
    assert set(body["error"]) == {"message", "type", "param", "code"}


def test_a_body_that_is_not_declared_json_is_refused(server: ServerProcess) -> None:
    status, error = raw_post(server, "/v1/completions", b"{}", **{"Content-Type": "text/plain"})
    assert (status, error["code"]) == (415, "unsupported_media_type")


def test_tokenize_and_detokenize(server: ServerProcess) -> None:
    text = "the fox says é日🎉"
    _, body = server.post("/tokenize", {"prompt": text, "return_token_strs": True})
    assert body["count"] == len(body["tokens"]) == len(body["token_strs"])
    assert body["max_model_len"] == 512
    assert server.post("/detokenize", {"tokens": body["tokens"]}) == (200, {"prompt": text})
    _, chat = server.post("/tokenize", {"messages": [{"role": "user", "content": "hi"}]})
    _, shown = server.post("/detokenize", {"tokens": chat["tokens"]})
    assert shown["prompt"] == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert server.post("/detokenize", {"tokens": [10**9]})[0] == 400


def test_version_health_ready(server: ServerProcess) -> None:
    from llmctl import __version__

    assert json.loads(server.get("/version")[1]) == {"version": __version__}
    assert server.get("/health")[0] == 200
    assert json.loads(server.get("/ready")[1]) == {"status": "ready"}
    probe = urllib.request.Request(server.url + "/health", method="HEAD")
    with urllib.request.urlopen(probe, timeout=10) as answer:
        assert (answer.status, answer.read()) == (200, b"")


def test_the_api_process_imports_no_torch(server: ServerProcess) -> None:
    with open(f"/proc/{server.process.pid}/maps") as maps:
        libraries = maps.read()
    assert "libtorch" not in libraries
    with open(f"/proc/{server.worker_pid}/maps") as maps:
        assert "libtorch" in maps.read(), "the check looks for the wrong name"


def wait_idle(server: ServerProcess, timeout: float = 10) -> None:
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if server.metric("llmctl:num_requests_running") == 0 and server.metric("llmctl:kv_cache_usage_perc") == 0:
            return
        time.sleep(0.05)
    raise AssertionError("requests still run")


def test_metrics_count_what_happened(server: ServerProcess) -> None:
    wait_idle(server)
    names = [
        "prompt_tokens_total",
        "generation_tokens_total",
        "request_success_total",
        "e2e_request_latency_seconds_count",
    ]
    before = [server.metric("llmctl:" + name) for name in names]
    server.post("/v1/completions", {**COMPLETION, "prompt": [5, 6, 7], "ignore_eos": True})
    after = [server.metric("llmctl:" + name) for name in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [3, 4, 1, 1]
    for series in (
        *("time_to_first_token_seconds_bucket", "inter_token_latency_seconds_bucket"),
        *("request_time_per_output_token_seconds_bucket", "iteration_tokens_total_bucket", "cache_config_info"),
        *("request_queue_time_seconds_bucket", "request_prefill_time_seconds_bucket", "num_preemptions_total"),
        *("request_decode_time_seconds_bucket", "request_inference_time_seconds_bucket", "num_requests_waiting"),
        *("prefix_cache_queries_total", "prefix_cache_hits_total", "prompt_tokens_cached_total"),
        *("admission_rejections_total", "request_prompt_tokens_bucket", "request_generation_tokens_bucket"),
        *("worker_resident_memory_bytes", "worker_cpu_seconds_total", "worker_open_fds"),
    ):
        server.metric("llmctl:" + series)
    _, text = server.get("/metrics")
    assert 'llmctl:inter_token_latency_seconds_bucket{engine="0",le="0.0025",model_name="tiny-llama"}' in text


def test_http_series_count_streams_and_whole_answers(server: ServerProcess) -> None:
    def seen() -> list[float]:
        text = server.get("/metrics")[1]
        values = []
        for name in (
            "requests_total",
            "request_size_bytes_sum",
            "response_size_bytes_sum",
            "request_duration_seconds_sum",
        ):
            lines = [i for i in text.splitlines() if i.startswith(f"http_{name}{{") and "/v1/completions" in i]
            values.append(sum(float(line.rsplit(" ", 1)[1]) for line in lines if '"4xx"' not in line))
        return values

    server.post("/v1/completions", COMPLETION)
    before = seen()
    bodies = [json.dumps({**COMPLETION, "stream": stream}).encode() for stream in (False, True)]
    answers = [fetch(server.url + "/v1/completions", body)[1] for body in bodies]
    requests, asked, answered, seconds = (b - a for a, b in zip(before, seen(), strict=True))
    assert (requests, asked, answered) == (2, sum(map(len, bodies)), len(answers[0].encode()))
    assert seconds > 0


def test_a_stop_string_frees_the_blocks_and_is_counted(server: ServerProcess) -> None:
    wait_idle(server)
    stops = 'llmctl:request_success_total{engine="0",finished_reason="stop"'
    before = [line for line in server.get("/metrics")[1].splitlines() if line.startswith(stops)]
    server.post("/v1/completions", {"prompt": "x é", "max_tokens": 400, "temperature": 0, "stop": "🎉"})
    wait_idle(server)
    after = [line for line in server.get("/metrics")[1].splitlines() if line.startswith(stops)]
    assert float(after[0].split()[-1]) == float(before[0].split()[-1]) + 1


@pytest.mark.parametrize("stream", [True, False])
def test_disconnect_frees_the_blocks(server: ServerProcess, stream: bool) -> None:
    wait_idle(server)
    body = json.dumps({"prompt": "x é", "max_tokens": 500, "temperature": 0, "stream": stream, "n": 1}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode()
    aborted = server.metric("llmctl:request_success_total")
    with socket.create_connection(("127.0.0.1", server.port), 10) as sock:
        sock.sendall(head + body)
        if stream:
            assert b"data: " in sock.recv(4096) + sock.recv(4096)
        server.wait_load(1)
    wait_idle(server, 5)
    assert server.metric("llmctl:request_success_total") == aborted + 1


def test_a_hundred_streams_equal_their_solo_answers(server: ServerProcess) -> None:
    prompts = [f"{i} question {i * 7}" for i in range(100)]
    tokens = 12

    async def stream(session: aiohttp.ClientSession, prompt: str) -> tuple[str, int]:
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
        body["stream_options"] = {"include_usage": True}
        text, usage = "", 0
        async with session.post(server.url + "/v1/completions", json=body) as answer:
            assert answer.status == 200
            async for line in answer.content:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                text += "".join(c["text"] for c in event["choices"])
                usage = (event["usage"] or {}).get("completion_tokens", usage)
        return text, usage

    async def all_at_once() -> list[tuple[str, int]]:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:
            return await asyncio.gather(*(stream(session, p) for p in prompts))

    together = asyncio.run(all_at_once())
    assert [count for _, count in together] == [tokens] * 100
    for i in range(0, 100, 9):
        _, solo = server.post(
            "/v1/completions", {"prompt": prompts[i], "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        )
        assert solo["choices"][0]["text"] == together[i][0], prompts[i]
    wait_idle(server)


def test_every_second_of_the_engine_is_in_one_state(server: ServerProcess) -> None:
    def seconds() -> float:
        server.post("/v1/completions", COMPLETION)
        lines = [line for line in server.get("/metrics")[1].splitlines() if line.startswith("llmctl:engine_seconds_")]
        assert {line.split('state="')[1].split('"')[0] for line in lines} >= {"busy", "few_requests", "no_requests"}
        return sum(float(line.split()[-1]) for line in lines if "_total{" in line)

    began = time.monotonic()
    before, then = seconds(), time.monotonic()
    time.sleep(0.5)
    least = time.monotonic() - then
    after = seconds()
    assert 0.9 * least < after - before < time.monotonic() - began


def test_every_answer_carries_the_requests_id(server: ServerProcess) -> None:
    def ids(path: str, data: bytes | None = None) -> tuple[int, str | None]:
        request = urllib.request.Request(
            server.url + path, data, {"Content-Type": "application/json", "X-Request-Id": "mine-7"}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.headers["X-Request-Id"]
        except urllib.error.HTTPError as error:
            return error.code, error.headers["X-Request-Id"]

    assert ids("/ready") == (200, "mine-7")
    assert ids("/nowhere") == (404, "mine-7")
    assert ids("/v1/completions", json.dumps(COMPLETION).encode()) == (200, "mine-7")
    assert ids("/v1/completions", json.dumps({**COMPLETION, "stream": True}).encode()) == (200, "mine-7")
    assert ids("/v1/completions", b"{") == (400, "mine-7")
