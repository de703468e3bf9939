"""What is looked at in a long body lets pass all that the parser does: no body is refused because it is long."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from llmctl.errors import RequestError
from llmctl.serving import body, first_fault
from llmctl.serving.adapter_schema import LoadAdapterRequest
from llmctl.serving.body_shape import shape_of
from llmctl.serving.embedding_schema import EmbeddingRequest
from llmctl.serving.messages_api.protocol import CountTokensRequest, MessagesRequest
from llmctl.serving.outline import Outline
from llmctl.serving.protocol import (
    ApiModel,
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeRequest,
)
from llmctl.serving.responses_api.protocol import ResponsesRequest
from llmctl.serving.responses_api.translate import chat_of
from llmctl.serving.tgi_api.protocol import CompatGenerateRequest, GenerateRequest
from llmctl.serving.tools.history import template_message
from llmctl.serving.tools.traits import TemplateTraits

PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "more": [1]}]
CALLS = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
CHAT: dict[str, Any] = {
    "model": "m",
    "messages": [
        {"role": "system", "content": "a"},
        {"role": "user", "content": PARTS, "name": "x"},
        {"role": "assistant", "content": None, "tool_calls": CALLS},
        {"role": "assistant", "function_call": {"name": "f", "arguments": {"a": 1}}},
        {"role": "tool", "content": "a", "tool_call_id": "c"},
    ],
    "tools": [
        {"type": "function", "function": {"name": "f", "parameters": SCHEMA, "strict": True}},
        {"type": "function", "function": {"name": "g", "description": "a"}},
    ],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "documents": [{"a": "b"}, {}],
    "chat_template_kwargs": {"a": [1, {"b": None}]},
    "continue_final_message": False,
}
SAMPLING: dict[str, Any] = {
    "n": 2, "seed": -5, "stop": ["a", "b"], "temperature": 1, "top_p": 0.5, "logit_bias": {"5": 1, "6": -1.5},
    "top_k": 5, "stop_token_ids": [1, 2], "bad_words": ["a"], "min_tokens": 0, "priority": -3, "user": "u",
    "stream": True, "stream_options": {"include_usage": True, "x": 1}, "guided_choice": ["a", "b"],
    "structured_outputs": {"regex": "a"}, "json_schema": True, "x": [[1]], "use_beam_search": False,
}  # fmt: skip
TURNS = [
    {"role": "user", "content": "a"},
    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "thinking", "thinking": "a"}]},
    {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {"a": [1]}}]},
    {
        "role": "user",
        "content": [
            {"type": "tool_result", "tool_use_id": "a", "content": "a", "is_error": False},
            {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "a"}]},
        ],
    },
]
CONVERSATION: dict[str, Any] = {
    "messages": TURNS, "system": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}],
    "tools": [{"name": "f", "input_schema": SCHEMA}, {"type": "custom", "name": "g", "input_schema": {}}],
    "tool_choice": {"type": "tool", "name": "f"}, "thinking": {"type": "enabled", "budget_tokens": 5},
    "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}, "effort": "low"}, "mcp_servers": [],
}  # fmt: skip
ITEMS = [
    {"role": "user", "content": "a"},
    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
    {"type": "reasoning", "summary": [{"type": "summary_text", "text": "a"}], "content": [{"text": "a"}]},
    {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "a"}]},
]
VALID: list[tuple[type[ApiModel], dict[str, Any]]] = [
    (
        ChatCompletionRequest,
        {**CHAT, **SAMPLING, "response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
    ),
    (
        ChatCompletionRequest,
        {"messages": CHAT["messages"][:1], "stop": "a", "tool_choice": "auto", "functions": [{"name": "f"}]},
    ),
    (TokenizeChatRequest, CHAT),
    (TokenizeRequest, {"prompt": "a", "return_token_strs": True}),
    (DetokenizeRequest, {"tokens": [1, 2, 3]}),
    *((CompletionRequest, {"prompt": p, **SAMPLING}) for p in ("a", [1, 2], ["a", "b"], [[1], [2, 3]], [], [[]])),
    *((EmbeddingRequest, {"input": p, "tools": [], "dimensions": 3}) for p in ("a", [1, 2], ["a", "b"], [[1], [2, 3]])),
    (
        MessagesRequest,
        {**CONVERSATION, "max_tokens": 5, "stop_sequences": ["a"], "top_p": 0.5, "n": 1, "logit_bias": {}},
    ),
    (CountTokensRequest, {**CONVERSATION, "system": "a"}),
    (ResponsesRequest, {"input": ITEMS, "include": ["file_search_call.results"], "metadata": {"a": "b"}}),
    (ResponsesRequest, {"input": ITEMS[:1] * 3, "text": {"format": {"type": "text"}}, "tool_choice": "required"}),
    *((ResponsesRequest, {"input": items}) for items in (ITEMS[:1] + ITEMS[3:], ITEMS[3:] + ITEMS[:2])),
    (
        ResponsesRequest,
        {
            "input": "a",
            "tools": [{"type": "function", "name": "f", "parameters": SCHEMA}],
            "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]},
            "reasoning": {"effort": "low"},
            **{k: v for k, v in SAMPLING.items() if k != "n"},
        },
    ),
    (
        GenerateRequest,
        {"inputs": "a", "parameters": {"stop": ["a"], "top_k": 5, "grammar": {"type": "json", "value": SCHEMA}}},
    ),
    (
        CompatGenerateRequest,
        {"inputs": "a", "stream": True, "parameters": {"grammar": {"type": "regex", "value": "a"}}},
    ),
    (LoadAdapterRequest, {"lora_name": "a", "lora_path": "b", "load_inplace": True}),
]
VALUES = (
    None, True, False, 0, 1, -1, 5.0, 0.5, 10**30, -(10**30), "", "a", "text", "user", "x" * 2000, "]" * 2000,
    "}" * 2000, [], {}, [5], ["a"], [[5]], [None], {"a": 1}, {"type": "text"}, {"type": "x"}, {"role": "x"}, [{}], [[]],
    [-1], {"type": "image"},
)  # fmt: skip


@pytest.fixture(autouse=True)
def _every_body_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_fault, "LEAST_BYTES", 0)
    monkeypatch.setattr(first_fault, "_SHORT", 8)


def refusal(model: type[ApiModel], data: bytes) -> RequestError | None:
    """Of the parser, or of what makes messages of its own of a chat's."""
    try:
        made = body.parsed(data, Outline(data), model)
        if isinstance(made, ChatCompletionRequest | TokenizeChatRequest):
            for index, message in enumerate(made.messages):
                template_message(message, index, string_arguments=True)
        elif isinstance(made, ResponsesRequest):
            chat_of(made, TemplateTraits())
    except RequestError as error:
        return error
    return None


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a value with each of its keys."""
    for key, inner in [*(value.items() if isinstance(value, dict) else enumerate(value))]:
        yield value, key
        if isinstance(inner, dict | list):
            yield from places(inner)


def changed(fields: dict[str, Any], draws: random.Random) -> dict[str, Any]:
    """With one value replaced, left out, added or doubled."""
    made = copy.deepcopy(fields)
    place, key = draws.choice([*places(made)])
    match draws.randrange(8):
        case 0:
            del place[key]
        case 1 if isinstance(place, list):
            place.append(copy.deepcopy(draws.choice([*place, *VALUES])))
        case 1:
            place[draws.choice(("type", "role", "content", "name", "x"))] = draws.choice(VALUES)
        case 2 if isinstance(place, list):
            place.extend(copy.deepcopy(place[key]) for _ in range(20))
        case _:
            place[key] = copy.deepcopy(draws.choice(VALUES))
    return made


@pytest.mark.parametrize(("model", "fields"), VALID)
def test_a_valid_body_passes(model: type[ApiModel], fields: dict[str, Any]) -> None:
    assert refusal(model, json.dumps(fields).encode()) is None


@pytest.mark.parametrize(("model", "fields"), VALID)
def test_what_is_refused_is_the_parsers_to_say(
    model: type[ApiModel], fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    draws = random.Random(json.dumps(fields))
    bodies = []
    for _ in range(150):
        made = changed(fields, draws)
        bodies.append(json.dumps(changed(made, draws) if draws.random() < 0.3 and made else made).encode())
    found = [refusal(model, data) for data in bodies]
    monkeypatch.setattr(body, "check_first_fault", lambda *_: None)
    for data, early in zip(bodies, found, strict=True):
        late = refusal(model, data)
        assert (early is None) == (late is None), (data, early, late)


REFUSED = {"messages": [{"role": "user", "content": "a"}], "guided_decoding_backend": 0}


@pytest.mark.parametrize("value", ["]" * 2000, "}" * 2000, " ]" * 2000, [0] * 2000, [[]] * 2000, {"a": "}" * 2000}])
def test_a_long_value_of_a_refused_field_is_refused(value: Any) -> None:
    error = refusal(ChatCompletionRequest, json.dumps(REFUSED | {"guided_decoding_backend": value}).encode())
    assert error is not None
    assert error.param == "guided_decoding_backend"


@pytest.mark.parametrize("broken", [b'"\xff"', b'"\xed\xa0\x80"', b'"\x01"', b"[" * 5000, b"1" * 5000, b"nul"])
@pytest.mark.parametrize("faults", [{"logit_bias": {"1": "x"}}, {"metadata": {"a": 1}}, {"stop": [1]}])
def test_what_is_no_json_behind_a_fault_is_refused_too(faults: dict[str, Any], broken: bytes) -> None:
    """The decoder of a field stops at its first fault, and has not seen what follows."""
    for model, fields in ((ChatCompletionRequest, REFUSED), (ResponsesRequest, {"input": "a"})):
        fields = {name: value for name, value in fields.items() if value != 0}
        data = json.dumps(fields | faults).encode()
        for end in (b"}}", b"]}"):
            if data.endswith(end):
                more = b', "2": ' if end == b"}}" else b", "
                assert refusal(model, data.removesuffix(end) + more + broken + end) is not None


def test_every_field_but_any_has_a_type_and_any_is_skipped() -> None:
    fields = shape_of(ChatCompletionRequest).fields
    assert fields["structural_tag"][0].type is msgspec.Raw
    assert [name for name, found in fields.items() if found[0].type is msgspec.Raw] == [
        "guided_decoding_backend",
        "guided_whitespace_pattern",
        "structural_tag",
    ]
    assert len(shape_of(CompletionRequest).fields["prompt"]) == 3
