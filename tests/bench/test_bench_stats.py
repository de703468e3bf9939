"""Percentiles against numpy and a sort; Student-t against tables and closed forms."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmctl.bench import stats

values = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60)


@given(values, st.floats(0, 100))
def test_percentile_is_numpys_and_the_textbooks(data: list[float], q: float) -> None:
    found = stats.percentile(data, q)
    assert found == float(np.percentile(data, q, method="linear"))
    ordered, place = sorted(data), (len(data) - 1) * q / 100
    below = min(int(place), len(data) - 1)
    above = min(below + 1, len(data) - 1)
    assert found == pytest.approx(ordered[below] + (ordered[above] - ordered[below]) * (place - below), abs=1e-6)


def test_percentile_of_nothing() -> None:
    assert stats.percentile([], 50) is None


@given(values)
def test_summary(data: list[float]) -> None:
    found = stats.summarize(data, (50, 99.9), "x_ms", scale=1000)
    assert list(found) == ["mean_x_ms", "median_x_ms", "std_x_ms", "p50_x_ms", "p99.9_x_ms"]
    assert found["median_x_ms"] == pytest.approx(found["p50_x_ms"])
    assert found["mean_x_ms"] == pytest.approx(math.fsum(data) / len(data) * 1000, abs=1e-3)


def test_summary_of_nothing_is_none_not_zero() -> None:
    assert set(stats.summarize([], (99,), "x").values()) == {None}


# Standard tables, two-sided 95% and 99%.
@pytest.mark.parametrize(
    ("p", "degrees", "expected"),
    [
        (0.975, 1, 12.7062),
        (0.975, 2, 4.30265),
        (0.975, 4, 2.77645),
        (0.975, 10, 2.22814),
        (0.975, 30, 2.04227),
        (0.995, 2, 9.92484),
        (0.995, 5, 4.03214),
        (0.95, 7, 1.89458),
        (0.975, 1e6, 1.95996),
    ],
)
def test_t_quantile_table(p: float, degrees: float, expected: float) -> None:
    assert stats.t_quantile(p, degrees) == pytest.approx(expected, rel=1e-5)
    assert stats.t_quantile(1 - p, degrees) == pytest.approx(-expected, rel=1e-5)


@given(st.floats(0.51, 0.999))
def test_t_quantile_closed_forms(p: float) -> None:
    assert stats.t_quantile(p, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)), rel=1e-7)
    a = 4 * p * (1 - p)
    assert stats.t_quantile(p, 2) == pytest.approx(2 * (p - 0.5) * math.sqrt(2 / a), rel=1e-7)


@pytest.mark.parametrize(("p", "degrees"), [(0, 3), (1, 3), (0.9, 0), (float("nan"), 2), (0.9, float("nan"))])
def test_t_quantile_refuses(p: float, degrees: float) -> None:
    with pytest.raises(ValueError, match="t_quantile"):
        stats.t_quantile(p, degrees)


def test_interval_covers_the_true_mean_as_often_as_it_says() -> None:
    rng = random.Random(5)
    trials = 2000
    covered = 0
    for _ in range(trials):
        found = stats.mean_interval([rng.gauss(10, 2) for _ in range(4)], 0.9)
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 10 <= found.high
    assert covered / trials == pytest.approx(0.9, abs=0.025)


def test_one_repeat_has_no_interval() -> None:
    found = stats.mean_interval([3.0])
    assert (found.mean, found.half_width, found.low, found.std) == (3.0, None, None, None)
    with pytest.raises(ValueError, match="at least one"):
        stats.mean_interval([])


def test_difference_noise() -> None:
    assert stats.difference_noise([1.0], [2.0]) is None
    assert stats.difference_noise([1.0, 1.0], [5.0, 5.0]) == 0
    # Textbook two-sample t: both variances 1, n = 3 and 3, df 4: 2.776 * sqrt(2/3).
    assert stats.difference_noise([1, 2, 3], [11, 12, 13]) == pytest.approx(2.77645 * math.sqrt(2 / 3), rel=1e-5)
    # One repeat on one side: a prediction interval from the other side's spread.
    assert stats.difference_noise([1, 2, 3], [9]) == pytest.approx(4.30265 * math.sqrt(1 + 1 / 3), rel=1e-5)


@pytest.mark.parametrize(("q", "label"), [(99.0, "99"), (99.9, "99.9"), (50, "50"), (0.5, "0.5")])
def test_percentile_label(q: float, label: str) -> None:
    assert stats.percentile_label(q) == label
