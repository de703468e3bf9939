"""A long body's first fault is told in the words of the parser of the whole, and without what that makes."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from posixpath import normpath
from typing import Any

import pytest
from serving.posting import answer_of, app_without_worker
from serving.scripted_worker import INFO
from starlette.applications import Starlette

from llmctl.errors import RequestError
from llmctl.serving import body, first_fault
from llmctl.serving.first_fault import check_first_fault
from llmctl.serving.outline import Outline
from llmctl.serving.protocol import (
    ApiModel,
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeChatRequest,
)
from llmctl.serving.responses_api.protocol import ResponsesRequest
from llmctl.serving.responses_api.translate import chat_of
from llmctl.serving.tools.history import template_message
from llmctl.serving.tools.traits import TemplateTraits

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from refusal_bodies import bodies

MESSAGE: dict[str, Any] = {"role": "user", "content": "a"}
PART = {"type": "text", "text": "a"}
CALL = {"type": "function", "function": {"name": "f", "arguments": "{}"}}


def assistant(*calls: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [*[CALL] * 700, *calls, *[CALL] * 5]}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": [*[PART] * 700, *parts, *[PART] * 5]}


MESSAGES = [
    {"role": "x"}, {"content": "a"}, {"role": 5}, {"role": "user", "content": 5}, 5, None, "a", [], {},
    {"role": "user", "content": {"a": 1}}, {"role": "assistant", "tool_calls": 5},
    user({"type": "image"}), user({"type": "text"}), user({"text": "a"}), user(5), user({"type": "text", "text": None}),
    user({"type": "refusal", "refusal": "a"}), user({"type": "input_text", "text": "a"}),
    assistant({"function": {}}), assistant({"type": "x", "function": {"name": "f"}}), assistant("a"),
    assistant({"id": 5, "function": {"name": "f"}}), assistant({"function": {"name": "f", "arguments": "["}}),
    {"role": "assistant", "content": None, "extra": [1]},
]  # fmt: skip
IDS = [-1, "x", 5.0, 5.5, None, True, [5], {}, 10**30, -(10**30), "a,b", [1, 2], {"a": [1, 2], "b": "]"}]


def refusal(model: type[ApiModel], data: bytes) -> tuple[str, str | None] | None:
    """By the parser, and by what a chat's template is given."""
    try:
        made = body.parsed(data, Outline(data), model)
        if isinstance(made, ChatCompletionRequest | TokenizeChatRequest):
            for index, message in enumerate(made.messages):
                template_message(message, index)
        elif isinstance(made, ResponsesRequest):
            chat_of(made, TemplateTraits())
    except RequestError as error:
        return str(error), error.param
    return None


