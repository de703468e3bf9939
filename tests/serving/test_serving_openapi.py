"""The description of the API: a valid document, true of the routes, of who may ask, and of what a field may hold."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import pytest
import requests
import schemathesis
import uvicorn
from documented_refusals import DOCUMENTED
from fixtures import make_tokenizer
from hypothesis import HealthCheck, Phase, settings
from schemathesis.config import SchemathesisConfig
from starlette.applications import Starlette

from llmctl.config import ServeConfig
from llmctl.engine.deadline import NO_DEADLINE
from llmctl.errors import RequestError
from llmctl.serving.app import create_app
from llmctl.serving.body import parsed
from llmctl.serving.client import AsyncEngineClient
from llmctl.serving.context import ServerContext
from llmctl.serving.embedding_schema import EmbeddingRequest
from llmctl.serving.embeddings import check_shape
from llmctl.serving.error_shapes import SHAPES, shape_of
from llmctl.serving.http_protocol import BoundedHttpProtocol
from llmctl.serving.intake import Intake
from llmctl.serving.keys import ServerKeys
from llmctl.serving.messages_api.protocol import MessagesRequest
from llmctl.serving.messages_api.translate import chat_request
from llmctl.serving.metrics import ServerMetrics
from llmctl.serving.middleware import LIVENESS_PATHS
from llmctl.serving.openapi import describe
from llmctl.serving.operations import ERROR_MODELS
from llmctl.serving.outline import Outline
from llmctl.serving.protocol import ChatCompletionRequest, CompletionRequest, SamplingFields
from llmctl.serving.redaction import Redactor
from llmctl.serving.responses_api.protocol import ResponsesRequest
from llmctl.serving.responses_api.translate import chat_of
from llmctl.serving.tenants import deadline_of
from llmctl.serving.tgi_api.protocol import GenerateParameters, GenerateRequest
from llmctl.serving.tgi_api.translate import check_parameters, completion_request, parameters_of
from llmctl.text.tokenizer import Tokenizer

MODEL = "m"
KEY = "a-key"
NOT_DESCRIBED = {"/openapi.json", "/docs", "/ui/{name}"}


def app(**options: Any) -> Starlette:
    """An app whose engine has not been started."""
    config = ServeConfig(**options)
    metrics = ServerMetrics(MODEL)
    keys = ServerKeys(config.api_key, config.priority_keys)
    client = AsyncEngineClient(config, metrics, stall_timeout=60)
    return create_app(ServerContext(config, (MODEL,), client, metrics, keys, Redactor(keys)))


@pytest.mark.parametrize("with_keys", [False, True])
def test_the_document_is_valid_openapi(with_keys: bool) -> None:
    document = describe(MODEL, with_keys=with_keys)
    schemathesis.openapi.from_dict(document).validate()
    text = json.dumps(document)
    assert '"422"' not in text
    assert "$defs" not in text
    for schema in document["components"]["schemas"].values():
        jsonschema_rs.Draft202012Validator({**schema, "components": document["components"]})


def test_every_route_is_described_and_nothing_else() -> None:
    made = app()
    routes = {
        (method.lower(), route.path.replace("{name:path}", "{name}"))
        for route in made.routes
        if route.path not in NOT_DESCRIBED
        for method in route.methods - {"HEAD"}
    } - {("get", "/")}  # the page, which is no part of the API
    document = describe(MODEL, with_keys=False)
    described = {(method, path) for path, item in document["paths"].items() for method in item}
    assert described == routes
    assert all("HEAD" in r.methods for r in made.routes if "GET" in r.methods)


@pytest.mark.parametrize("with_keys", [False, True])
def test_a_key_is_asked_for_where_the_gate_asks(with_keys: bool) -> None:
    document = describe(MODEL, with_keys=with_keys)
    assert ("apiKey" in document["components"].get("securitySchemes", {})) == with_keys
    open_paths = {
        path
        for path, item in document["paths"].items()
        for operation in item.values()
        if not operation.get("security", document.get("security"))
    }
    assert open_paths == ({"/health", "/ready"} if with_keys else set(document["paths"]))
    refuses = {path for path, item in document["paths"].items() for o in item.values() if "401" in o["responses"]}
    assert refuses == (set(document["paths"]) - open_paths)


# What a field may hold, against what is done with it

LONG = "x" * 257
FUNCTION: dict[str, Any] = {"name": "f", "parameters": {"type": "object"}}
TOOL: dict[str, Any] = {"type": "function", "function": FUNCTION}
FLAT_TOOL: dict[str, Any] = {"type": "function", **FUNCTION}
CALL: dict[str, Any] = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 20, 21, 128, 129, 0.5, 1.5, -2, 2.5, -2.5, 1e300, sys.float_info.max, 1e-320),
    *(2**31 - 1, 2**31, -(2**31), -(2**31) - 1, -(2**63), -(2**63) - 1, 2**64 - 1, 2**64, 10**40),
    *("", "a", "5", "none", "auto", "text", LONG, 4 * LONG, "ttft:300,itl:0.5", "itl:5,ttft:0", "itl:" + "9" * 61),
    *([], [""], ["a"], [LONG], [4 * LONG], ["a"] * 64, ["a"] * 65, ["a"] * 1025, ["a", 1], [" "]),
    *([1], [-1], [True], [0.5], [None], [[1]], [[]], [["a"]], [[1], "a"]),
    *({}, {"a": 1}, {"type": "text"}, {"type": "json_object"}, {"type": 1}, {"include_usage": True}),
    *({"include_usage": None}, {"messages": []}, {"tools": None}, {"enable_thinking": False}),
    *({"5": 1}, {"5": 100}, {"5": 100.5}, {"5": -101}, {"5": True}, {"5": "1"}, {"5": None}),
    *({"05": 1}, {" 5": 1}, {"+5": 1}, {"1_0": 1}, {"٣": 1}, {"x": 1}, {"": 1}, {"5\n": 1}, {"1" * 30: 1}),
    *([{}], [{"role": "user", "content": "a"}], [{"role": "user"}], [{"role": 1, "content": "a"}]),
    [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
    [{"role": "user", "content": [{"type": "text", "text": None}]}],
    [{"role": "user", "content": [{"type": "text"}]}],
    [{"role": "user", "content": [{"type": "image_url", "text": "a"}]}],
    [{"role": "assistant", "content": None}],
    *([TOOL], [{**TOOL, "type": "other"}], [FUNCTION], [{**FUNCTION, "name": "a b"}], ["required"], "required"),
    *({"type": "function", "function": {"name": "f"}}, {"name": "f"}, {"name": "g"}, {"name": 1}),
    *([{"role": "assistant", "tool_calls": made}] for made in (None, [], [{}], [CALL], [{**CALL, "type": "other"}])),
    *([FLAT_TOOL], [{"type": "web_search"}], {"type": "function", "name": "f"}, {"type": "web_search"}),
    {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]},
    {"type": "allowed_tools", "mode": "auto", "tools": []},
    *({"format": {"type": "json_object"}}, {"format": {"type": "json_schema", "name": "x", "schema": {}}}),
    *({"format": {"type": "json_schema"}}, {"verbosity": "low"}, {"effort": "low"}, {"effort": "most"}),
    *({"summary": "auto"}, {"summary": "detailed"}, ["message.output_text.logprobs"], ["everything"]),
    *({"a": "b"}, {"a": LONG}, {"a": 4 * LONG}, {LONG: "a"}, {str(i): "a" for i in range(17)}, "disabled", "in_memory"),
    *(
        [{"type": kind, "call_id": "1", "name": "f", "arguments": "{}"}]
        for kind in ("function_call", "web_search_call")
    ),
    [{"type": "function_call", "call_id": "1", "name": "f"}],
    [{"type": "function_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "a"}]}],
    [{"type": "function_call_output", "call_id": "1", "output": None}],
    *([{"type": "reasoning", "content": made}] for made in (None, [], [{"text": "a"}], [{"type": "reasoning_text"}])),
    *([{"type": "reasoning", "encrypted_content": "a"}], {"include_obfuscation": True}, {"include_obfuscation": False}),
    *([{"role": "assistant", "function_call": made}] for made in (None, {}, CALL["function"])),
    *({"type": "auto"}, {"type": "tool"}, {"type": "enabled"}, {"type": "adaptive", "display": "omitted"}),
    *({"format": {"type": "json_schema", "schema": {}}}, {"format": {}}, {"effort": "low"}, {"user_id": "a"}),
    *([{"name": "f", "input_schema": {}}], [{"name": "f"}], [{"type": "text", "text": "a"}], "standard"),
    [{"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {}}]}],
    *({"type": "regex", "value": "a"}, {"type": "regex", "value": {}}, {"type": "json", "value": True}),
]
WITH = {"tool_choice": {"tools": [TOOL]}, "function_call": {"functions": [FUNCTION]}}
"""What a field needs beside it, in OpenAI's chats."""
BESIDE = {"tool_choice": {"tools": [FLAT_TOOL]}}
"""The same of responses."""
REQUESTS: dict[type[Any], dict[str, Any]] = {
    CompletionRequest: {"prompt": "a", "max_tokens": 5},
    ChatCompletionRequest: {"messages": [{"role": "user", "content": "a"}], "max_tokens": 5, "logprobs": True},
    EmbeddingRequest: {"input": "a"},
    MessagesRequest: {"messages": [{"role": "user", "content": "a"}], "max_tokens": 5},
    GenerateParameters: {"details": True, "do_sample": True, "max_new_tokens": 5},
    ResponsesRequest: {"input": "a", "max_output_tokens": 5},
}
SHARED = SamplingFields.model_fields
COMPONENTS = describe(MODEL, with_keys=False)["components"]
FIELDS = [
    *((CompletionRequest, name) for name in CompletionRequest.model_fields),
    *((ChatCompletionRequest, name) for name in ChatCompletionRequest.model_fields if name not in SHARED),
    *((EmbeddingRequest, name) for name in EmbeddingRequest.model_fields if name not in SHARED),
    *((MessagesRequest, name) for name in MessagesRequest.model_fields),
    *((GenerateParameters, name) for name in GenerateParameters.model_fields),
    *((ResponsesRequest, name) for name in ResponsesRequest.model_fields if name in ResponsesRequest.__annotations__),
]


