"""Fields that are known and never honoured: one line that names them, and a schema that says so."""

from __future__ import annotations

import json
from typing import Annotated, Any

import pytest

from llmctl.errors import RequestError
from llmctl.serving.body import parsed
from llmctl.serving.embedding_schema import EmbeddingRequest
from llmctl.serving.messages_api.protocol import MessagesRequest
from llmctl.serving.outline import Outline
from llmctl.serving.protocol import ApiModel, CompletionRequest
from llmctl.serving.refused_fields import Only
from llmctl.serving.tgi_api.protocol import CompatGenerateRequest


class Inner(ApiModel):
    size: Annotated[int | None, Only("one size {fits} all", (None, 1))] = None


class Body(ApiModel):
    inner: Inner | None = None


def take_in(model: type[Any], **fields: Any) -> Any:
    data = json.dumps(fields).encode()
    return parsed(data, Outline(data), model)


@pytest.mark.parametrize(
    ("name", "value", "neutral"),
    [
        ("use_beam_search", True, False),
        ("guided_decoding_backend", "xgrammar", None),
        ("guided_whitespace_pattern", False, None),
        ("structural_tag", {}, None),
        ("suffix", "b", ""),
    ],
)
def test_openai_fields(name: str, value: Any, neutral: Any) -> None:
    assert getattr(take_in(CompletionRequest, prompt="a", **{name: neutral}), name) == neutral
    with pytest.raises(RequestError) as caught:
        take_in(CompletionRequest, prompt="a", **{name: value})
    assert (str(caught.value), caught.value.param) == (f"{name}: not supported", name)


MESSAGES = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 5}


@pytest.mark.parametrize(
    ("model", "least", "fields", "said"),
    [
        (MessagesRequest, MESSAGES, {"n": 2, "best_of": 2, "seed": 1, "logprobs": True, "echo": True}, ""),
        (MessagesRequest, MESSAGES, {"stop": ["a"]}, "; use stop_sequences"),
        (MessagesRequest, MESSAGES, {"response_format": {"type": "json_object"}}, "; use output_config.format"),
        (EmbeddingRequest, {"input": "a"}, {"n": 2, "stop": "a", "tools": [{}], "response_format": {}, "seed": 1}, ""),
        (CompatGenerateRequest, {"inputs": "a"}, {"n": 2, "best_of": 3}, "; use parameters.best_of"),
        (CompatGenerateRequest, {"inputs": "a"}, {"seed": 1}, "; use parameters.seed"),
        (CompatGenerateRequest, {"inputs": "a"}, {"tools": [{}]}, "; use /v1/chat/completions"),
    ],
)
def test_fields_of_other_apis(model: Any, least: dict[str, Any], fields: dict[str, Any], said: str) -> None:
    for name, value in fields.items():
        with pytest.raises(RequestError) as caught:
            take_in(model, **least, **{name: value})
        assert (str(caught.value), caught.value.param) == (f"{name}: not a field of this endpoint{said}", name)
    take_in(model, **least, n=1, echo=False, best_of=None, nobody_knows=1)


def test_the_reason_is_said_whole_and_described() -> None:
    assert take_in(Body, inner={"size": 1}).inner.size == 1
    with pytest.raises(RequestError, match=r"^inner\.size: one size \{fits\} all$") as caught:
        take_in(Body, inner={"size": 2})
    assert caught.value.param == "inner"
    described = Inner.model_json_schema()["properties"]["size"]
    assert described["enum"] == [None, 1]
    assert described["description"] == "Anything else is refused: one size {fits} all."
