"""Structured output of a real server, through the openai client: every target's answers are held by their grammar."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from fixtures import ServerProcess
from pydantic import BaseModel

MODEL = "tiny-llama"
NAMED = ("response_format", "n", "stream", "stream_options", "seed", "logprobs")
MESSAGES: Any = [{"role": "user", "content": "hello"}]


class Address(BaseModel):
    street: str
    zip: int


class Person(BaseModel):
    kind: Literal["person", "robot"]
    happy: bool
    homes: list[Address]


# Random logits end a text seldom: texts are short here.
SHORT = {"type": "string", "maxLength": 4}
SCHEMA = {"type": "object", "properties": {"a": SHORT, "n": {"enum": [1, 2]}}, "required": ["a", "n"]}


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as made:
        yield made


def chat(client: openai.OpenAI, **fields: Any) -> Any:
    options = {"model": MODEL, "messages": MESSAGES, "max_tokens": 60, "seed": 1}
    extra = {name: fields.pop(name) for name in list(fields) if name not in NAMED}
    return client.chat.completions.create(**options | fields, extra_body=extra)


def test_parse_gives_the_pydantic_model(client: openai.OpenAI) -> None:
    for seed in range(20):
        try:
            answer = client.chat.completions.parse(
                model=MODEL,
                messages=MESSAGES,
                response_format=Person,
                seed=seed,
                max_tokens=400,
            )
        except openai.LengthFinishReasonError:
            continue
        assert isinstance(answer.choices[0].message.parsed, Person)
        return
    pytest.fail("no output ended within 400 tokens")


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"guided_regex": "[0-9]{3}-[a-f]{2}"}, "[0-9]{3}-[a-f]{2}"),
        ({"regex": "[0-9]{3}"}, "[0-9]{3}"),
        ({"guided_choice": ["yes", "no, é"]}, "yes|no, é"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
        ({"grammar": 'root ::= ("ab" | "c"){2} "."'}, r"(ab|c){2}\."),
        ({"ebnf": 'root ::= "x" y\ny ::= [0-9]{2}'}, "x[0-9]{2}"),
        ({"guided_grammar": 'start: "a" B\nB: /[0-9]{3}/'}, "a[0-9]{3}"),
    ],
)
def test_grammars_hold(client: openai.OpenAI, fields: dict[str, Any], pattern: str) -> None:
    answer = chat(client, n=4, **fields)
    assert len(answer.choices) == 4
    for choice in answer.choices:
        assert re.fullmatch(pattern, choice.message.content)
        assert (choice.finish_reason, choice.stop_reason) == ("stop", None)


def test_all_forms_of_a_schema_give_the_same_output(client: openai.OpenAI) -> None:
    named = {"name": "s", "schema": SCHEMA}
    forms: list[dict[str, Any]] = [
        {"response_format": {"type": "json_schema", "json_schema": named | {"strict": True}}},
        {"response_format": {"type": "json_schema", "json_schema": named | {"strict": False}}},
        {"guided_json": SCHEMA},
        {"json_schema": json.dumps(SCHEMA)},
        {"structured_outputs": {"json": SCHEMA}},
    ]
    texts = {chat(client, **form).choices[0].message.content for form in forms}
    assert len(texts) == 1


def test_a_stream_is_the_whole_and_completions_take_the_same_fields(
    client: openai.OpenAI,
) -> None:
    fields = {"guided_regex": "[é-ü]{5}"}
    whole = chat(client, **fields).choices[0].message.content
    parts = [chunk.choices[0].delta.content or "" for chunk in chat(client, stream=True, **fields)]
    assert "".join(parts) == whole
    answer = client.completions.create(model=MODEL, prompt="a", extra_body=fields)
    assert re.fullmatch("[é-ü]{5}", answer.choices[0].text)


def test_what_is_forced_comes_at_once_and_is_counted(client: openai.OpenAI, server: ServerProcess) -> None:
    before = server.metric("llmctl:generation_tokens_forced_total")
    fields = {"guided_regex": "[a-c]: and what follows is the same in every output"}
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}, **fields))
    usage, deltas = chunks[-1].usage, [chunk.choices[0].delta.content for chunk in chunks[:-1]]
    assert server.metric("llmctl:generation_tokens_forced_total") > before
    assert len([text for text in deltas if text]) < usage.completion_tokens - 5
    scored = chat(client, logprobs=True, **fields)  # token by token
    assert scored.choices[0].message.content == "".join(text or "" for text in deltas)
    assert len(scored.choices[0].logprobs.content) == scored.usage.completion_tokens == usage.completion_tokens


def test_length_is_told_when_max_tokens_cuts(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=3, extra_body={"regex": "[0-9]{50}"}
    )
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"guided_json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"guided_regex": "(a"}, "unclosed group"),
        ({"grammar": "root ::= x"}, "rule 'x' is not defined"),
    ],
)
def test_what_the_worker_refuses_is_a_400(
    client: openai.OpenAI, fields: dict[str, Any], said: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError, match=re.escape(said)) as caught:
        chat(client, stream=stream, **fields)
    assert caught.value.param == next(iter(fields))


def test_a_dead_end_is_a_400_and_ends_all_samples(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="the output cannot go on"):
        chat(client, n=3, regex="abc", allowed_token_ids=[5])
    assert chat(client, regex="abc").choices[0].message.content == "abc"


@pytest.mark.slow
def test_the_cpu_target(tiny_llama: Path) -> None:
    with ServerProcess("--model", str(tiny_llama), "--target", "cpu") as server:
        server.wait_ready()
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            for choice in chat(client, n=8, guided_regex="[0-9]{3}-[a-f]{2}").choices:
                assert re.fullmatch("[0-9]{3}-[a-f]{2}", choice.message.content)