@pytest.fixture(scope="module")
def intake(tmp_path_factory: pytest.TempPathFactory) -> Intake:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    tokenizer = Tokenizer.from_folder(folder)
    return Intake(tokenizer, tokenizer.chat_template, max_model_len=4096, vocab_size=384, defaults={})


async def take_in(intake: Intake, model: type[Any], data: bytes) -> None:
    """What the endpoints do with a body before the engine sees any of it."""
    if model is GenerateParameters:
        data = b'{"inputs": "a", "parameters": %b}' % data
        given = parameters_of(parsed(data, Outline(data), GenerateRequest))
        check_parameters(given, stream=False)
        body: Any = completion_request("a", given, stream=False)
    elif model is MessagesRequest:
        body = chat_request(parsed(data, Outline(data), model))
    elif model is ResponsesRequest:
        body = chat_of(parsed(data, Outline(data), model), intake.tools.traits)
    else:
        body = parsed(data, Outline(data), model)
    deadline_of(body, NO_DEADLINE)
    if model is EmbeddingRequest:
        check_shape(body, 64)
        await intake.prompts(body.input, "input", add_special_tokens=body.add_special_tokens)
        return
    intake.num_sequences(body)
    if isinstance(body, CompletionRequest):
        params = await intake.completion_params(body)
        intake.fit_completion(params, body, await intake.completion_prompts(body))
    else:
        use = intake.tools.use(body)
        params = await intake.chat_params(body, use)
        intake.fit_chat(params, body, await intake.chat_prompt(body, len(data)), use)


