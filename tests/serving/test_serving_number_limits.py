"""Numbers that no field of a request holds: refused in the API's own words, by every endpoint that has numbers. Those
that a field holds, its bounds among them, are taken: so nothing but the number is what the others are refused for."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from serving.posting import answer_of, app_without_worker
from starlette.applications import Starlette

from llmctl.errors import LlmctlError
from llmctl.serving.openapi import describe

MESSAGES = [{"role": "user", "content": "a"}]
TGI = {"inputs": "a"}
LEAST: Mapping[str, Mapping[str, Any]] = {
    "/v1/completions": {"prompt": "a"},
    "/v1/chat/completions": {"messages": MESSAGES, "logprobs": True},
    "/v1/embeddings": {"input": "a"},
    "/v1/responses": {"input": "a"},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 5},
    "/v1/messages/count_tokens": {"messages": MESSAGES},
    "/generate": TGI,
    "/generate_stream": TGI,
    "/": TGI,
    "/detokenize": {},
}
"""Of each endpoint that has numbers, what it cannot do without."""
BESIDE = {"thinking": {"type": "enabled"}, "parameters": {"details": True, "do_sample": True}}
ONLY_ONE = {("/v1/completions", "best_of"), ("/generate_stream", "best_of")}
"""More than one is refused whatever the limit."""
OF_THE_MODEL = {"dimensions", "input", "max_completion_tokens", "max_new_tokens", "max_output_tokens", "max_tokens"} | {
    *("allowed_token_ids", "min_tokens", "prompt", "stop_token_ids", "tokens"),
}
"""How large these may be the model says, not the API."""
HUGE = [sign + digits for sign in ("", "-") for digits in ("1" + 400 * "0", "1e400", "1e4000000", "9" * 5000)]
DOCUMENT = describe("m", with_keys=False)


def resolved(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    while "$ref" in schema:
        name = schema["$ref"].removeprefix("#/components/schemas/")
        schema = DOCUMENT["components"]["schemas"][name]
    return schema


def numbers_of(
    schema: Mapping[str, Any], at: tuple[str | int, ...] = ()
) -> Iterator[tuple[tuple[str | int, ...], Mapping[str, Any]]]:
    """Each number in a body, by its path, and its schema."""
    schema = resolved(schema)
    if schema.get("type") in ("integer", "number"):
        yield at, schema
    for one in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
        yield from numbers_of(one, at)
    if schema.get("type") == "array":
        yield from numbers_of(schema["items"], (*at, 0))
    for name, one in schema.get("properties", {}).items():
        yield from numbers_of(one, (*at, name))
    for one in schema.get("patternProperties", {}).values():
        yield from numbers_of(one, (*at, "5"))


def fields() -> Iterator[tuple[str, tuple[str | int, ...], Mapping[str, Any]]]:
    for path, item in DOCUMENT["paths"].items():
        content = item.get("post", {}).get("requestBody", {}).get("content", {})
        for at, schema in numbers_of(content["application/json"]["schema"]) if content else ():
            yield path, at, schema


FIELDS = list(fields())


def with_number(path: str, at: tuple[str | int, ...], number: str) -> bytes:
    """A body of which all is right but for a number, perhaps."""
    value: Any = "the number"
    for step in reversed(at[1:]):
        value = [value] if isinstance(step, int) else {step: value}
    if at[0] in BESIDE:
        value |= BESIDE[str(at[0])]
    return json.dumps({**LEAST[path], at[0]: value}).replace('"the number"', number).encode()


def beyond(schema: Mapping[str, Any]) -> Iterator[str]:
    """What is just outside the bounds that are described."""
    step = 1 if schema["type"] == "integer" else 0.5
    yield from (str(schema[name] - step) for name in ("minimum",) if name in schema)
    yield from (str(schema[name] + step) for name in ("maximum",) if abs(schema.get(name, 1e300)) < 1e300)
    yield from (str(schema[name]) for name in ("exclusiveMinimum", "exclusiveMaximum") if name in schema)
    yield from ("true", '"5"', "[]", "{}", "NaN", "Infinity")
    if schema["type"] == "integer":
        yield from ("5.5", "1e0")


def within(schema: Mapping[str, Any]) -> Iterator[str]:
    """A number that is held, and the bounds."""
    yield "1"
    if schema["type"] == "number":
        yield "0.5"
    yield from (str(schema[name]) for name in ("minimum", "maximum") if name in schema)


class TakenError(LlmctlError):
    """The engine would have it now."""

    http_status = 503


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starlette]:
    with app_without_worker(tmp_path_factory.mktemp("model"), 8000, 384) as made, pytest.MonkeyPatch.context() as patch:

        def generate(*_: Any) -> None:
            raise TakenError("taken")

        patch.setattr(made.state.context.client, "generate", generate)
        yield made


def test_all_endpoints_with_numbers_are_here() -> None:
    assert {path for path, _, _ in FIELDS} == set(LEAST)


def test_every_number_has_bounds() -> None:
    """What is tried beyond them comes from the description, and would go with a bound that is deleted."""
    for path, at, schema in FIELDS:
        name = [step for step in at if isinstance(step, str)][-1]
        assert schema.keys() & {"minimum", "exclusiveMinimum"}, (path, at)
        assert name in OF_THE_MODEL or schema.keys() & {"maximum", "exclusiveMaximum"}, (path, at)


@pytest.mark.parametrize(("path", "at", "schema"), FIELDS, ids=[f"{path} {at}" for path, at, _ in FIELDS])
def test_a_number_that_no_field_holds_is_refused(
    app: Starlette, path: str, at: tuple[str | int, ...], schema: Mapping[str, Any]
) -> None:
    for number in (*HUGE, *beyond(schema)):
        if number == '"5"' and at[0] in ("prompt", "input"):
            continue  # a list of texts
        status, answer = asyncio.run(answer_of(app, path, with_number(path, at, number)))
        assert status in (400, 422), (number[:40], status, answer[:200])
        assert json.loads(answer)["error"], number[:40]
        assert len(answer) < 1000, number[:40]


@pytest.mark.parametrize(("path", "at", "schema"), FIELDS, ids=[f"{path} {at}" for path, at, _ in FIELDS])
def test_a_number_that_its_field_holds_is_taken(
    app: Starlette, path: str, at: tuple[str | int, ...], schema: Mapping[str, Any]
) -> None:
    for number in within(schema):
        if (path, at[-1]) in ONLY_ONE and number != "1":
            continue
        status, answer = asyncio.run(answer_of(app, path, with_number(path, at, number)))
        assert (status == 503 and b"taken" in answer) or status == 200, (number, status, answer[:200])
