"""The real server against its description: answers, events, headers and errors as documented, by two sets of types."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import requests
from fixtures import ServerProcess
from openai.types import Completion as OpenAICompletion
from openai.types import Model
from openai.types.chat import ChatCompletion as OpenAIChat
from openai.types.chat import ChatCompletionChunk as OpenAIChunk
from pydantic import BaseModel

from llmctl.serving.openapi import describe
from llmctl.serving.operations import OPERATIONS, Operation
from llmctl.serving.response_schema import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    CompletionChunk,
    ErrorResponse,
    ModelCard,
    ResponseModel,
    TokenizeResponse,
)

MODEL = "tiny-llama"
HELLO = [{"role": "user", "content": "hello"}]
COMPLETIONS: list[dict[str, Any]] = [
    {"prompt": "a model", "max_tokens": 3},
    {"prompt": ["a model", "x"], "n": 2, "max_tokens": 2, "logprobs": 3, "seed": 1},
    {"prompt": "a model", "max_tokens": 0, "echo": True, "logprobs": 1},
    {"prompt": [5, 6, 7], "max_tokens": 2, "prompt_logprobs": 0},
    {"prompt": "x é", "max_tokens": 2, "prompt_logprobs": 3, "return_tokens_as_token_ids": True},
    {"prompt": "x é", "max_tokens": 40, "temperature": 0, "stop": "🎉é"},
    {"prompt": "x é", "max_tokens": 8, "temperature": 0, "logprobs": 0},
    {"prompt": "a", "max_tokens": 2, "logprobs": 2, "allowed_token_ids": [5, 6], "logit_bias": {"5": -100}},
]
CHATS: list[dict[str, Any]] = [
    {"messages": HELLO, "max_tokens": 3},
    {"messages": HELLO, "max_tokens": 2, "n": 2, "logprobs": True, "top_logprobs": 3},
    {"messages": HELLO, "max_tokens": 2, "n": 2, "prompt_logprobs": 2},
    {"messages": HELLO, "max_tokens": 8, "logprobs": True, "stop_token_ids": list(range(3, 200))},
]
STREAMS: list[dict[str, Any]] = [{}, {"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}]
OURS = {"stop_reason", "prompt_logprobs", "max_model_len", "root", "parent"}
"""Members beyond OpenAI's; vLLM has the same."""


@pytest.fixture(scope="module")
def document(server: ServerProcess) -> Any:
    return json.loads(server.get("/openapi.json")[1])


def test_the_served_document_is_the_described_one(document: Any) -> None:
    assert document == describe(MODEL, with_keys=False)


ADAPTERS = {"loadAdapter", "unloadAdapter"}
"""What only a server with --lora-dir does; test_serve_adapters.py asks one."""
EXAMPLES = [
    (operation, name) for operation in OPERATIONS for name in operation.examples if operation.id not in ADAPTERS
]


@pytest.mark.parametrize("operation", [operation for operation in OPERATIONS if operation.id in ADAPTERS])
def test_adapters_are_not_loaded_without_a_folder_for_them(server: ServerProcess, operation: Operation) -> None:
    (body,) = operation.examples.values()
    answer = requests.post(server.url + operation.path, json=body, timeout=60)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "permission_denied")


@pytest.mark.parametrize(("operation", "name"), EXAMPLES, ids=lambda v: getattr(v, "id", v))
def test_every_example_is_served(server: ServerProcess, document: Any, operation: Operation, name: str) -> None:
    content = document["paths"][operation.path][operation.method]["requestBody"]["content"]["application/json"]
    body = content["examples"][name]["value"]
    answer = requests.post(server.url + operation.path, json=body, timeout=60)
    assert answer.status_code == 200
    assert body["model"] == MODEL
    if body.get("stream"):
        assert operation.event is not None
        assert events(answer, operation.event, named=operation.named_events, done=operation.done)
    else:
        assert operation.answer is not None
        operation.answer.model_validate_json(answer.content)