async def refusals(intake: Intake, model: type[Any], name: str) -> list[RequestError | None]:
    """Of each value in the field ``name``."""
    found: list[RequestError | None] = []
    for value in VALUES:
        try:
            beside = {ChatCompletionRequest: WITH, ResponsesRequest: BESIDE}.get(model, {}).get(name, {})
            await take_in(intake, model, json.dumps({**REQUESTS[model], **beside, name: value}).encode())
            found.append(None)
        except RequestError as error:
            found.append(error)
    return found


@pytest.mark.parametrize(("model", "name"), FIELDS, ids=lambda v: v if isinstance(v, str) else v.__name__)
def test_a_field_takes_what_its_schema_allows_and_nothing_else(intake: Intake, model: type[Any], name: str) -> None:
    schema = COMPONENTS["schemas"][model.__name__]["properties"][name]
    validator = jsonschema_rs.Draft202012Validator({**schema, "components": COMPONENTS})
    found = asyncio.run(refusals(intake, model, name))
    for value, refusal in zip(VALUES, found, strict=True):
        if refusal is None or not (DOCUMENTED.search(str(refusal)) or _is_whole(value)):
            assert validator.is_valid(value) == (refusal is None), (value, refusal)
        assert refusal is None or refusal.http_status == 400
    assert None in found
    assert len(set(found)) > 1, "the values say nothing about this field"


