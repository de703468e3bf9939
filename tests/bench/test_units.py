"""Figures as people read them."""

from __future__ import annotations

import math

import pytest

from llmctl.bench.units import figure, interval, noise


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        *((181.4, "181"), (1234.5, "1,234"), (12.34, "12.3"), (20.04, "20"), (1.234, "1.23"), (0.01234, "0.0123")),
        *((7, "7"), (12345, "12,345"), (0, "0"), (None, "-"), (math.inf, "-"), (math.nan, "-"), ("x", "-")),
    ],
)
def test_three_digits(value: object, shown: str) -> None:
    assert figure(value) == shown


def test_intervals() -> None:
    assert interval({"low": 0.98, "high": 1.0249}) == "0.980–1.025"
    assert interval({"low": 0.98, "high": 1.0249}, digits=2) == "0.98–1.02"
    assert interval({"low": 0.5, "high": None}) == "0.500–10 and more"
    assert interval({"low": None, "high": None}) == "-"


def test_noise_beyond_all_measure_misleads_nobody() -> None:
    assert [noise(share) for share in (0.021, 3e8, math.inf)] == ["noise ±2.1%", "noise ±1000%", "noise ±1000%"]