@pytest.mark.parametrize(
    ("model", "name", "good", "item"),
    [
        *((ChatCompletionRequest, "messages", MESSAGE, item) for item in MESSAGES),
        (TokenizeChatRequest, "messages", MESSAGE, {"role": "x"}),
        *((CompletionRequest, "prompt", 5, item) for item in IDS),
        *((DetokenizeRequest, "tokens", 5, item) for item in IDS),
    ],
)
@pytest.mark.parametrize("index", [0, -1])
def test_the_words_are_the_parsers(
    model: type[ApiModel], name: str, good: Any, item: Any, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = [good] * (600 if good is MESSAGE else 7000)
    items[index] = item
    data = json.dumps({name: items}).encode()
    assert len(data) > first_fault.LEAST_BYTES
    found = refusal(model, data)
    monkeypatch.setattr(body, "check_first_fault", lambda *_: None)
    assert found == refusal(model, data)


LONG = "a" * 1000
ITEM = {"type": "message", "role": "user", "content": "a"}
OTHER_KINDS = [
    {"type": "function_call", "call_id": "c", "name": "f", "arguments": json.dumps({"a": LONG})},
    {"content": 5, "type": "function_call", "call_id": "c", "name": "f", "arguments": json.dumps({"a": LONG})},
    {"type": "function_call_output", "call_id": "c", "output": LONG},
    {"type": "reasoning", "content": [{"text": LONG, "type": "reasoning_text"}], "summary": []},
    {"type": "reasoning", "summary": [{"text": LONG, "type": "summary_text"}]},
    {"role": "assistant", "content": [{"type": "refusal", "refusal": LONG}]},
]
WRONG_ITEMS = [
    {"type": "function_call", "call_id": "c", "name": "f", "more": LONG},
    {"type": "function_call", "call_id": 5, "name": "f", "arguments": "{}", "more": LONG},
    {"type": "x", "more": LONG}, {"role": "x", "content": LONG}, {"role": "user", "more": LONG},
    {"role": "user", "content": [{"type": "input_text", "more": LONG}]},
    {"role": "user", "content": [PART] * 700 + [{"type": "input_image", "more": LONG}]},
    {"type": "function_call_output", "call_id": "c", "output": [PART] * 700 + [{"type": "input_file"}]},
]  # fmt: skip


@pytest.mark.parametrize("item", OTHER_KINDS)
def test_items_of_all_kinds_stand_beside_one_that_does_not_say_its_kind(item: dict[str, Any]) -> None:
    for first in (MESSAGE, ITEM):
        for items in ([item], [OTHER_KINDS[0], item], [item, item]):
            data = json.dumps({"input": [first] * 600 + items}).encode()
            check_first_fault(Outline(data), ResponsesRequest)
            ResponsesRequest.model_validate_json(data)


@pytest.mark.parametrize("item", WRONG_ITEMS)
@pytest.mark.parametrize("first", [MESSAGE, ITEM, OTHER_KINDS[0]])
def test_of_items_of_several_kinds_the_words_are_the_parsers(
    first: dict[str, Any], item: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for data in (
        json.dumps({"input": [*items]}).encode() for items in ([first] * 600 + [item], [item] + [first] * 600)
    ):
        with monkeypatch.context() as patch:
            found.append((data, refusal(ResponsesRequest, data)))
            patch.setattr(body, "check_first_fault", lambda *_: None)
            parsers = refusal(ResponsesRequest, data)
        assert found[-1][1] == parsers, (found[-1][1], parsers)
        assert parsers is not None


def test_a_long_part_of_another_kind_is_no_fault() -> None:
    part = {"type": "refusal", "refusal": LONG}
    data = json.dumps({"messages": [MESSAGE] * 600 + [{"role": "assistant", "content": [part]}]}).encode()
    assert refusal(ChatCompletionRequest, data) is None


@pytest.mark.parametrize(
    ("message", "accepted"),
    [
        ('{"role": 5, "role": "user", "content": "a"}', True),
        ('{"role": "user", "content": [1], "content": "a"}', True),
        (f'{{"role": "user", "content": [{json.dumps(PART)}, 1], "content": [{json.dumps(PART)}]}}', True),
        ('{"role": "assistant", "tool_calls": [{"function": 5}], "tool_calls": null}', True),
        ('{"role": "assistant", "tool_calls": [{"function": {"name": 5}, "function": []}]}', False),
    ],
)
def test_of_members_of_one_name_the_last_counts(message: str, accepted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    data = b'{"messages": [%s, %s]}' % (message.encode(), json.dumps([MESSAGE] * 600).encode()[1:-1])
    found = refusal(ChatCompletionRequest, data)
    assert (found is None) is accepted
    monkeypatch.setattr(body, "check_first_fault", lambda *_: None)
    assert found == refusal(ChatCompletionRequest, data)


@pytest.mark.parametrize("item", OTHER_KINDS)
def test_bytes_that_are_no_text_are_the_parsers_to_refuse(
    item: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    untyped = {"role": "user", "content": "a"}
    whole = json.dumps({"input": [untyped] * 300 + [item] * 300 + [{"role": "user", "content": "?"}]}).encode()
    data = whole.replace(b'"?"', b'"\xff"')
    found = refusal(ResponsesRequest, data)
    assert found is not None
    monkeypatch.setattr(body, "check_first_fault", lambda *_: None)
    assert found == refusal(ResponsesRequest, data)


def test_a_short_body_is_left_to_the_parser() -> None:
    data = json.dumps({"messages": [{"role": "x"}]}).encode()
    check_first_fault(Outline(data), ChatCompletionRequest)


@pytest.mark.parametrize("data", [b'{"a":' * 10**5, b"[" * 10**5])
def test_a_long_body_that_is_nested_too_deeply_is_refused_in_the_parsers_words(data: bytes) -> None:
    found = refusal(CompletionRequest, data)
    assert found is not None
    assert "recursion limit exceeded" in found[0]


def test_the_garbage_collector_runs_again_after_a_refusal() -> None:
    for data in (b"{", b'{"prompt": "a"}'):
        refusal(CompletionRequest, data)
        assert gc.isenabled()


# -- what a refusal costs -----------------------------------------------------------------------------------------

SIZE, MOST_RATIO = 100_000, 8


def many(unit: Any) -> list[Any]:
    return [unit] * (SIZE // (len(json.dumps(unit)) + 2))


FAULTS: dict[str, tuple[str, dict[str, Any]]] = {
    "ids": ("completions", {"prompt": [*many(5), -1]}),
    "last message": ("chat/completions", {"messages": [*many(MESSAGE), {"role": "x"}]}),
    "last part": ("chat/completions", {"messages": [{"role": "user", "content": [*many(PART), {"type": "image"}]}]}),
    "last call": ("chat/completions", {"messages": [{"role": "assistant", "tool_calls": [*many(CALL), {}]}]}),
}
OUTLINES: dict[str, tuple[str, dict[str, Any]]] = {
    "stop": ("completions", {"prompt": "a", "stop": many("a")}),
    "bad words": ("completions", {"prompt": "a", "bad_words": many("a")}),
    "temperature": ("chat/completions", {"temperature": -1, "messages": many(MESSAGE)}),
    "name": ("chat/completions", {"model": "x", "messages": many(MESSAGE)}),
    "name, embeddings": ("embeddings", {"model": "x", "input": many(5)}),
    "fields": ("chat/completions", {"model": "x", "messages": [MESSAGE], **{f"f{i}": i for i in range(SIZE // 15)}}),
    "schema": ("chat/completions", {"model": "x", "messages": [MESSAGE], "json_schema": {"a": many({"a": 1})}}),
    "tokens": ("../detokenize", {"model": "x", "tokens": many(5)}),
    "chat's tokens": ("../tokenize", {"model": "x", "messages": many(MESSAGE)}),
}


@pytest.fixture(scope="module", params=[131072])
def app(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starlette]:
    """A server with a long context, or another one, whose worker is not there."""
    with app_without_worker(tmp_path_factory.mktemp("model"), request.param) as made:
        yield made


async def refused(app: Starlette, path: str, fields: dict[str, Any]) -> float:
    """Posts a body that is to be refused; how many times its bytes were in use at once."""
    data = json.dumps(fields).encode()
    before, _ = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    await posted(app, normpath(f"/v1/{path}"), data)
    return (tracemalloc.get_traced_memory()[1] - before) / len(data)


async def posted(app: Starlette, where: str, data: bytes) -> tuple[int, bytes]:
    """Posts a body that is to be refused; status and body of the answer."""
    found = await answer_of(app, where, data)
    assert found[0] in (400, 404)
    return found


@pytest.mark.parametrize("name", FAULTS)
def test_a_first_fault_is_told_in_a_few_times_the_bytes_of_the_body(app: Starlette, name: str) -> None:
    """pydantic's objects of such messages are 17 times as large, and take eight times as long to make."""
    asyncio.run(refused(app, *FAULTS[name]))
    tracemalloc.start()
    try:
        ratio = asyncio.run(refused(app, *FAULTS[name]))
        left, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert ratio < MOST_RATIO
    assert left < SIZE


@pytest.mark.parametrize("name", OUTLINES)
def test_what_the_outline_tells_is_refused_before_anything_is_parsed(
    app: Starlette, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unparsed(*_: Any) -> None:
        raise AssertionError("parsed")

    monkeypatch.setattr(body, "parsed", unparsed)
    asyncio.run(refused(app, *OUTLINES[name]))


# -- every form, on every endpoint --------------------------------------------------------------------------------

MOST_SHARE = 0.15
FORMS = {f"{path} {name}": (path, data) for path, name, data in bodies(SIZE)}


@pytest.mark.parametrize("app", [8192], indirect=True)
@pytest.mark.parametrize("name", FORMS)
def test_the_parser_is_given_little_of_any_body_that_is_refused(
    app: Starlette, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, data = FORMS[name]
    given: list[int] = []
    validate = ApiModel.model_validate_json.__func__  # type: ignore[attr-defined]

    def watched(model: type[ApiModel], data: bytes) -> Any:
        given.append(len(data))
        return validate(model, data)

    monkeypatch.setattr(ApiModel, "model_validate_json", classmethod(watched))
    asyncio.run(posted(app, path, data))
    assert sum(given) <= MOST_SHARE * len(data)


OUTSIDE = INFO.vocab_size
WRONG_IDS: list[list[Any]] = [
    [OUTSIDE], [-1], [10**30], [OUTSIDE + 7, OUTSIDE], [5.5], ["5"], [True], [None], [[5]], [{}],
]  # fmt: skip
WRONG_BIASES: list[dict[str, Any]] = [
    {str(OUTSIDE): 1}, {"5": 101}, {"5": -100.5}, {"5": 10**400}, {"5": "1"}, {"5": None}, {"5": [1]}, {"5": True},
    {"05": 1}, {"-5": 1}, {"+5": 1}, {"5.0": 1}, {"5e0": 1}, {" 5": 1}, {"5\n": 1}, {"5,6": 1}, {"": 1}, {"x": 1},
    {"\u0665": 1}, {str(10**19): 1}, {str(10**18): 1}, {"5_0": 1}, {"-0": 1}, {"\ud7ff": 1},
]  # fmt: skip


def bodies_of_ids(draws: random.Random) -> Iterator[tuple[str, dict[str, Any]]]:
    """Long bodies that are refused for one of their ids, which is at the front, at the end or anywhere."""

    def among(wrong: list[Any]) -> list[Any]:
        found = [draws.randrange(INFO.vocab_size) for _ in range(6000)]
        place = draws.choice((0, len(found), draws.randrange(len(found))))
        return found[:place] + wrong + found[place:]

    for wrong in WRONG_IDS:
        for path, field in (("completions", "prompt"), ("embeddings", "input")):
            yield path, {field: among(wrong)}
            lists = [among([]), among([])]
            yield path, {field: [*lists[: draws.randrange(3)], among(wrong), *lists]}
        for field in ("stop_token_ids", "allowed_token_ids"):
            yield "completions", {"prompt": "a", field: among(wrong)}
        yield "../detokenize", {"tokens": among(wrong)}
    yield "completions", {"prompt": [among([]), []]}
    for biases in WRONG_BIASES:
        pairs = [(str(i), draws.choice((1, -0.5))) for i in range(10, INFO.vocab_size)]
        place = draws.choice((0, len(pairs), draws.randrange(len(pairs))))
        yield (
            "completions",
            {"prompt": "a" * 20_000, "logit_bias": dict([*pairs[:place], *biases.items(), *pairs[place:]])},
        )


@pytest.mark.parametrize("app", [131072], indirect=True)
def test_ids_are_refused_in_the_words_of_what_makes_something_of_them(
    app: Starlette, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path, fields in bodies_of_ids(random.Random(7)):
        data = json.dumps(fields).encode()
        early, late = with_and_without(app, normpath(f"/v1/{path}"), data, monkeypatch)
        assert early == late, data[-200:]


@pytest.mark.parametrize("app", [8192], indirect=True)
def test_every_form_is_refused_in_the_words_of_the_parser(app: Starlette, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, (path, data) in FORMS.items():
        early, late = with_and_without(app, path, data, monkeypatch)
        assert early == late, name


def with_and_without(
    app: Starlette, path: str, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> tuple[tuple[int, bytes], tuple[int, bytes]]:
    """The refusal of a body that is looked at before it is parsed, and of the same when it is not."""
    early = asyncio.run(posted(app, path, data))
    with monkeypatch.context() as patch:
        patch.setattr(body, "check_first_fault", lambda *_: None)
        return early, asyncio.run(posted(app, path, data))


def test_a_large_body_is_parsed_beside_the_event_loop(app: Starlette, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[bool] = []

    def parsed(*_: Any) -> None:
        threads.append(threading.current_thread() is threading.main_thread())
        raise RequestError("")

    monkeypatch.setattr(body, "parsed", parsed)
    for size in (1000, 200_000):
        for path in ("/v1/completions", "/tokenize"):
            asyncio.run(posted(app, path, json.dumps({"prompt": "a", "x": "a" * size}).encode()))
    assert threads == [True, True, False, False]
