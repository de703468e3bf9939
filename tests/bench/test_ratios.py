"""Ratios: intervals that cover as often as they say, and decisions that follow from nothing but the interval."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llmctl.bench.ratios import BOOTSTRAP_FROM, Decision, Ratio, Tails, Worsening, kept, paired_ratio, unpaired_ratio

logs = st.lists(st.floats(-1, 1), min_size=1, max_size=20)
positive = st.lists(st.floats(0.1, 1e4), min_size=1, max_size=12)
FEW = 300  # resamplings, where only the arithmetic is looked at


@given(logs, st.floats(0.5, 0.99))
def test_the_inverse_ratio_has_the_inverse_interval(data: list[float], confidence: float) -> None:
    there, back = (paired_ratio([sign * x for x in data], Tails.alike(confidence), FEW) for sign in (1, -1))
    assert there.value == pytest.approx(1 / back.value)
    cut = len(data) // 8
    inner = sorted(data)[cut : len(data) - cut]
    assert there.value == pytest.approx(math.exp(math.fsum(inner) / len(inner)))
    assert sorted(data[i] for i in kept(data)) == inner
    assert (there.low is None) == (there.high is None) == (len(data) == 1)
    if there.low is not None and there.high is not None and len(data) < BOOTSTRAP_FROM:
        assert there.low == pytest.approx(1 / back.high)
        assert there.low <= there.value <= there.high


@given(st.lists(st.floats(-1, 1).map(lambda x: round(x, 6)), min_size=1, max_size=20), st.floats(-2, 2))
@example([0.0] * 6 + [-1.0, -8.7e-26], 1.0)
def test_a_factor_on_every_round_is_a_factor_on_the_interval(data: list[float], shift: float) -> None:
    plain, moved = (
        paired_ratio(data, Tails.alike(0.9), FEW),
        paired_ratio([x + shift for x in data], Tails.alike(0.9), FEW),
    )
    assert moved.value == pytest.approx(plain.value * math.exp(shift))
    if plain.low is not None and plain.high is not None and moved.low is not None and np.std(data) > 1e-6:
        assert moved.low == pytest.approx(plain.low * math.exp(shift), rel=1e-6)


@given(st.floats(-1, 1), st.integers(2, 20))
def test_rounds_without_any_noise_have_an_interval_without_width(value: float, count: int) -> None:
    found = paired_ratio([value] * count, Tails.alike(0.99), FEW)
    assert found.low == pytest.approx(found.value)
    assert found.high == pytest.approx(found.value)


@given(positive, positive)
def test_unpaired_is_of_geometric_means_and_needs_values_above_zero(before: list[float], after: list[float]) -> None:
    found = unpaired_ratio(before, after, 0.95, FEW)
    assert found is not None
    if found.method == "student-t":
        means = [math.exp(np.mean(np.log(side))) for side in (before, after)]
        assert found.value == pytest.approx(means[1] / means[0])
    assert found.method == ("bootstrap-t" if min(len(before), len(after)) >= BOOTSTRAP_FROM else "student-t")
    assert unpaired_ratio([*before, 0.0], after, 0.95, FEW) is None


@given(st.floats(0.5, 1.5), st.floats(0, 0.3), st.floats(0, 0.3), st.booleans(), st.floats(0, 0.2), st.floats(0, 0.2))
def test_a_decision_follows_from_the_interval(
    value: float, below: float, above: float, up: bool, x: float, y: float
) -> None:
    ratio = Ratio(value, value - below, value + above, 0.95, 9, "bootstrap-t")
    found = Worsening.of(ratio, up)
    strict, lax = sorted((x, y))
    decision, at_once = found.decide(strict), found.decide_at_once(strict)
    assert found.least is not None
    assert found.most is not None
    assert (decision == Decision.REGRESSION) == (found.least > strict)
    assert (decision == Decision.PASS) == (found.most <= strict)
    assert at_once in (decision, Decision.REGRESSION)
    if at_once == Decision.REGRESSION:
        assert found.worse > strict
        assert ratio.noise is not None
        assert found.worse > ratio.noise
        no_change_inside = ratio.low is not None and ratio.high is not None and ratio.low <= 1 <= ratio.high
        assert not no_change_inside
    if decision == Decision.PASS:
        assert found.decide(lax) == Decision.PASS, "what is within less is within more"
    for decide in (found.decide, found.decide_at_once):
        if decide(lax) == Decision.REGRESSION:
            assert decide(strict) == Decision.REGRESSION
    # B in A's place: what was worse is better, and no regression is one both ways.
    swapped = Ratio(1 / value, 1 / (value + above), 1 / (value - below), 0.95, 9, "bootstrap-t")
    assert not (at_once == Worsening.of(swapped, up).decide_at_once(strict) == Decision.REGRESSION)


def test_without_an_interval_the_value_decides_if_there_will_be_no_other() -> None:
    for value, decision in ((0.9, Decision.REGRESSION), (0.96, Decision.PASS)):
        found = Worsening.of(paired_ratio([math.log(value)], Tails.alike(0.95)), True)
        assert found.decide_at_once(0.05) == decision
        assert found.decide(0.05) == Decision.UNDECIDED
    for call in (lambda: paired_ratio([], Tails.alike(0.9)), lambda: unpaired_ratio([], [1.0], 0.9)):
        with pytest.raises(ValueError, match="at least one"):
            call()


@given(st.lists(st.floats(-1, 1).map(lambda x: round(x, 6)), min_size=2, max_size=20, unique=True))
def test_each_end_of_an_interval_has_its_own_error(data: list[float]) -> None:
    strict, lax = (paired_ratio(data, Tails.alike(confidence), FEW) for confidence in (0.98, 0.8))
    for tails, ends in ((Tails(0.01, 0.1), (strict, lax)), (Tails(0.1, 0.01), (lax, strict))):
        found = paired_ratio(data, tails, FEW)
        assert (found.low, found.high) == (ends[0].low, ends[1].high)
        assert found.confidence == pytest.approx(0.89)


Draw = Callable[[np.random.Generator, int], np.ndarray]


def _spikes(rng: np.random.Generator, count: int) -> np.ndarray:
    """A tenth of the rounds is six times as noisy: a neighbour."""
    return rng.normal(size=count) * np.where(rng.random(count) < 0.1, 6, 1)


@pytest.mark.parametrize("count", [10, 20])
@pytest.mark.parametrize("draw", [lambda rng, n: rng.normal(size=n), lambda rng, n: rng.standard_t(3, size=n), _spikes])
def test_intervals_cover_the_truth_as_often_as_they_say(count: int, draw: Draw) -> None:
    """Of 95% intervals: normal noise, noise with long tails, and noise with spikes. (Of 400, 33 is 3 sigma more.)"""
    rng = np.random.default_rng(count)
    trials, missed = 400, 0
    for _ in range(trials):
        found = paired_ratio(list(0.02 * draw(rng, count)), Tails.alike(0.95), 600)
        assert found.low is not None
        assert found.high is not None
        missed += not found.low <= 1 <= found.high
    assert missed <= 33


def test_unpaired_intervals_cover_too() -> None:
    rng = np.random.default_rng(4)
    trials, missed = 300, 0
    for _ in range(trials):
        before, after = (np.exp(0.02 * rng.normal(size=10)) for _ in range(2))
        found = unpaired_ratio(list(before), list(after), 0.95, 600)
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        missed += not found.low <= 1 <= found.high
    assert missed / trials <= 0.09


def test_a_round_with_a_busy_neighbour_hardly_moves_the_ratio() -> None:
    rng = np.random.default_rng(2)
    calm = list(0.01 * rng.normal(size=16))
    before, after = paired_ratio(calm, Tails.alike(0.95)), paired_ratio([*calm[:-1], -0.7], Tails.alike(0.95))
    assert abs(after.value - before.value) < 0.005
    assert before.noise is not None
    assert after.noise is not None
    assert after.noise < 2 * before.noise
