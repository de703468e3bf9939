"""The real server through the official openai client: tiny model, real engine, real processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from fixtures import LOOP_TEXT, ServerProcess

MODEL = "tiny-llama"
MESSAGES = [{"role": "user", "content": "why is a model a graph?"}]


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == MODEL
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=7, temperature=0, extra_body={"ignore_eos": True}
    )
    (choice,) = answer.choices
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 7
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 7


def test_chat_stream_equals_the_whole(client: openai.OpenAI) -> None:
    options = {"model": MODEL, "messages": MESSAGES, "max_tokens": 24, "temperature": 0}
    extra = {"ignore_eos": True}
    whole = client.chat.completions.create(**options, extra_body=extra)
    chunks = list(
        client.chat.completions.create(**options, extra_body=extra, stream=True, stream_options={"include_usage": True})
    )
    *content, usage = chunks
    assert content[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in content) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in content[:-1]] == [None] * (len(content) - 1)
    assert content[-1].choices[0].finish_reason == "length"
    assert usage.choices == []
    assert usage.usage is not None
    assert whole.usage is not None
    assert usage.usage.completion_tokens == whole.usage.completion_tokens == 24
    assert {c.id for c in chunks} == {chunks[0].id}


def test_completion_of_every_kind_of_prompt(client: openai.OpenAI, server: ServerProcess) -> None:
    _, tokens = server.post("/tokenize", {"prompt": "the fox"})
    ids = tokens["tokens"]
    options = {"model": MODEL, "max_tokens": 5, "temperature": 0}
    text = client.completions.create(prompt="the fox", **options).choices[0].text
    assert client.completions.create(prompt=ids, **options).choices[0].text == text
    both = client.completions.create(prompt=["the fox", "a graph"], **options)
    assert [c.index for c in both.choices] == [0, 1]
    assert both.choices[0].text == text
    assert client.completions.create(prompt=[ids, ids], **options).choices[1].text == text


def test_n_samples_differ_and_the_first_is_the_single_one(client: openai.OpenAI) -> None:
    options = {"model": MODEL, "prompt": "a model", "max_tokens": 12, "temperature": 1.0, "seed": 11}
    extra = {"ignore_eos": True}
    three = client.completions.create(**options, n=3, extra_body=extra)
    texts = [c.text for c in three.choices]
    assert len(set(texts)) == 3
    assert client.completions.create(**options, extra_body=extra).choices[0].text == texts[0]
    assert three.usage is not None
    assert three.usage.completion_tokens == 36

    streamed = ["", "", ""]
    for chunk in client.completions.create(**options, n=3, extra_body=extra, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts


def test_seed_is_reproducible(client: openai.OpenAI) -> None:
    def sample(seed: int) -> str:
        answer = client.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_tokens=16, temperature=1.5, seed=seed
        )
        return answer.choices[0].message.content or ""

    assert sample(5) == sample(5)
    assert sample(5) != sample(6)


def test_stop_string_ends_the_text_and_is_left_out(client: openai.OpenAI) -> None:
    options = {"model": MODEL, "prompt": "x é", "max_tokens": 40, "temperature": 0}
    free = client.completions.create(**options).choices[0]
    assert "🎉é" in free.text
    stopped = client.completions.create(**options, stop=["never", "🎉é"]).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.text == free.text.partition("🎉é")[0]
    kept = client.completions.create(**options, stop="🎉é", extra_body={"include_stop_str_in_output": True})
    assert kept.choices[0].text == stopped.text + "🎉é"
    streamed = client.completions.create(**options, stop="🎉é", stream=True)
    assert "".join(c.choices[0].text for c in streamed) == stopped.text


def test_stop_token_id(client: openai.OpenAI, server: ServerProcess) -> None:
    _, tokens = server.post("/tokenize", {"prompt": "🎉"})
    last = tokens["tokens"][-1]
    answer = client.completions.create(
        model=MODEL, prompt="x é", max_tokens=40, temperature=0, extra_body={"stop_token_ids": [last]}
    )
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].model_extra is not None
    assert answer.choices[0].model_extra["stop_reason"] == last


def test_characters_of_many_tokens_arrive_whole(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model=MODEL, prompt="x " + LOOP_TEXT, max_tokens=9 * 4, temperature=0, stream=True
    )
    pieces = [c.choices[0].text for c in stream]
    assert "".join(pieces) == LOOP_TEXT * 4
    assert all("\ufffd" not in piece for piece in pieces)
    assert set("".join(pieces)) == set(LOOP_TEXT)


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert answer.usage is not None
    assert len(logprobs.content) == answer.usage.completion_tokens
    for entry in logprobs.content:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].token == entry.token
        assert entry.logprob <= 0
        assert entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob
        assert entry.bytes is not None


def test_completion_logprobs_and_echo(client: openai.OpenAI) -> None:
    options = {"model": MODEL, "prompt": "the quick brown", "max_tokens": 3, "temperature": 0}
    plain = client.completions.create(**options, logprobs=2).choices[0]
    assert plain.logprobs is not None
    assert plain.logprobs.tokens is not None
    assert len(plain.logprobs.tokens) == 3
    echoed = client.completions.create(**options, logprobs=2, echo=True).choices[0]
    assert echoed.text == "the quick brown" + plain.text
    assert echoed.logprobs is not None
    assert echoed.logprobs.tokens is not None
    assert echoed.logprobs.token_logprobs is not None
    assert echoed.logprobs.token_logprobs[0] is None
    assert echoed.logprobs.token_logprobs[-3:] == pytest.approx(plain.logprobs.token_logprobs, abs=1e-4)
    assert all(p is not None and p <= 0 for p in echoed.logprobs.token_logprobs[1:])
    assert len(echoed.logprobs.tokens) == len(echoed.logprobs.token_logprobs) > 3

    only = client.completions.create(**{**options, "max_tokens": 0}, logprobs=1, echo=True).choices[0]
    assert only.text == "the quick brown"
    assert only.logprobs is not None
    assert only.logprobs.token_logprobs == pytest.approx(echoed.logprobs.token_logprobs[:-3], abs=1e-4)


def test_prompt_logprobs_agree_with_echo(client: openai.OpenAI, server: ServerProcess) -> None:
    body = {"model": MODEL, "prompt": "the quick brown", "max_tokens": 1, "temperature": 0}
    _, scored = server.post("/v1/completions", {**body, "prompt_logprobs": 0})
    echoed = client.completions.create(**body, logprobs=0, echo=True).choices[0].logprobs
    first, *rest = scored["choices"][0]["prompt_logprobs"]
    assert first is None
    values = [next(iter(entry.values()))["logprob"] for entry in rest]
    assert echoed is not None
    assert echoed.token_logprobs is not None
    assert values == pytest.approx(echoed.token_logprobs[1 : 1 + len(rest)], abs=1e-4)


@pytest.mark.parametrize("max_tokens", [0, 5])
def test_a_streamed_echo_is_the_whole_one(client: openai.OpenAI, max_tokens: int) -> None:
    """Prompt and first token come in one event, as vLLM sends them; every sample and prompt has its own."""
    options = {"model": MODEL, "prompt": ["x é", "q", "the fox é日"], "max_tokens": max_tokens, "temperature": 0}
    options |= {"n": 2, "echo": True, "logprobs": 3, "extra_body": {"ignore_eos": True}}
    whole = client.completions.create(**options).choices
    lists = ("text_offset", "token_logprobs", "tokens", "top_logprobs")
    streamed = [{"text": "", **{name: [] for name in lists}} for _ in whole]
    for chunk in client.completions.create(**options, stream=True):
        (choice,) = chunk.choices
        streamed[choice.index]["text"] += choice.text
        for name in lists:
            streamed[choice.index][name] += getattr(choice.logprobs, name)
    for choice in whole:
        assert choice.logprobs is not None
        expected = {"text": choice.text, **{name: getattr(choice.logprobs, name) for name in lists}}
        assert streamed[choice.index] == expected
        assert expected["token_logprobs"][0] is expected["top_logprobs"][0] is None
        assert all(len(top) in (3, 4) for top in expected["top_logprobs"][1:])
        assert len(expected["tokens"]) == len(expected["top_logprobs"])
    assert whole[0].logprobs is not None
    assert whole[0].logprobs.tokens == [*("x", " ", "bytes:\\xc3", "bytes:\\xa9"), *whole[0].logprobs.tokens[4:]]
    assert whole[0].logprobs.text_offset is not None
    assert whole[0].logprobs.text_offset[:7] == [0, 1, 2, 2, 3, 3, 3][: 4 + max_tokens]


def test_prompt_logprobs_of_a_chat(client: openai.OpenAI, server: ServerProcess) -> None:
    """They are those of the rendered prompt as a completion."""
    _, tokens = server.post("/tokenize", {"messages": MESSAGES})
    body = {"max_tokens": 2, "temperature": 0, "prompt_logprobs": 4}
    _, chat = server.post("/v1/chat/completions", {**body, "messages": MESSAGES})
    _, completion = server.post("/v1/completions", {**body, "prompt": tokens["tokens"]})
    first, *rest = chat["prompt_logprobs"]
    assert first is None
    assert chat["prompt_logprobs"] == completion["choices"][0]["prompt_logprobs"]
    for entry, token in zip(rest, tokens["tokens"][1:], strict=True):
        assert next(iter(entry)) == str(token)
        assert sorted(e["rank"] for e in entry.values())[:4] == [1, 2, 3, 4]
    assert (
        "prompt_logprobs" not in client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=1).to_dict()
    )


def test_tokens_by_their_ids(client: openai.OpenAI) -> None:
    options = {"model": MODEL, "prompt": "x é", "max_tokens": 2, "temperature": 0, "logprobs": 2, "echo": True}
    plain = client.completions.create(**options).choices[0].logprobs
    named = client.completions.create(**options, extra_body={"return_tokens_as_token_ids": True}).choices[0].logprobs
    assert plain is not None
    assert named is not None
    assert all(token.startswith("token_id:") for token in named.tokens or ())
    assert all(name.startswith("token_id:") for top in (named.top_logprobs or ())[1:] for name in top)
    assert (named.token_logprobs, named.text_offset) == (plain.token_logprobs, plain.text_offset)


def test_logit_bias_allowed_and_bad_words(client: openai.OpenAI, server: ServerProcess) -> None:
    _, tokens = server.post("/tokenize", {"prompt": "q"})
    (q,) = tokens["tokens"]
    options = {"model": MODEL, "prompt": "the", "max_tokens": 4, "temperature": 0}
    assert client.completions.create(**options, logit_bias={str(q): 100}).choices[0].text == "qqqq"
    assert client.completions.create(**options, extra_body={"allowed_token_ids": [q]}).choices[0].text == "qqqq"
    free = client.completions.create(**{**options, "prompt": "x é"}).choices[0].text
    assert free.startswith("日")
    banned = client.completions.create(**{**options, "prompt": "x é"}, extra_body={"bad_words": ["日"]})
    assert not banned.choices[0].text.startswith("日")


def test_tools_reach_the_template(client: openai.OpenAI) -> None:
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}
    options = {"model": MODEL, "messages": MESSAGES, "max_tokens": 1}
    plain = client.chat.completions.create(**options)
    shown = client.chat.completions.create(**options, tools=[tool], tool_choice="none")
    assert plain.usage is not None
    assert shown.usage is not None
    assert shown.usage.prompt_tokens > plain.usage.prompt_tokens


def test_content_parts(client: openai.OpenAI) -> None:
    text = str(MESSAGES[0]["content"])
    parts = [{"role": "user", "content": [{"type": "text", "text": text}]}]
    options = {"model": MODEL, "max_tokens": 6, "temperature": 0}
    whole = client.chat.completions.create(messages=MESSAGES, **options)
    assert client.chat.completions.create(messages=parts, **options).choices == whole.choices
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]
    with pytest.raises(openai.BadRequestError, match="only parts of type 'text'"):
        client.chat.completions.create(messages=image, **options)


def test_a_last_message_of_the_assistant_is_continued(client: openai.OpenAI, server: ServerProcess) -> None:
    """As llama.cpp does; vLLM's fields ask for a new one."""
    messages: list[Any] = [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "x é"}]
    options: Any = {"model": MODEL, "messages": messages, "max_tokens": 6, "temperature": 0}
    text = client.chat.completions.create(**options).choices[0].message.content
    assert text is not None
    assert text.startswith("日")
    new = client.chat.completions.create(**options, extra_body={"add_generation_prompt": True})
    assert new.choices[0].message.content != text
    prompts = []
    for fields in ({}, {"continue_final_message": True}, {"continue_final_message": False}):
        _, tokens = server.post("/tokenize", {"messages": messages, **fields})
        prompts.append(server.post("/detokenize", {"tokens": tokens["tokens"]})[1]["prompt"])
    assert prompts[0] == prompts[1]
    assert prompts[0].endswith("x é")
    assert prompts[2].startswith(prompts[0])
    assert prompts[2] != prompts[0]