def _is_whole(value: Any) -> bool:
    """An integer for JSON Schema, and for the server, as its description says, not."""
    return isinstance(value, float) and value.is_integer()


def test_integers_are_written_without_a_fraction(intake: Intake) -> None:
    """The one thing that JSON Schema allows and the types do not; the description says so."""
    assert "`5.0` is refused" in describe(MODEL, with_keys=False)["info"]["description"]
    with pytest.raises(RequestError, match="n: Input should be a valid integer, found float"):
        asyncio.run(take_in(intake, CompletionRequest, b'{"prompt": "a", "n": 1.0}'))


# A server that has no engine yet, and keys


@pytest.fixture(scope="module")
def starting() -> Iterator[str]:
    """Its address. It is never ready: what needs the engine is 503."""
    made = app(api_key=KEY)
    config = uvicorn.Config(made, http=BoundedHttpProtocol, log_config=None, lifespan="off", ws="none", port=0)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def session() -> Iterator[requests.Session]:
    with requests.Session() as session:
        yield session


keyed = schemathesis.openapi.from_dict(
    describe(MODEL, with_keys=True),
    config=SchemathesisConfig.from_dict(
        {
            "seed": 1,
            "generation": {"max-examples": 3, "deterministic": True, "database": "none"},
            "phases": {"coverage": {"enabled": False}},
            "checks": {"not_a_server_error": {"expected-statuses": ["2xx", "4xx", "503"]}},
        }
    ),
)


@keyed.parametrize()
@settings(
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate),
)
def test_a_starting_server_with_keys_answers_as_described(case: Any, starting: str, session: requests.Session) -> None:
    """The checks themselves leave the key out and send wrong ones."""
    case.call_and_validate(base_url=starting, session=session, headers={"Authorization": f"Bearer {KEY}"})


def test_no_key_and_a_wrong_one(starting: str) -> None:
    document = describe(MODEL, with_keys=True)
    for path, item in document["paths"].items():
        for method in item:
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}):
                answer = requests.request(method, starting + path, headers=headers, timeout=10)
                if path in LIVENESS_PATHS:
                    assert answer.status_code != 401
                else:
                    assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
                    ERROR_MODELS[shape_of(path)].model_validate_json(answer.content)


@pytest.mark.parametrize("path", [path for path in SHAPES if path != "/info"])
def test_what_gates_and_the_router_refuse_has_the_shape_of_the_path(starting: str, path: str) -> None:
    def status(method: str, path: str, **options: Any) -> int:
        headers = {"Authorization": f"Bearer {KEY}", "X-Request-Id": "mine", **options.pop("headers", {})}
        answer = requests.request(method, starting + path, headers=headers, timeout=10, **options)
        shape = shape_of(path)
        document = ERROR_MODELS[shape].model_validate_json(answer.content)
        assert getattr(document, "request_id", "mine") == "mine"
        assert answer.headers.get(shape.id_header or "X-Request-Id") == "mine"
        return answer.status_code

    json_type = {"Content-Type": "application/json"}
    assert status("POST", path, data=b"{}", headers={"Authorization": "Bearer wrong"}) == 401
    assert status("POST", path, data=b"{}") == 415
    assert status("POST", path, data=b"x" * (2**20 + 1), headers=json_type) == 413
    assert status("POST", path, json={}) == 503
    assert status("PUT", path) == 405
    if path != "/":
        assert status("POST", path + "/batches", json={}) == 404


def test_the_description_is_behind_the_key(starting: str) -> None:
    assert requests.get(starting + "/openapi.json", timeout=10).status_code == 401
    answer = requests.get(starting + "/openapi.json", headers={"Authorization": f"Bearer {KEY}"}, timeout=10)
    assert answer.status_code == 200
    assert requests.get(starting + "/redoc", headers={"Authorization": f"Bearer {KEY}"}, timeout=10).status_code == 404
