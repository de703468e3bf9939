"""The Responses API through the official openai client: a model that follows scripts, real processes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
import requests
from fixtures import ServerProcess
from openai.types.responses import Response
from pydantic import BaseModel
from scripted_llama import make_scripted_llama

from llmctl.serving.responses_api.schema import ResponseObject, ResponseStreamEvent

TEMPLATE = (
    "{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.reasoning_content }}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}"
    "{% endfor %}"
)
CALLS, THINK, TEXT, CUT = "<ask:calls>", "<ask:think>", "<ask:text>", "<ask:cut>"
SCRIPTS = [
    [
        *(
            CALLS,
            "On it.\n\n",
            "<tool_call>",
            '\n{"name": "weather", ',
            '"arguments": {"city',
            '": "Pa',
            'ris }"',
            "}}",
        ),
        *("\n", "</tool_call>", "<tool_call>\n", '{"name": "clock", "arguments": {}}', "\n</tool_call>", "\nBye."),
    ],
    [
        *(THINK, "<think>", "I ", "wonder.", "</think>", "\n\n", "So: ", "<tool_call>{", '"name": "clock"'),
        *(', "arguments": {"z', '":1}}'),
    ],
    [TEXT, "Just", " <tool", "_call>", " text", '. {"name"'],
    [CUT, '<tool_call>{"name": "weather", "arguments"', ': {"city": "', "Bo", "nn"],
]
MODEL = "scripted"
CITY = {"type": "object", "properties": {"city": {"enum": ["Paris", "Bonn"]}}, "required": ["city"]}
TOOLS: Any = [
    {"type": "function", "name": "weather", "parameters": {**CITY, "additionalProperties": False}},
    {"type": "function", "name": "clock", "parameters": {"type": "object", "additionalProperties": False}},
]
ASKED: list[dict[str, Any]] = [
    {"input": CALLS, "tools": TOOLS},
    {"input": CALLS, "tools": TOOLS, "parallel_tool_calls": False},
    {"input": THINK, "tools": TOOLS, "reasoning": {"effort": "low", "summary": "auto"}},
    {"input": CUT, "tools": TOOLS, "tool_choice": "auto"},
    {"input": CALLS, "tools": TOOLS, "max_output_tokens": 4},
    {"input": TEXT, "tools": TOOLS, "include": ["message.output_text.logprobs"], "top_logprobs": 2},
    {"input": THINK, "top_logprobs": 1, "metadata": {"a": "b"}, "user": "me", "store": True},
    {"input": [{"role": "user", "content": TEXT}], "max_output_tokens": 2, "instructions": "Be brief."},
    {"input": TEXT, "top_logprobs": 1, "extra_body": {"stop": [" text"], "top_k": 5}},
]
OURS = {"store", "bytes", "phase"}
"""Members that OpenAI answers, or might, and its types do not have."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    special = ("<tool_call>", "</tool_call>", "<think>", "</think>")
    folder = make_scripted_llama(tmp_path_factory.mktemp("models") / MODEL, SCRIPTS, TEMPLATE, special)
    with ServerProcess("--model", str(folder), "--target", "reference", "--reasoning-parser", "qwen3") as process:
        process.wait_ready()
        yield process


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    options = {"api_key": "none", "max_retries": 0, "timeout": 60, "_strict_response_validation": True}
    with openai.OpenAI(base_url=server.url + "/v1", **options) as client:
        yield client


def sent(body: dict[str, Any]) -> dict[str, Any]:
    """What the client sends of its options."""
    return {name: value for name, value in body.items() if name != "extra_body"} | body.get("extra_body", {})


def asked(**options: Any) -> dict[str, Any]:
    return {"model": MODEL, "temperature": 0, **options}


def shapes(response: Any) -> list[Any]:
    """What the items say, without their ids."""
    made = []
    for item in response.output:
        if item.type == "function_call":
            made.append((item.type, item.status, item.name, item.arguments))
        else:
            made.append((item.type, item.status, [part.text for part in item.content]))
    return made


def test_items_in_the_order_in_which_they_are_written(client: openai.OpenAI) -> None:
    response = client.responses.create(**asked(**ASKED[0]))
    assert shapes(response) == [
        ("message", "completed", ["On it."]),
        ("function_call", "completed", "weather", '{"city": "Paris }"}'),
        ("function_call", "completed", "clock", "{}"),
        ("message", "completed", ["\nBye."]),
    ]
    assert response.status == "completed"
    assert response.output_text == "On it.\nBye."
    assert response.tools[0].to_dict()["name"] == "weather"
    response = client.responses.create(**asked(**ASKED[2]))
    assert shapes(response) == [
        ("reasoning", "completed", ["I wonder."]),
        ("message", "completed", ["So:"]),
        ("function_call", "completed", "clock", '{"z":1}'),
    ]
    assert response.usage is not None
    assert response.usage.output_tokens == 11
    assert 2 <= response.usage.output_tokens_details.reasoning_tokens < 11