def events(answer: requests.Response, model: type[BaseModel], *, named: bool = False, done: bool = True) -> list[bytes]:
    """The JSON of a stream's events, each as described."""
    assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    *chunks, rest = answer.content.split(b"\n\n")
    assert rest == b""
    if done:
        assert chunks.pop() == b"data: [DONE]"
    found = []
    for chunk in chunks:
        name, _, data = chunk.rpartition(b"data: ")
        model.model_validate_json(data)
        assert name == (b"event: %b\n" % json.loads(data)["type"].encode() if named else b"")
        found.append(data)
    return found


def known_to(model: BaseModel) -> None:
    """Every member is one of the types', or ours."""
    assert set(model.model_extra or ()) <= OURS
    for name in type(model).model_fields:
        value = getattr(model, name)
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, BaseModel):
                known_to(item)


def check_types(data: bytes, ours: type[ResponseModel], theirs: type[BaseModel] | None) -> None:
    ours.model_validate_json(data)
    if theirs is not None:
        known_to(theirs.model_validate_json(data, strict=True))


@pytest.mark.parametrize("number", range(len(COMPLETIONS)))
def test_completions_are_as_described_and_as_openai_knows_them(server: ServerProcess, number: int) -> None:
    body = COMPLETIONS[number]
    answer = requests.post(server.url + "/v1/completions", json=body, timeout=60)
    # Of an echo OpenAI itself answers null for the first token's log-probability, which its types do not know.
    check_types(answer.content, Completion, None if body.get("echo") else OpenAICompletion)
    assert ("prompt_logprobs" in answer.text) == ("prompt_logprobs" in body)
    if "prompt_logprobs" not in body:  # not in a stream
        check_streams(server, "/v1/completions", body, CompletionChunk, None)  # the types know no null finish_reason


@pytest.mark.parametrize("number", range(len(CHATS)))
def test_chats_are_as_described_and_as_openai_knows_them(server: ServerProcess, number: int) -> None:
    answer = requests.post(server.url + "/v1/chat/completions", json=CHATS[number], timeout=60)
    check_types(answer.content, ChatCompletion, OpenAIChat)
    if "prompt_logprobs" not in CHATS[number]:  # not in a stream
        check_streams(server, "/v1/chat/completions", CHATS[number], ChatCompletionChunk, OpenAIChunk)


def check_streams(
    server: ServerProcess, path: str, body: dict[str, Any], ours: type[ResponseModel], theirs: type[BaseModel] | None
) -> None:
    for options in STREAMS:
        request = {**body, "stream": True, **({"stream_options": options} if options else {})}
        found = events(requests.post(server.url + path, json=request, timeout=60), ours)
        assert (b'"usage"' in found[-1]) == bool(options)
        for data in found:
            check_types(data, ours, theirs)


def test_models_are_as_described_and_as_openai_knows_them(server: ServerProcess) -> None:
    _, text = server.get(f"/v1/models/{MODEL}")
    check_types(text.encode(), ModelCard, Model)


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    options = {"api_key": "none", "max_retries": 0, "timeout": 60, "_strict_response_validation": True}
    with openai.OpenAI(base_url=server.url + "/v1", **options) as client:
        yield client


def test_the_client_that_validates_strictly_accepts_every_answer(client: openai.OpenAI) -> None:
    client.models.list()
    client.completions.create(model=MODEL, prompt="a", max_tokens=2, logprobs=1)
    options: Any = {"model": MODEL, "messages": HELLO, "max_tokens": 2, "logprobs": True}
    client.chat.completions.create(**options)
    assert list(client.chat.completions.create(**options, stream=True))


