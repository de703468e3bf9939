"""SamplingParams' validation, the seeds of samples, and bad words as token ids."""

from __future__ import annotations

import math
from typing import Any

import pytest

from llmctl.engine.request import Request, fan_out
from llmctl.engine.sampling_params import SamplingParams, bad_word_ids, derive_seed
from llmctl.errors import RequestError


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("n", 0), ("n", 1.5), ("n", True), ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf),
        ("temperature", "1"), ("top_k", -2), ("top_k", 1.0), ("top_p", -0.1), ("top_p", 1.01), ("min_p", -0.1),
        ("min_p", 1.1), ("repetition_penalty", 0), ("presence_penalty", 2.1), ("frequency_penalty", -2.1),
        ("logit_bias", {1: 101}), ("logit_bias", {1: math.nan}), ("logit_bias", {"1": 1}), ("seed", 2**64),
        ("seed", 0.5), ("stop", "text"), ("stop", ("",)), ("stop", ("x",) * 65), ("stop_token_ids", ("a",)),
        ("bad_words", ((),)), ("min_tokens", -1), ("max_tokens", -1), ("max_tokens", 1.0), ("logprobs", 21),
        ("logprobs", -1), ("prompt_logprobs", 21), ("prompt_logprobs", -1), ("allowed_token_ids", ()),
        ("allowed_token_ids", (1.5,)),
    ],
)  # fmt: skip
def test_refusals_name_the_parameter(param: str, value: Any) -> None:
    with pytest.raises(RequestError, match=param) as caught:
        SamplingParams(**{param: value})
    assert caught.value.param == param
    assert caught.value.http_status == 400


def test_limits_themselves_are_accepted() -> None:
    SamplingParams(
        n=128, temperature=0, top_k=-1, top_p=1, min_p=1, repetition_penalty=0.01, presence_penalty=-2,
        frequency_penalty=2, logit_bias={0: -100, 1: 100.0}, seed=-(2**63), stop=["a"], logprobs=20, prompt_logprobs=20,
        min_tokens=3, max_tokens=3,
    )  # fmt: skip
    with pytest.raises(RequestError, match=r"at most max_tokens \(2\), found 3"):
        SamplingParams(min_tokens=3, max_tokens=2)


@pytest.mark.parametrize(
    "params",
    [{"logit_bias": {50: 1.0}}, {"stop_token_ids": (-1,)}, {"allowed_token_ids": (50,)}, {"bad_words": ((1, 50),)}],
)
def test_ids_outside_the_vocabulary_are_refused(params: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="outside the vocabulary \\(0 to 49\\)") as caught:
        SamplingParams(**params).check_vocab(50)
    assert caught.value.param == next(iter(params))


def test_samples_have_seeds_of_their_own_and_the_first_keeps_its_seed() -> None:
    requests = fan_out(Request("r", [1], SamplingParams(n=4, seed=7), priority=3, cache_salt="s"))
    seeds = [r.params.seed for r in requests]
    assert seeds[0] == 7
    assert len(set(seeds)) == 4
    assert [r.request_id for r in requests] == ["r#0", "r#1", "r#2", "r#3"]
    assert all(r.params.n == 1 and r.priority == 3 and r.cache_salt == "s" for r in requests)
    unseeded = fan_out(Request("r", [1], SamplingParams(n=2)))
    assert [r.params.seed for r in unseeded] == [None, None]
    only = Request("r", [1])
    assert fan_out(only) == [only]


def test_derived_seeds_are_u64_and_take_negative_seeds() -> None:
    assert 0 <= derive_seed(-1, 0) < 2**64
    assert derive_seed(-1, 0) == derive_seed(2**64 - 1, 0)
    assert derive_seed(1, 0) != derive_seed(0, 1)


def test_bad_words_are_encoded_with_and_without_a_leading_space() -> None:
    class Letters:
        def encode_each(self, texts: list[str], add_special_tokens: bool = True) -> list[list[int]]:
            assert not add_special_tokens
            return [[ord(c) for c in text] for text in texts]

    assert bad_word_ids(Letters(), ["ab"]) == ((97, 98), (32, 97, 98))  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="bad_words"):
        bad_word_ids(Letters(), [" "])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "biases",
    [
        *({1: math.nan, 2: 0}, {1: 0, 2: math.nan}, {1: math.nan, 2: 10**400}, {1: 10**400, 2: math.nan}),
        *({1: math.inf}, {1: -100.5}, {1: 101}, {True: 1}, {1: True}, {1: "x"}, {"1": 1}, {1.0: 1}),
    ],
    ids=str,
)
def test_biases_that_are_none(biases: dict[int, float]) -> None:
    with pytest.raises(RequestError, match="logit_bias"):
        SamplingParams(logit_bias=biases)


def test_biases_at_their_ends() -> None:
    assert SamplingParams(logit_bias={0: -100, 1: 100, 2: 0.5}).logit_bias == {0: -100, 1: 100, 2: 0.5}
