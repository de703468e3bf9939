"""TGI's requests as completions, and its answers: a text and its tokens, whole or an event for each."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from fixtures import make_tokenizer
from msgspec import structs

from llmctl.engine.output import PositionLogprobs, TextOutput, describe_token
from llmctl.engine.request import FinishReason
from llmctl.engine.step import TokenScores
from llmctl.errors import QueueFullError, RequestError
from llmctl.serving.body import parsed
from llmctl.serving.intake import Prompt
from llmctl.serving.outline import Outline
from llmctl.serving.tgi_api.protocol import CompatGenerateRequest, GenerateParameters
from llmctl.serving.tgi_api.schema import (
    CompatGenerateResponse,
    GenerateResponse,
    StreamResponse,
    TgiErrorResponse,
)
from llmctl.serving.tgi_api.translate import check_parameters, completion_request, parameters_of
from llmctl.serving.tgi_api.writer import TgiWriter
from llmctl.text.tokenizer import Tokenizer

PROMPT = "a model"
EOS = 2


def parameters(**fields: Any) -> GenerateParameters:
    data = json.dumps({"inputs": PROMPT, "parameters": fields}).encode()
    return parameters_of(parsed(data, Outline(data), CompatGenerateRequest))


def completion(*, stream: bool = False, **fields: Any) -> dict[str, Any]:
    """What a request sets of its completion, beside what every one does."""
    given = parameters(**fields)
    check_parameters(given, stream=stream)
    made = completion_request(PROMPT, given, stream=stream).model_dump(exclude_none=True, exclude_unset=True)
    always = {"prompt": PROMPT, "n": 1, "stream": stream, "include_stop_str_in_output": True, "max_tokens": 100}
    return {name: value for name, value in made.items() if always.get(name) != value}


@pytest.mark.parametrize(
    ("fields", "made"),
    [
        ({}, {"temperature": 0.0}),
        (
            {"do_sample": False, "temperature": 1.0, "top_k": 0, "top_p": 1.0},
            {"temperature": 0.0, "top_k": 0, "top_p": 1.0},
        ),
        ({"do_sample": True}, {}),
        ({"temperature": 0.5}, {"temperature": 0.5}),
        ({"top_k": 3}, {"top_k": 3}),
        ({"top_p": 0.9, "temperature": 1}, {"top_p": 0.9, "temperature": 1.0}),
        ({"max_new_tokens": 7}, {"max_tokens": 7, "temperature": 0.0}),
        ({"max_new_tokens": None}, {"max_tokens": -1, "temperature": 0.0}),
        (
            {"repetition_penalty": 1.2, "frequency_penalty": 0.5, "seed": 3, "stop": ["x"]},
            {"temperature": 0.0, "repetition_penalty": 1.2, "frequency_penalty": 0.5, "seed": 3, "stop": ["x"]},
        ),
        ({"details": True}, {"temperature": 0.0, "logprobs": 0}),
        ({"details": True, "top_n_tokens": 3}, {"temperature": 0.0, "logprobs": 3}),
        ({"decoder_input_details": True}, {"temperature": 0.0, "logprobs": 0, "prompt_logprobs": 0}),
        ({"best_of": 2, "do_sample": True}, {"n": 2, "logprobs": 0}),
        ({"best_of": 1, "watermark": False, "return_full_text": True, "truncate": 3}, {"temperature": 0.0}),
        ({"grammar": {"type": "regex", "value": "a+"}}, {"temperature": 0.0, "guided_regex": "a+"}),
        (
            {"grammar": {"type": "json", "value": {"type": "object"}}},
            {"temperature": 0.0, "guided_json": {"type": "object"}},
        ),
        ({"grammar": {"type": "json", "value": "{}"}}, {"temperature": 0.0, "guided_json": "{}"}),
        (
            {"grammar": {"type": "json_schema", "value": {"name": "x", "schema": {"type": "object"}}}},
            {"temperature": 0.0, "guided_json": {"type": "object"}},
        ),
    ],
    ids=str,
)
def test_a_request_is_a_completion(fields: dict[str, Any], made: dict[str, Any]) -> None:
    assert completion(**fields) == made


def test_a_stream_always_has_log_probabilities_and_no_parameters_sample() -> None:
    assert completion(stream=True, top_n_tokens=2) == {"temperature": 0.0, "logprobs": 2}
    data = json.dumps({"inputs": PROMPT}).encode()
    given = parameters_of(parsed(data, Outline(data), CompatGenerateRequest))
    assert completion_request(PROMPT, given, stream=False).temperature is None


@pytest.mark.parametrize(
    ("fields", "stream", "said"),
    [
        ({"watermark": True}, False, "parameters.watermark: not supported"),
        ({"typical_p": 0.5}, False, "parameters.typical_p: not supported"),
        ({"typical_p": False}, False, "parameters.typical_p: not supported"),
        ({"adapter_id": 5}, False, "parameters.adapter_id: "),
        ({"decoder_input_details": True}, True, "decoder_input_details: not available in a stream"),
        ({"best_of": 2, "do_sample": True}, True, "best_of: not available in a stream"),
        ({"best_of": 2}, False, "best_of: every sample would be the same"),
        ({"top_n_tokens": 2}, False, "top_n_tokens: only with details"),
        ({"max_new_tokens": 0}, False, "parameters.max_new_tokens: "),
        ({"top_p": 1.5}, False, "parameters.top_p: "),
        ({"grammar": {"type": "gbnf", "value": "x"}}, False, "parameters.grammar: .*found 'gbnf'"),
    ],
)
def test_what_is_refused_is_named(fields: dict[str, Any], stream: bool, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        completion(stream=stream, **fields)


# Answers


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return Tokenizer.from_folder(folder)


def writer(tokenizer: Tokenizer, *, listed: bool = False, **fields: Any) -> TgiWriter:
    model: Any = SimpleNamespace(intake=SimpleNamespace(tokenizer=tokenizer, workers=None))
    prompt = Prompt(tokenizer.encode(PROMPT), PROMPT)
    return TgiWriter(model, prompt, parameters(**fields), PROMPT, listed=listed)


def outputs(
    tokenizer: Tokenizer, text: str, *, end: bool = True, held: int = 0, per_output: int = 1
) -> list[TextOutput]:
    """Greedy tokens of a text, then the end-of-sequence token; the last ``held`` characters come only with the end."""
    ids = [*tokenizer.encode(text), *([EOS] if end else [])]
    spelt = [tokenizer.token_bytes(i) for i in ids]
    ends = [len(b"".join(spelt[: i + 1]).decode(errors="ignore")) for i in range(len(ids))]
    if end:
        ends[-1] = len(text)
    positions = [
        PositionLogprobs(
            describe_token(tokenizer, token, -0.5 * i, 1),
            (describe_token(tokenizer, 7, -0.1, 1), describe_token(tokenizer, EOS, -0.2, 2)),
            ends[i - 1] if i else 0,
        )
        for i, token in enumerate(ids)
    ]
    made = []
    told = 0
    for at in range(0, len(ids), per_output):
        upto = min(at + per_output, len(ids))
        last = upto == len(ids)
        shown = len(text) if last else max(told, min(ends[upto - 1], len(text) - held))
        finish = (FinishReason.STOP if end else FinishReason.LENGTH) if last else None
        rows = tuple(positions[at:upto])
        made.append(TextOutput("0", text[told:shown], tuple(ids[at:upto]), rows, finish, None, upto, 0, None, None))
        told = shown
    return made


def events(made: TgiWriter, parts: list[TextOutput]) -> list[dict[str, Any]]:
    data = b""
    for part in parts:
        made.usage.count(0, part)
        data += made.events(0, part)
    found = [event.removeprefix(b"data: ") for event in (data + made.end()).split(b"\n\n")[:-1]]
    for event in found:
        StreamResponse.model_validate_json(event)
    return [json.loads(event) for event in found]


def test_a_stream_that_ends_without_a_token_has_its_text(tokenizer: Tokenizer) -> None:
    """So ends a grammar that is complete, and what a stop string held back may come with it."""
    *before, last = outputs(tokenizer, "the quick fox", end=False, held=3)
    before.append(structs.replace(last, text="", finish_reason=None))
    ends = structs.replace(last, text=last.text, token_ids=(), logprobs=None, finish_reason=FinishReason.STOP)
    found = events(writer(tokenizer, details=True), [*before, ends])
    assert "".join(event["token"]["text"] for event in found) == found[-1]["generated_text"] == "the quick fox"
    assert found[-1]["details"]["finish_reason"] == "eos_token"
    assert [event["index"] for event in found] == list(range(1, len(found) + 1))


@pytest.mark.parametrize("per_output", [1, 2, 3, 100])
@pytest.mark.parametrize("held", [0, 1, 4])
@pytest.mark.parametrize("text", ["the quick brown é日🎉 fox", "é", "x"])
def test_every_token_is_an_event_and_texts_add_up(tokenizer: Tokenizer, text: str, held: int, per_output: int) -> None:
    parts = outputs(tokenizer, text, end=False, held=held, per_output=per_output)
    found = events(writer(tokenizer, details=True), parts)
    assert [event["token"]["id"] for event in found] == tokenizer.encode(text)
    assert [event["index"] for event in found] == list(range(1, len(found) + 1))
    assert "".join(event["token"]["text"] for event in found) == text
    *before, last = found
    assert all(event["generated_text"] is None and event["details"] is None for event in before)
    assert last["generated_text"] == text
    assert last["details"] == {
        "finish_reason": "length",
        "generated_tokens": len(found),
        "input_length": len(tokenizer.encode(PROMPT)),
        "seed": None,
    }
    (whole,) = outputs(tokenizer, text, end=False, per_output=10**6)
    answer = writer(tokenizer, details=True).whole([whole])
    GenerateResponse.model_validate(answer)
    if held == 0 and per_output == 1:
        assert answer["details"]["tokens"] == [event["token"] for event in found]
    assert "".join(token["text"] for token in answer["details"]["tokens"]) == answer["generated_text"] == text


def test_a_special_token_has_its_name_and_the_text_does_not(tokenizer: Tokenizer) -> None:
    found = events(writer(tokenizer, top_n_tokens=2, return_full_text=True), outputs(tokenizer, "the"))
    last = found[-1]
    assert last["token"] == {"id": EOS, "text": "<|im_end|>", "logprob": -0.5 * (len(found) - 1), "special": True}
    assert [(token["id"], token["special"]) for token in last["top_tokens"]] == [(7, False), (EOS, True)]
    assert last["generated_text"] == "a modelthe"
    assert last["details"] is None


@pytest.mark.parametrize(
    ("finish", "stop", "reason"),
    [
        (FinishReason.STOP, None, "eos_token"),
        (FinishReason.STOP, 5, "eos_token"),
        (FinishReason.STOP, "x", "stop_sequence"),
        (FinishReason.LENGTH, None, "length"),
    ],
)
def test_why_it_ended(tokenizer: Tokenizer, finish: FinishReason, stop: int | str | None, reason: str) -> None:
    part = TextOutput(
        "0", "x", (5,), (PositionLogprobs(describe_token(tokenizer, 5, -1.0, 1)),), finish, stop, 1, 0, None, None
    )
    answer = writer(tokenizer, details=True, seed=3).whole([part])
    assert answer["details"]["finish_reason"] == reason
    assert answer["details"]["seed"] == 3


def test_the_likeliest_by_token_is_the_best(tokenizer: Tokenizer) -> None:
    (long,) = outputs(tokenizer, "the quick brown fox", per_output=10**6)
    (short,) = outputs(tokenizer, "é", per_output=10**6)
    assert long.logprobs is not None
    fields = {"best_of": 2, "do_sample": True, "return_full_text": True}
    answer = writer(tokenizer, listed=True, **fields).whole([long, short])
    CompatGenerateResponse.model_validate(answer)
    assert answer == [{"generated_text": "a modelé"}]
    (answer,) = writer(tokenizer, listed=True, details=True, **fields).whole([long, short])
    (other,) = answer["details"]["best_of_sequences"]
    assert (answer["generated_text"], other["generated_text"]) == ("a modelé", "a modelthe quick brown fox")


def test_the_prompts_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(PROMPT)
    n = len(ids) - 1
    scores = TokenScores.zeros(n)
    scores.logprobs[:] = -1.5
    scores.ranks[:] = 1
    (part,) = outputs(tokenizer, "x", per_output=10)
    scored = msgspec.structs.replace(part, prompt_scores=scores)
    made = writer(tokenizer, decoder_input_details=True)
    assert made.scores_prompts
    answer = made.whole([scored])
    GenerateResponse.model_validate(answer)
    prefill = answer["details"]["prefill"]
    assert [token["id"] for token in prefill] == ids
    assert [token["logprob"] for token in prefill] == [None, *[-1.5] * n]
    assert "".join(token["text"] for token in prefill) == PROMPT


def test_what_nobody_waits_for_any_more_is_no_fault(tokenizer: Tokenizer) -> None:
    assert writer(tokenizer, details=True).whole([]) is None


def test_an_error_is_an_event(tokenizer: Tokenizer) -> None:
    data = writer(tokenizer).failure(QueueFullError("full"))
    document = TgiErrorResponse.model_validate_json(data.removeprefix(b"data: "))
    assert (document.error, document.error_type) == ("full", "overloaded")