# What is said beside the schemas


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
@pytest.mark.parametrize("text", ['{"x": NaN, %s}', '{"x": [1, -Infinity], %s}', '{%s, "x": {"y": Infinity}}'])
def test_what_is_not_json_is_refused_wherever_it_stands(server: ServerProcess, path: str, text: str) -> None:
    """pydantic's parser reads NaN; a body that only it can read would not have been counted."""
    fields = {"prompt": "a", "tokens": [5], "messages": HELLO, "max_tokens": 1}
    names = {"/v1/completions": ["prompt"], "/tokenize": ["prompt"], "/detokenize": ["tokens"]}.get(path, ["messages"])
    body = text % ", ".join(f'"{n}": {json.dumps(fields[n])}' for n in [*names, "max_tokens"])
    answer = requests.post(server.url + path, body, headers={"Content-Type": "application/json"}, timeout=30)
    error = ErrorResponse.model_validate_json(answer.content).error
    assert (answer.status_code, error.message.partition(":")[0]) == (400, "the request body is not valid JSON")


def test_of_a_name_that_repeats_the_last_value_counts_for_every_check(server: ServerProcess) -> None:
    def post(body: str) -> Any:
        return requests.post(
            server.url + "/v1/completions", body, headers={"Content-Type": "application/json"}, timeout=60
        )

    answer = post('{"prompt": ["a", "b"], "prompt": "c", "n": 128, "n": 2, "max_tokens": 1, "max_tokens": 3}').json()
    assert len(answer["choices"]) == 2
    many = json.dumps([[5]] * 10_000)
    refused = post(f'{{"prompt": "a", "n": 1, "prompt": {many}, "n": 128, "max_tokens": 1}}')
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n")


def test_tokenize_takes_a_prompt_or_messages_and_not_both(server: ServerProcess) -> None:
    both: list[dict[str, Any]] = [{"prompt": "a", "messages": HELLO}, {"prompt": "a", "messages": None}]
    for body in both:
        status, answer = server.post("/tokenize", body)
        assert (status, answer["error"]["param"]) == (400, "messages")
        assert "either a prompt or messages, found both" in answer["error"]["message"]
    for body in ({"prompt": "a"}, {"messages": HELLO}):
        status, answer = server.post("/tokenize", body)
        TokenizeResponse.model_validate(answer)
        assert "token_strs" not in answer


@pytest.mark.parametrize("path", ["/health", "/v1/models", f"/v1/models/{MODEL}", "/v1/completions", "/tokenize"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])
def test_other_methods_are_405_and_named(server: ServerProcess, document: Any, path: str, method: str) -> None:
    described = {m.upper() for m in document["paths"][path.replace(MODEL, "{name}")]}
    allowed = described | ({"HEAD"} if "GET" in described else set())
    answer = requests.request(method, server.url + path, timeout=30, headers={"X-Request-Id": "mine"})
    assert (answer.status_code == 405) == (method not in allowed)
    assert answer.headers["X-Request-Id"] == "mine"
    if answer.status_code == 405:
        assert {name.strip() for name in answer.headers["Allow"].split(",")} == allowed
        assert answer.headers["Content-Type"] == "application/json"


def test_a_path_that_is_not_there_is_404_whatever_comes_with_it(server: ServerProcess) -> None:
    for method in ("GET", "POST", "PUT"):
        answer = requests.request(method, server.url + "/v1/images/generations", data=b"x", timeout=30)
        assert answer.status_code == 404
        assert ErrorResponse.model_validate_json(answer.content).error.code == "not_found"


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n%s\r\n", 413),
        (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}", 415),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 70_000 + b"\r\n\r\n", 431),
        (b"nonsense\r\n\r\n", 400),
        (b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n", 404),
    ],
)
def test_refusals_before_a_body_is_read_are_as_described(server: ServerProcess, head: bytes, status: int) -> None:
    head = head.replace(b"%s", b"Content-Type: application/json\r\n")
    with socket.create_connection(("127.0.0.1", server.port), 10) as sock:
        sock.sendall(head)
        with sock.makefile("rb") as answer:
            assert int(answer.readline().split()[1]) == status
            headers = {}
            while (line := answer.readline().strip()) != b"":
                name, _, value = line.partition(b": ")
                headers[name.lower()] = value
            assert headers[b"content-type"] == b"application/json"
            assert headers[b"x-request-id"]
            ErrorResponse.model_validate_json(answer.read(int(headers[b"content-length"])))