def test_what_is_cut_off_is_incomplete(client: openai.OpenAI) -> None:
    response = client.responses.create(**asked(**ASKED[4]))
    assert shapes(response)[-1] == ("function_call", "incomplete", "weather", '{"city')
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    response = client.responses.create(**asked(**ASKED[3]))
    assert (shapes(response), response.status) == (
        [("function_call", "incomplete", "weather", '{"city": "Bonn')],
        "completed",
    )


@pytest.mark.parametrize("number", range(len(ASKED)))
def test_a_stream_is_the_whole_response(client: openai.OpenAI, number: int) -> None:
    whole = client.responses.create(**asked(**ASKED[number]))
    with client.responses.stream(**asked(**ASKED[number])) as stream:
        events: list[Any] = list(stream)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    last = events[-1].response
    assert events[-1].type == f"response.{whole.status}"
    assert shapes(last) == shapes(whole)
    assert last.usage.total_tokens == whole.usage.total_tokens  # type: ignore[union-attr]
    texts: dict[str, str] = {}
    for event in events:
        if event.type.endswith(".delta"):
            texts[event.item_id] = texts.get(event.item_id, "") + event.delta
    found = [texts.get(item.id, "") for item in last.output]
    said = [s[3] if s[0] == "function_call" else s[2][0] for s in shapes(whole)]
    assert found == said


def known_to(model: BaseModel) -> None:
    assert set(model.model_extra or ()) <= OURS
    for name in type(model).model_fields:
        value = getattr(model, name)
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, BaseModel):
                known_to(item)


@pytest.mark.parametrize("number", range(len(ASKED)))
def test_answers_are_as_described_and_as_openai_knows_them(server: ServerProcess, number: int) -> None:
    body = sent(asked(**ASKED[number]))
    answer = requests.post(server.url + "/v1/responses", json=body, timeout=60)
    ResponseObject.model_validate_json(answer.content)
    known_to(Response.model_validate_json(answer.content, strict=True))
    stream = requests.post(server.url + "/v1/responses", json={**body, "stream": True}, timeout=60)
    *events, rest = stream.content.split(b"\n\n")
    assert rest == b""
    for event in events:
        name, data = event.split(b"\n")
        found = ResponseStreamEvent.model_validate_json(data.removeprefix(b"data: ")).root
        assert name.decode() == f"event: {found.type}"


def test_log_probabilities_are_those_of_the_messages_tokens(client: openai.OpenAI) -> None:
    response: Any = client.responses.create(**asked(**ASKED[5]))
    (part,) = response.output[0].content
    assert [entry.token for entry in part.logprobs] == [*SCRIPTS[2][1:], "<|im_end|>"]
    assert {len(entry.top_logprobs) for entry in part.logprobs} == {2}
    response = client.responses.create(**asked(input=CALLS, tools=TOOLS, top_logprobs=1))
    first, _, _, last = response.output
    assert [entry.token for entry in first.content[0].logprobs] == ["On it.\n\n"]
    assert [entry.token for entry in last.content[0].logprobs] == ["\nBye.", "<|im_end|>"]


class City(BaseModel):
    city: Literal["Paris", "Bonn"]


def test_parse(client: openai.OpenAI) -> None:
    response = client.responses.parse(**asked(input=TEXT, text_format=City, max_output_tokens=60))
    assert response.output_parsed is not None
    assert response.output_parsed.city in ("Paris", "Bonn")
    with client.responses.stream(**asked(input=TEXT, text_format=City, max_output_tokens=60)) as stream:
        assert stream.get_final_response().output_parsed == response.output_parsed
    response = client.responses.create(
        **asked(input=TEXT, text={"format": {"type": "json_object"}}, max_output_tokens=30)
    )
    assert response.output_text.startswith("{")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "choice",
    [
        "required",
        {"type": "function", "name": "weather"},
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "weather"}]},
    ],
)
def test_a_call_that_must_be_made_is_made(client: openai.OpenAI, choice: Any, stream: bool) -> None:
    options = asked(input=TEXT, tools=TOOLS, tool_choice=choice, max_output_tokens=200, parallel_tool_calls=False)
    if stream:
        with client.responses.stream(**options) as events:
            response: Any = events.get_final_response()
    else:
        response = client.responses.create(**options)
    ((kind, status, name, arguments),) = shapes(response)
    assert (kind, status) == ("function_call", "completed")
    assert name in (("weather", "clock") if choice == "required" else ("weather",))
    assert name != "weather" or json.loads(arguments)["city"] in ("Paris", "Bonn")


