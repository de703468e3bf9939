"""What an embedding's vector becomes, what a request for some is refused for, and who stands for it in records."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from llmctl.engine.deadline import Deadline
from llmctl.engine.output import TextOutput
from llmctl.engine.pooling import Pooling
from llmctl.engine.request import FinishReason
from llmctl.errors import RequestError
from llmctl.serving.embedding_schema import EmbeddingList, EmbeddingRequest
from llmctl.serving.embeddings import check_shape, document, sequences, shaped
from llmctl.serving.intake import Prompt
from llmctl.serving.openai_errors import from_validation_error, json_response

VECTOR = np.array([3, -4, 12, 0.5], np.float32)


def output(vector: np.ndarray) -> TextOutput:
    return TextOutput("0", "", (), None, FinishReason.STOP, None, 0, 0, None, None, vector)


def written(request: EmbeddingRequest, *vectors: np.ndarray) -> dict[str, Any]:
    """The document as a client reads it."""
    found: dict[str, Any] = json.loads(json_response(document(request, [output(v) for v in vectors], "m", 7)).body)
    EmbeddingList.model_validate(found)
    return found


def body(**fields: Any) -> EmbeddingRequest:
    return EmbeddingRequest(**{"input": "a", **fields})


def test_normalized() -> None:
    made = shaped(VECTOR, None, normalize=True)
    assert made.dtype == np.float32
    np.testing.assert_allclose(made, VECTOR / np.linalg.norm(VECTOR), rtol=1e-6)


def test_cut_first_and_normalized_then() -> None:
    np.testing.assert_allclose(shaped(VECTOR, 2, normalize=True), [0.6, -0.8], rtol=1e-6)
    np.testing.assert_array_equal(shaped(VECTOR, 2, normalize=False), [3, -4])


def test_what_has_no_direction_and_what_overflows_when_squared() -> None:
    np.testing.assert_array_equal(shaped(np.zeros(3, np.float32), None, normalize=True), [0, 0, 0])
    made = shaped(np.array([3e30, -4e30], np.float32), None, normalize=True)
    np.testing.assert_allclose(made, [0.6, -0.8], rtol=1e-6)


def test_the_document_is_openais() -> None:
    for fields in ({}, {"encoding_format": None}, {"encoding_format": "float"}):
        made = written(body(**fields), VECTOR, -VECTOR)
        assert [entry["index"] for entry in made["data"]] == [0, 1]
        assert made["data"][1]["embedding"] == pytest.approx((-VECTOR / np.linalg.norm(VECTOR)).tolist())
        assert (made["model"], made["usage"]) == ("m", {"prompt_tokens": 7, "total_tokens": 7})


def test_base64_is_little_endian_float32() -> None:
    made = written(body(encoding_format="base64", normalize=False, dimensions=3), VECTOR)
    data = base64.b64decode(made["data"][0]["embedding"], validate=True)
    assert data == bytes.fromhex("00004040000080c000004041")


def test_what_the_engine_is_asked_for() -> None:
    asked = body(priority=-3, cache_salt="s")
    made = sequences(asked, [Prompt([5, 6]), Prompt([7])], Deadline(ttft=0.3, itl=0.01), Pooling.MEAN, None)
    assert [spec.prompt_token_ids for spec in made] == [[5, 6], [7]]
    for spec in made:
        assert (spec.priority, spec.cache_salt, spec.pooling, spec.params.max_tokens) == (-3, "s", Pooling.MEAN, 0)
        assert spec.deadline == Deadline(ttft=0.3)


def test_more_dimensions_than_the_model_has() -> None:
    check_shape(body(dimensions=64), 64)
    with pytest.raises(RequestError, match=r"dimensions: expected at most the model's 64, found 65") as caught:
        check_shape(body(dimensions=65), 64)
    assert caught.value.param == "dimensions"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens: not supported; shorten the input"),
        ({"input": 5}, r"input: expected a string, a list of token ids \(integers >= 0\), or a list of either"),
        ({"input": [{"text": "a"}]}, "input: expected a string"),
        ({"dimensions": 0}, "dimensions: .* greater than or equal to 1"),
        ({"encoding_format": "int8"}, "encoding_format: .*'float' or 'base64'"),
        ({"pooling": "cls"}, "pooling: .*'last' or 'mean'"),
    ],
)
def test_what_is_no_request(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        body(**fields)
    error = from_validation_error(caught.value, EmbeddingRequest.expected)
    assert error.param == next(iter(fields))
    with pytest.raises(RequestError, match=said):
        raise error
