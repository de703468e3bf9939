"""Checks of a request's fields, without a model."""

from __future__ import annotations

import pytest

from llmctl.errors import RequestError
from llmctl.serving.sampling_fields import logit_bias_of


def test_biases_are_by_token_id() -> None:
    assert logit_bias_of({"0": 1, "17": -2.5}) == {0: 1, 17: -2.5}
    assert logit_bias_of({}) is logit_bias_of(None) is None


@pytest.mark.parametrize(
    "key", ["", " 1", "1 ", "+1", "-1", "01", "1_0", "1,2", "1,", ",1", ",", "1.0", "a", "\u0661", "1\n"]
)
def test_a_key_that_is_no_token_id_is_refused(key: str) -> None:
    for given in ({key: 1.0}, {"5": 1.0, key: 1.0}, {key: 1.0, "5": 1.0}):
        with pytest.raises(RequestError, match=r"^logit_bias: expected token ids as keys") as caught:
            logit_bias_of(given)
        assert caught.value.param == "logit_bias"