def test_a_conversation_with_results(client: openai.OpenAI, server: ServerProcess) -> None:
    first = client.responses.create(**asked(input=THINK, tools=TOOLS))
    items: list[Any] = [{"role": "user", "content": THINK}, *(item.to_dict() for item in first.output)]
    call = next(item for item in first.output if item.type == "function_call")
    items.append({"type": "function_call_output", "call_id": call.call_id, "output": TEXT})
    second = client.responses.create(**asked(input=items, tools=TOOLS))
    assert second.output_text == 'Just <tool_call> text. {"name"'
    items[-2]["arguments"] = '{"broken'
    status, answer = server.post("/v1/responses", {"input": items})
    assert (status, answer["error"]["param"]) == (400, "input")
    assert "input[3].arguments" in answer["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_what_does_not_fit_is_left_out_where_that_is_asked_for(
    client: openai.OpenAI, server: ServerProcess, stream: bool
) -> None:
    said = [{"role": ("user", "assistant")[i % 2], "content": f"{i}: " + "word " * (i % 7)} for i in range(90)]
    input_: Any = [{"role": "developer", "content": "Be brief."}, *said, {"role": "user", "content": TEXT}]
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        client.responses.create(**asked(input=input_))

    def tokens(dropped: int) -> int:
        left = [{"role": "system", "content": "S"}, input_[0], *input_[1 + dropped :]]
        _, found = server.post("/tokenize", {"messages": left})
        return int(found["count"])

    options = asked(input=input_, instructions="S", truncation="auto", max_output_tokens=20)
    if stream:
        with client.responses.stream(**options) as events:
            response: Any = events.get_final_response()
    else:
        response = client.responses.create(**options)
    assert response.output_text == 'Just <tool_call> text. {"name"'
    assert response.truncation == "auto"
    _, found = server.post("/tokenize", {"prompt": "a"})
    room = int(found["max_model_len"]) - 20
    fewest = next(dropped for dropped in range(len(said)) if tokens(dropped) <= room)
    assert fewest > 5
    assert response.usage.input_tokens == tokens(fewest)
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        client.responses.create(**asked(input=[{"role": "user", "content": "word " * 600}], truncation="auto"))


def test_nothing_is_kept(client: openai.OpenAI) -> None:
    response = client.responses.create(**asked(input=TEXT, store=True))
    assert response.to_dict()["store"] is False
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.delete(response.id)
    with pytest.raises(openai.BadRequestError, match="keeps no responses"):
        client.responses.create(**asked(input=TEXT, previous_response_id=response.id))


@pytest.mark.parametrize(
    ("options", "param", "said"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools", "no hosted tools"),
        ({"background": True}, "background", "use stream"),
        ({"truncation": "x"}, "truncation", "truncation: "),
        ({"max_output_tokens": 100_000}, "max_output_tokens", "lower max_output_tokens"),
        ({"max_output_tokens": -5}, "max_output_tokens", "max_output_tokens: "),
        ({"max_output_tokens": 2, "min_tokens": 3}, "min_tokens", "at most max_output_tokens"),
        ({"max_tokens": 5}, "max_tokens", "use max_output_tokens"),
        ({"top_logprobs": 1000}, "top_logprobs", "top_logprobs: "),
        ({"input": TEXT * 5000}, "input", "maximum context length"),
        ({"input": [{"role": "user", "content": "a"}] * 5000}, "input", "5000 items"),
        (
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}}},
            "text.format",
            "text.format: ",
        ),
        (
            {"text": {"format": {"type": "json_object"}}, "regex": "a"},
            "regex",
            "found text.format and regex",
        ),
        (
            {"regex": "a", "tools": TOOLS, "tool_choice": "required"},
            "tool_choice",
            "found regex and tool_choice",
        ),
        ({"tool_choice": "required"}, "tool_choice", "only with tools"),
        (
            {
                "tools": TOOLS,
                "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "x"}]},
            },
            "tool_choice",
            "found 'x'",
        ),
    ],
)
def test_refusals_name_the_fields_of_this_api(
    server: ServerProcess, options: dict[str, Any], param: str, said: str
) -> None:
    status, answer = server.post("/v1/responses", asked(**{"input": TEXT, **options}))
    assert (status, answer["error"]["param"]) == (400, param)
    assert said in answer["error"]["message"]


def test_an_effort_that_cannot_be_told_is_said(client: openai.OpenAI) -> None:
    answer = client.responses.with_raw_response.create(**asked(input=TEXT, reasoning={"effort": "high"}))
    assert "reasoning.effort" in answer.headers["X-Llmctl-Warning"]
    answer = client.responses.with_raw_response.create(**asked(input=TEXT))
    assert "X-Llmctl-Warning" not in answer.headers
