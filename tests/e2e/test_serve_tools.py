"""Tools and reasoning through the official openai client: a model that follows scripts, real processes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from fixtures import ServerProcess, fetch
from scripted_llama import make_scripted_llama

from llmctl.serving.response_schema import ChatCompletion, ChatCompletionChunk

TEMPLATE = (
    "{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
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
        *("\n", "</tool_call>", "<tool_call>\n", '{"name": "clock", "arguments": {}}', "\n</tool_call>"),
    ],
    [
        *(THINK, "<think>", "I ", "wonder.", "</think>", "\n\n", "<tool_call>{", '"name": "clock"'),
        *(', "arguments": {"z', '":1}}'),
    ],
    [TEXT, "Just", " <tool", "_call>", " text", '. {"name"'],
    [CUT, '<tool_call>{"name": "weather", "arguments"', ': {"city": "', "Bo", "nn"],
]
MODEL = "scripted"
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                **{"type": "object", "properties": properties},
                **{"required": list(properties), "additionalProperties": False},
            },
        },
    }
    for name, properties in {"weather": {"city": {"enum": ["Paris", "Bonn"]}}, "clock": {}}.items()
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    special = ("<tool_call>", "</tool_call>", "<think>", "</think>")
    folder = make_scripted_llama(tmp_path_factory.mktemp("models") / MODEL, SCRIPTS, TEMPLATE, special)
    options = ["--target", "reference", "--enable-auto-tool-choice", "--reasoning-parser", "qwen3"]
    with ServerProcess("--model", str(folder), *options) as process:
        process.wait_ready()
        yield process


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def asked(text: str, **options: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], "temperature": 0, **options}


def calls_of(message: Any) -> list[tuple[str, Any]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or ()]


def test_calls_and_text(client: openai.OpenAI) -> None:
    (choice,) = client.chat.completions.create(**asked(CALLS, tools=TOOLS)).choices
    assert choice.message.content == "On it."
    assert calls_of(choice.message) == [("weather", {"city": "Paris }"}), ("clock", {})]
    assert choice.finish_reason == "tool_calls"
    ids = [call.id for call in choice.message.tool_calls or ()]
    assert len(set(ids)) == 2
    assert all(i.startswith("call_") for i in ids)
    (choice,) = client.chat.completions.create(**asked(CALLS, tools=TOOLS, parallel_tool_calls=False)).choices
    assert calls_of(choice.message) == [("weather", {"city": "Paris }"})]


@pytest.mark.parametrize("text", [CALLS, THINK, TEXT, CUT])
def test_a_stream_is_the_whole_message(client: openai.OpenAI, text: str) -> None:
    whole = client.chat.completions.create(**asked(text, tools=TOOLS, logprobs=True))
    with client.chat.completions.stream(**asked(text, tools=TOOLS, logprobs=True)) as stream:
        events = list(stream)
        streamed = stream.get_final_completion()
    for one, other in zip(whole.choices, streamed.choices, strict=True):
        assert (one.message.content, one.finish_reason) == (other.message.content, other.finish_reason)
        assert calls_of_raw(one.message) == calls_of_raw(other.message)
        assert getattr(one.message, "reasoning_content", None) == getattr(other.message, "reasoning_content", None)
        assert one.logprobs is not None
        assert other.logprobs is not None
        tokens = [entry.token for entry in one.logprobs.content or ()]
        script = next(script for script in SCRIPTS if script[0] == text)
        assert tokens == [entry.token for entry in other.logprobs.content or ()] == [*script[1:], "<|im_end|>"]
    if text == CALLS:
        assert sum(event.type == "tool_calls.function.arguments.delta" for event in events) > 3


def calls_of_raw(message: Any) -> list[tuple[str, str]]:
    return [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]


def test_reasoning_then_a_call(client: openai.OpenAI) -> None:
    (choice,) = client.chat.completions.create(**asked(THINK, tools=TOOLS)).choices
    assert choice.message.reasoning_content == "I wonder."  # type: ignore[attr-defined]
    assert choice.message.content is None
    assert calls_of(choice.message) == [("clock", {"z": 1})]


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_format_is_of_the_answer_after_the_reasoning(client: openai.OpenAI, stream: bool) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    options = asked(THINK, response_format=wanted, max_tokens=40)
    if stream:
        chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**options, stream=True)]
        reasoning = "".join(getattr(chunk.delta, "reasoning_content", None) or "" for chunk in chunks)
        content, reason = "".join(chunk.delta.content or "" for chunk in chunks), chunks[-1].finish_reason
    else:
        (choice,) = client.chat.completions.create(**options).choices
        reasoning, content, reason = choice.message.reasoning_content, choice.message.content, choice.finish_reason
    assert (reasoning, reason) == ("I wonder.", "stop")
    assert json.loads(content)["a"] in (1, 2)


def test_a_call_that_must_be_made_comes_after_the_reasoning(client: openai.OpenAI) -> None:
    options = asked(THINK, tools=TOOLS, tool_choice="required", max_tokens=100, parallel_tool_calls=False)
    (choice,) = client.chat.completions.create(**options).choices
    assert choice.message.reasoning_content == "I wonder."  # type: ignore[attr-defined]
    assert len(calls_of(choice.message)) == 1
    assert choice.finish_reason == "tool_calls"


def test_text_stays_text_and_what_is_cut_off_is_no_finished_call(client: openai.OpenAI) -> None:
    (choice,) = client.chat.completions.create(**asked(TEXT, tools=TOOLS)).choices
    assert (choice.message.content, choice.finish_reason) == ('Just <tool_call> text. {"name"', "stop")
    (choice,) = client.chat.completions.create(**asked(CUT, tools=TOOLS)).choices
    assert calls_of_raw(choice.message) == [("weather", '{"city": "Bonn')]
    assert choice.finish_reason == "stop"
    for options in ({"tools": TOOLS, "tool_choice": "none"}, {}):
        (choice,) = client.chat.completions.create(**asked(CALLS, **options)).choices  # type: ignore[arg-type]
        assert choice.message.tool_calls is None
        assert choice.message.content is not None
        assert '{"name": "weather"' in choice.message.content


def test_functions_are_answered_as_functions(client: openai.OpenAI) -> None:
    functions = [tool["function"] for tool in TOOLS]
    (choice,) = client.chat.completions.create(**asked(CALLS, functions=functions)).choices
    assert choice.message.function_call is not None
    assert choice.message.function_call.name == "weather"
    assert choice.finish_reason == "function_call"
    chunks = list(client.chat.completions.create(**asked(CALLS, functions=functions, stream=True)))
    deltas = [chunk.choices[0].delta.function_call for chunk in chunks if chunk.choices[0].delta.function_call]
    assert deltas[0].name == "weather"
    assert json.loads("".join(delta.arguments or "" for delta in deltas)) == {"city": "Paris }"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_that_must_be_made_is_made(client: openai.OpenAI, choice: Any, stream: bool) -> None:
    options = asked(TEXT, tools=TOOLS, tool_choice=choice, max_tokens=200, parallel_tool_calls=False)
    if stream:
        with client.chat.completions.stream(**options) as events:
            completion: Any = events.get_final_completion()
    else:
        completion = client.chat.completions.create(**options)
    (made,) = completion.choices
    ((name, arguments),) = calls_of(made.message)
    assert made.finish_reason == "tool_calls"
    assert made.message.content is None
    assert name in ({"weather"} if isinstance(choice, dict) else {"weather", "clock"})
    assert name != "weather" or arguments["city"] in ("Paris", "Bonn")


def test_a_conversation_with_results(client: openai.OpenAI, server: ServerProcess) -> None:
    (first,) = client.chat.completions.create(**asked(CALLS, tools=TOOLS)).choices
    results = [{"role": "tool", "tool_call_id": c.id, "content": TEXT} for c in first.message.tool_calls or ()]
    messages = [{"role": "user", "content": CALLS}, first.message.model_dump(exclude_none=True), *results]
    (second,) = client.chat.completions.create(**asked("", tools=TOOLS) | {"messages": messages}).choices  # type: ignore[call-overload]
    assert second.message.content == 'Just <tool_call> text. {"name"'
    messages[1]["tool_calls"][1]["function"]["arguments"] = '{"broken'
    status, answer = server.post("/v1/chat/completions", {"messages": messages})
    assert status == 400
    assert "messages[1].tool_calls[1].function.arguments" in answer["error"]["message"]


@pytest.mark.parametrize("text", [CALLS, THINK, CUT])
def test_answers_are_as_described(server: ServerProcess, text: str) -> None:
    for tools in ({"tools": TOOLS}, {"functions": [tool["function"] for tool in TOOLS]}):
        status, answer = server.post("/v1/chat/completions", asked(text, **tools))
        assert status == 200
        ChatCompletion.model_validate(answer)
        _, events = fetch(server.url + "/v1/chat/completions", json.dumps(asked(text, stream=True, **tools)).encode())
        for line in events.split("\n\n")[:-2]:
            ChatCompletionChunk.model_validate_json(line.removeprefix("data: "))


STRICT: Any = [{**tool, "function": {**tool["function"], "strict": True}} for tool in TOOLS]


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("text", [CALLS, THINK, CUT])
def test_strict_tools_hold_the_calls_that_a_model_chooses_to_make(
    client: openai.OpenAI, text: str, parallel: bool
) -> None:
    """Of what the scripts say, "Paris }" is no city, "z" no argument, and "Bonn" breaks off."""
    options = asked(text, tools=STRICT, max_tokens=100, parallel_tool_calls=parallel)
    answer = client.chat.completions.with_raw_response.create(**options)
    assert "X-Llmctl-Warning" not in answer.headers
    (choice,) = answer.parse().choices
    with client.chat.completions.stream(**options) as events:
        (streamed,) = events.get_final_completion().choices
    assert streamed.message.content == choice.message.content
    assert calls_of_raw(streamed.message) == calls_of_raw(choice.message)
    if choice.finish_reason == "length":
        choice.message.tool_calls = (choice.message.tool_calls or [])[:-1]
    for name, arguments in calls_of(choice.message):
        assert arguments == {} if name == "clock" else arguments in ({"city": "Paris"}, {"city": "Bonn"})
    first, _ = calls_of(choice.message)[0]
    assert first == ("clock" if text == THINK else "weather")
    assert parallel or len(choice.message.tool_calls or ()) == 1
    assert (getattr(choice.message, "reasoning_content", None) or "").startswith("I wonder." if text == THINK else "")


def test_a_strict_that_is_not_enforced_is_said(client: openai.OpenAI, server: ServerProcess) -> None:
    answer = client.chat.completions.with_raw_response.create(**asked(CALLS, tools=TOOLS))
    assert "X-Llmctl-Warning" not in answer.headers
    assert "calls as hermes (by the chat template)" in server.output
    other = asked(TEXT, tools=STRICT, response_format={"type": "json_object"}, max_tokens=4)
    answer = client.chat.completions.with_raw_response.create(**other)
    assert "strict" in answer.headers["X-Llmctl-Warning"]
