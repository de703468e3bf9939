"""The translation of requests' parameters into a SamplingBatch."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmctl.engine.request import Request
from llmctl.engine.sampling_batch import SamplingBatcher
from llmctl.engine.sampling_params import SamplingParams
from llmctl.engine.step import SamplingBatch


def batch(
    *params: SamplingParams, outputs: list[int] | None = None, eos: frozenset[int] = frozenset()
) -> SamplingBatch:
    requests = [Request(str(i), [1, 2, 3], p) for i, p in enumerate(params)]
    for request in requests:
        request.token_ids += outputs or []
    return SamplingBatcher(40, eos).batch(tuple(requests), [r.num_tokens for r in requests])


def test_what_nobody_asks_for_is_none() -> None:
    made = batch(SamplingParams(), SamplingParams(temperature=0))
    given_fields = {name for name in SamplingBatch.__dataclass_fields__ if getattr(made, name) is not None}
    assert given_fields == {"temperature", "seeds", "positions"}
    assert made.temperature.tolist() == [1, 0]
    assert made.positions.tolist() == [3, 3]
    assert made.seeds.dtype == np.uint64


def test_one_row_that_asks_fills_the_column_with_off_values() -> None:
    made = batch(SamplingParams(), SamplingParams(top_k=5, top_p=0.5, min_p=0.1, presence_penalty=1, logprobs=0))
    assert made.top_k is not None
    assert made.top_k.tolist() == [0, 5]
    assert made.top_p is not None
    assert made.top_p.tolist() == [1, 0.5]
    assert made.min_p is not None
    assert made.min_p.tolist() == pytest.approx([0, 0.1])
    assert made.presence_penalty is not None
    assert made.presence_penalty.tolist() == [0, 1]
    assert made.repetition_penalty is None
    assert made.num_logprobs is not None
    assert made.num_logprobs.tolist() == [-1, 0]
    assert made.prompt_ids is not None
    assert [ids.tolist() for ids in made.prompt_ids] == [[], [1, 2, 3]]  # only who is penalised


EXTREMES = [5e-324, 1e-300, 1e-46, 1e-39, 1e39, 1.7976931348623157e308]
"""Of float64; in float32 0, not normal, or infinite."""


@pytest.mark.parametrize("value", EXTREMES)
def test_a_factor_that_float32_cannot_hold_is_neither_off_nor_infinite(value: float) -> None:
    made = batch(SamplingParams(temperature=value, repetition_penalty=value, top_p=min(value, 1)))
    factors = [made.temperature, made.repetition_penalty] + ([made.top_p] if value < 1 else [])
    with np.errstate(over="raise", divide="raise", under="raise"):
        for column in factors:
            assert column is not None
            for number in (column, 1 / column, column * np.float32(1e7), np.float32(1e7) / column):
                assert np.isfinite(number).all()
                assert (number > 0).all()


def test_greedy_rows_do_not_ask_for_truncation() -> None:
    assert batch(SamplingParams(top_p=0)).temperature.tolist() == [0]
    made = batch(SamplingParams(temperature=0, top_k=5, top_p=0.5, min_p=0.1))
    assert made.top_k is None
    assert made.top_p is None
    assert made.min_p is None


PARAMS = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.7, top_p=0.9),
    SamplingParams(repetition_penalty=1.5),
    SamplingParams(min_tokens=3, stop_token_ids=(7,)),
    SamplingParams(bad_words=((5,), (6, 7)), allowed_token_ids=(5, 6, 7)),
]


@given(st.lists(st.lists(st.integers(0, 4), unique=True), min_size=2, max_size=8), st.randoms())
def test_a_batcher_that_has_seen_other_steps_makes_the_same_batch(steps: list[list[int]], random: Random) -> None:
    requests = [Request(str(i), [1, 2, 3], p) for i, p in enumerate(PARAMS)]
    batcher = SamplingBatcher(40, frozenset({9}))
    for step in steps:
        rows = tuple(requests[i] for i in step)
        for _ in range(2):  # the same rows again, one token later
            positions = [r.num_tokens for r in rows]
            made, fresh = (b.batch(rows, positions) for b in (batcher, SamplingBatcher(40, frozenset({9}))))
            for name in SamplingBatch.__dataclass_fields__:
                np.testing.assert_equal(getattr(made, name), getattr(fresh, name), err_msg=name)
            for request in rows:
                request.token_ids.append(random.randrange(4, 8))


def biases(made: SamplingBatch, row: int = 0) -> dict[int, float]:
    if made.bias_rows is None:
        return {}
    assert made.bias_ids is not None
    assert made.bias_values is not None
    at = made.bias_rows == row
    return dict(zip(made.bias_ids[at].tolist(), made.bias_values[at].tolist(), strict=True))


def test_min_tokens_suppresses_ends_until_reached() -> None:
    params = SamplingParams(min_tokens=2, stop_token_ids=(7,), logit_bias={7: 5.0, 8: -1.0})
    eos = (9,)
    assert biases(batch(params, outputs=[4], eos=eos)) == {7: -math.inf, 9: -math.inf, 8: -1.0}
    assert biases(batch(params, outputs=[4, 4], eos=eos)) == {7: 5.0, 8: -1.0}
    ignoring = SamplingParams(min_tokens=2, ignore_eos=True)
    assert biases(batch(ignoring, eos=eos)) == {}


def test_bad_words_forbid_the_last_token_after_the_rest_of_the_word() -> None:
    params = SamplingParams(bad_words=((5,), (6, 7), (3, 8)))
    assert biases(batch(params, outputs=[6])) == {5: -math.inf, 7: -math.inf}
    assert biases(batch(params)) == {5: -math.inf}  # the prompt's 3 does not begin a bad word


@given(st.sets(st.integers(0, 39), min_size=1))
def test_allowed_mask_has_exactly_the_allowed_bits(allowed: set[int]) -> None:
    made = batch(SamplingParams(allowed_token_ids=tuple(allowed)), SamplingParams())
    assert made.allowed_mask is not None
    assert made.allowed_mask.dtype == np.uint32
    assert made.allowed_mask.shape == (2, 2)
    bits = [[int(word >> np.uint32(b)) & 1 for word in row for b in range(32)] for row in made.allowed_mask]
    assert {i for i, bit in enumerate(bits[0]) if bit} == allowed
    assert bits[1] == [1] * 40 + [0] * 24
