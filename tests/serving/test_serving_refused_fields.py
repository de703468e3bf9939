"""Fields that are known and never honoured: one line that names them, and a schema that says so."""

from __future__ import annotations

import json
from typing import Annotated, Any

import pytest

from llmctl.errors import RequestError
from llmctl.serving.body import parsed
from llmctl.serving.outline import Outline
from llmctl.serving.protocol import ApiModel, CompletionRequest
from llmctl.serving.refused_fields import Only


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


def test_the_reason_is_said_whole_and_described() -> None:
    assert take_in(Body, inner={"size": 1}).inner.size == 1
    with pytest.raises(RequestError, match=r"^inner\.size: one size \{fits\} all$") as caught:
        take_in(Body, inner={"size": 2})
    assert caught.value.param == "inner"
    described = Inner.model_json_schema()["properties"]["size"]
    assert described["enum"] == [None, 1]
    assert described["description"] == "Anything else is refused: one size {fits} all."