@pytest.mark.parametrize(
    ("error", "changes", "param"),
    [
        (openai.NotFoundError, {"model": "another"}, "model"),
        (openai.BadRequestError, {"temperature": -1}, "temperature"),
        (openai.BadRequestError, {"max_tokens": 10_000}, "max_tokens"),
        (openai.BadRequestError, {"response_format": {"type": "json_schema"}}, "response_format"),
        (openai.BadRequestError, {"top_logprobs": 2}, "top_logprobs"),
        (openai.BadRequestError, {"n": 0}, "n"),
        (openai.BadRequestError, {"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
def test_errors_of_the_client(
    client: openai.OpenAI, error: type[openai.APIStatusError], changes: dict[str, object], param: str
) -> None:
    options = {"model": MODEL, "messages": MESSAGES, "max_tokens": 4} | changes
    with pytest.raises(error) as caught:
        client.chat.completions.create(**options)
    assert caught.value.param == param
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["message"]


def test_the_end_comes_with_the_last_text(client: openai.OpenAI) -> None:
    options = {"model": MODEL, "messages": [{"role": "user", "content": "x é"}], "max_tokens": 6, "temperature": 0}
    extra = {"ignore_eos": True, "logit_bias": {"40": 100}}
    chunks = list(client.chat.completions.create(**options, extra_body=extra, stream=True))
    assert chunks[-1].choices[0].delta.content
    assert chunks[-1].choices[0].finish_reason == "length"
    assert sum(bool(c.choices[0].delta.content) for c in chunks) + 1 == len(chunks)  # one more begins with the role


def test_a_stop_string_that_is_a_special_token(client: openai.OpenAI, server: ServerProcess) -> None:
    _, tokens = server.post("/tokenize", {"prompt": "<|im_start|>"})
    (special,) = tokens["tokens"]
    for skip in (True, False):
        extra = {"logit_bias": {str(special): 100}, "skip_special_tokens": skip}
        answer = client.completions.create(
            model=MODEL, prompt="a", max_tokens=9, temperature=0, stop="<|im_start|>", extra_body=extra
        )
        (choice,) = answer.choices
        assert (choice.text, choice.finish_reason, choice.model_extra["stop_reason"]) == ("", "stop", "<|im_start|>")  # type: ignore[index]
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 1
