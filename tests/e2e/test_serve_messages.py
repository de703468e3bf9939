"""The Messages API through the official anthropic client: a model that follows scripts, real processes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from fixtures import ServerProcess, fetch
from scripted_llama import make_scripted_llama

TEMPLATE = (
    "{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}"
    "{% endfor %}"
)
CALLS, THINK, TEXT, CUT = "<ask:calls>", "<ask:think>", "<ask:text>", "<ask:cut>"
SCRIPTS = [
    [
        *(CALLS, "On it.\n\n", "<tool_call>", '\n{"name": "weather", ', '"arguments": {"city', '": "Pa', 'ris }"'),
        *("}}", "\n", "</tool_call>", "<tool_call>\n", '{"name": "clock", "arguments": {}}', "\n</tool_call>"),
    ],
    [
        *(THINK, "<think>", "I ", "wonder.", "</think>", "\n\n", "<tool_call>{", '"name": "clock"'),
        *(', "arguments": {"z', '":1}}'),
    ],
    [TEXT, "Just", " some", " text", ". END", " of it"],
    [CUT, '<tool_call>{"name": "weather", "arguments"', ': {"city": "', "Bo", "nn"],
]
MODEL = "scripted"
WEATHER = {
    "name": "weather",
    "input_schema": {
        **{"type": "object", "properties": {"city": {"enum": ["Paris", "Bonn"]}}},
        **{"required": ["city"], "additionalProperties": False},
    },
}
CLOCK = {"name": "clock", "input_schema": {"type": "object", "additionalProperties": False}}
TOOLS: Any = [WEATHER, CLOCK]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    special = ("<tool_call>", "</tool_call>", "<think>", "</think>")
    folder = make_scripted_llama(tmp_path_factory.mktemp("models") / MODEL, SCRIPTS, TEMPLATE, special)
    options = ["--target", "reference", "--reasoning-parser", "qwen3", "--api-key", "a-key"]
    with ServerProcess("--model", str(folder), *options) as process:
        process.wait_ready()
        yield process


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[anthropic.Anthropic]:
    options: Any = {"max_retries": 0, "timeout": 60, "_strict_response_validation": True}
    with anthropic.Anthropic(base_url=server.url, api_key="a-key", **options) as client:
        yield client


def asked(text: str, **options: Any) -> dict[str, Any]:
    greedy = {"temperature": 0, **options.pop("extra_body", {})}
    messages = [{"role": "user", "content": text}]
    return {"model": MODEL, "messages": messages, "max_tokens": 100, "extra_body": greedy, **options}


def plain(message: Any) -> dict[str, Any]:
    """Without what is new each time."""
    found = message.model_dump(exclude={"id": True, "content": {"__all__": {"id", "parsed_output"}}}, exclude_none=True)
    found["usage"].pop("cache_read_input_tokens")
    found["usage"].pop("input_tokens")
    return found


@pytest.mark.parametrize("text", [CALLS, THINK, TEXT, CUT])
def test_a_stream_is_the_whole_message(client: anthropic.Anthropic, text: str) -> None:
    whole = client.messages.create(**asked(text, tools=TOOLS))
    with client.messages.stream(**asked(text, tools=TOOLS)) as stream:
        kinds = {event.type for event in stream}
        streamed = stream.get_final_message()
    assert plain(streamed) == plain(whole)
    assert kinds >= {"message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop"}
    assert whole._request_id
    assert stream.request_id not in (None, whole._request_id)


def test_blocks(client: anthropic.Anthropic) -> None:
    message = client.messages.create(**asked(CALLS, tools=TOOLS))
    text, weather, clock = message.content
    assert text.text == "On it."
    assert (weather.name, weather.input) == ("weather", {"city": "Paris }"})
    assert (clock.name, clock.input) == ("clock", {})
    assert message.stop_reason == "tool_use"
    assert weather.id != clock.id
    thinking, call = client.messages.create(**asked(THINK, tools=TOOLS)).content
    assert (thinking.thinking, call.input) == ("I wonder.", {"z": 1})
    message = client.messages.create(**asked(CUT, tools=TOOLS))
    assert message.content[0].input == {}
    assert message.stop_reason == "end_turn"
    one: Any = {"type": "auto", "disable_parallel_tool_use": True}
    assert len(client.messages.create(**asked(CALLS, tools=TOOLS, tool_choice=one)).content) == 2


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_a_call_that_must_be_made_is_made(client: anthropic.Anthropic, choice: Any, stream: bool) -> None:
    options = asked(TEXT, tools=TOOLS, tool_choice={**choice, "disable_parallel_tool_use": True}, max_tokens=200)
    if stream:
        with client.messages.stream(**options) as events:
            message: Any = events.get_final_message()
    else:
        message = client.messages.create(**options)
    (call,) = message.content
    assert message.stop_reason == "tool_use"
    assert call.name == "weather" or choice["type"] == "any"
    assert call.name != "weather" or call.input["city"] in ("Paris", "Bonn")


def test_a_conversation_with_results(client: anthropic.Anthropic) -> None:
    first = client.messages.create(**asked(CALLS, tools=TOOLS))
    results = [
        {"type": "tool_result", "tool_use_id": block.id, "content": TEXT}
        for block in first.content
        if block.type == "tool_use"
    ]
    turns = [
        {"role": "user", "content": CALLS},
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": results},
    ]
    second = client.messages.create(**asked("", tools=TOOLS) | {"messages": turns})
    assert second.content[0].text == "Just some text. END of it"
    counted = client.messages.count_tokens(model=MODEL, messages=turns, tools=TOOLS)
    assert second.usage.cache_read_input_tokens is not None
    assert counted.input_tokens == second.usage.input_tokens + second.usage.cache_read_input_tokens


def test_a_last_message_of_the_assistant_is_continued(client: anthropic.Anthropic) -> None:
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "Just some"}]
    message = client.messages.create(**asked("") | {"messages": turns})
    assert message.content[0].text == " text. END of it"


def test_why_it_ended(client: anthropic.Anthropic) -> None:
    message = client.messages.create(**asked(TEXT, stop_sequences=["!", "END"]))
    assert (message.content[0].text, message.stop_reason) == ("Just some text. ", "stop_sequence")
    assert message.stop_sequence == "END"
    message = client.messages.create(**asked(TEXT, max_tokens=2))
    assert (message.content[0].text, message.stop_reason) == ("Just some", "max_tokens")
    assert message.usage.output_tokens == 2
    assert client.messages.create(**asked(TEXT)).stop_reason == "end_turn"


def test_structured_output(client: anthropic.Anthropic) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    form: Any = {"format": {"type": "json_schema", "schema": schema}, "effort": "low"}
    answer = client.messages.with_raw_response.create(**asked(TEXT, output_config=form))
    assert json.loads(answer.parse().content[0].text)["a"] in (1, 2)
    assert answer.headers["X-Llmctl-Warning"] == "output_config.effort: this model's chat template does not read it"


def test_errors_are_the_clients_own(client: anthropic.Anthropic, server: ServerProcess) -> None:
    def refused(kind: type[anthropic.APIStatusError], **options: Any) -> str:
        with pytest.raises(kind) as caught:
            client.messages.create(**asked(TEXT, **options))
        body: Any = caught.value.body
        assert body["request_id"] == caught.value.request_id
        return f"{body['error']['type']}: {body['error']['message']}"

    assert refused(anthropic.NotFoundError, model="other").startswith("not_found_error: the model 'other'")
    said = refused(anthropic.BadRequestError, stop_sequences=["x"] * 65)
    assert said.startswith("invalid_request_error: stop_sequences: ")
    said = refused(anthropic.BadRequestError, tools=TOOLS, tool_choice={"type": "tool", "name": "x"})
    assert said.startswith("invalid_request_error: tool_choice: expected one of the request's tools")
    # Found out in the worker: before a stream's status, too.
    form = {"format": {"type": "json_schema", "schema": {"type": "string", "pattern": "("}}}
    for options in ({}, {"stream": True}):
        said = refused(anthropic.BadRequestError, output_config=form, **options)
        assert said.startswith("invalid_request_error: output_config.format")
    with anthropic.Anthropic(base_url=server.url, api_key="wrong", max_retries=0) as other:
        with pytest.raises(anthropic.AuthenticationError) as caught:
            other.messages.create(**asked(TEXT))
        assert caught.value.body["error"]["type"] == "authentication_error"  # type: ignore[index, call-overload]


def test_what_was_asked_is_counted_as_of_others(client: anthropic.Anthropic, server: ServerProcess) -> None:
    def series(start: str) -> float:
        _, text = fetch(server.url + "/metrics", headers={"X-Api-Key": "a-key"})
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(start))

    counted = ("llmctl:request_generation_tokens_sum{", 'http_requests_total{handler="/v1/messages",method="POST"')
    before = [series(start) for start in counted]
    message = client.messages.create(**asked(TEXT))
    assert [series(start) for start in counted] == [before[0] + message.usage.output_tokens, before[1] + 1]
