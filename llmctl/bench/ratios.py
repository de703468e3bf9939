"""How many times as much B is as A, with an interval: the statistics that ``bench compare`` and ``--baseline`` share.

Values are compared as logarithms: a ratio and its inverse are then equally far from 1, and noise that grows with the
value is the same everywhere. From ``BOOTSTRAP_FROM`` values a side on, an eighth of the logarithms is trimmed off
either end, so that a round in which a neighbour was busy neither moves the ratio nor widens its interval, and the
interval is a studentized bootstrap's (bootstrap-t: Efron and Tibshirani, An Introduction to the Bootstrap, 1993,
section 12.5), with the trimmed mean's error of Tukey and McLaughlin (Sankhya A 25, 1963), as Wilcox advises
(Introduction to Robust Estimation and Hypothesis Testing). Of simulated 99% intervals of 12 to 30 rounds it missed
0.8-1.8% whether noise was normal, Student's with three degrees of freedom, or six times as large in a tenth of the
rounds; percentile intervals of the mean missed 1.3-4.4%, and with such spikes the untrimmed bootstrap-t, 1.6-3.5%, was
up to 1.6 times as wide.
Fewer values have too few different resamplings: theirs is Student's t interval of the mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmctl.bench import stats

BOOTSTRAP_FROM = 8
TRIMMED = 1 / 8
RESAMPLINGS = 20_000
_SEED = 20_180_101  # the same data give the same interval
_ROUNDING = 1e-12  # logarithms that differ by less are equal: a spread of 1e-17 would make a score of 1e17

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Tails:
    """How often each end of an interval may miss: the truth is below the lower, or above the upper; at most half."""

    below: float
    above: float

    @classmethod
    def alike(cls, confidence: float) -> Tails:
        """Both ends of an interval at ``confidence``."""
        return cls((1 - confidence) / 2, (1 - confidence) / 2)

    @property
    def confidence(self) -> float:
        """Of the interval."""
        return 1 - self.below - self.above


@dataclass(frozen=True)
class Ratio:
    """B over A, with its interval at ``confidence``, which need not be shared alike between its ends.

    ``method``: bootstrap-t or student-t. ``count``: rounds, or values of the side that has fewer. ``low``, ``high``
    are None when one value a side is all there is.
    """

    value: float
    low: float | None
    high: float | None
    confidence: float
    count: int
    method: str

    @property
    def noise(self) -> float | None:
        """How far the interval reaches towards no change, as a share of A: a change of more is no noise."""
        if self.low is None or self.high is None:
            return None
        return self.high - self.value if self.value < 1 else self.value - self.low


def ratio_row(ratio: Ratio) -> dict[str, Any]:
    """A ratio in a result document; JSON has no infinity: None is an interval without an end."""
    return {
        "ratio": ratio.value,
        "low": ratio.low,
        "high": finite(ratio.high),
        "confidence": ratio.confidence,
        "method": ratio.method,
    }


def finite(value: float | None) -> float | None:
    """None for what JSON has no number for."""
    return value if value is not None and math.isfinite(value) else None


class Decision(StrEnum):
    """What a ratio says of a metric that may become worse by so much."""

    REGRESSION = "regression"
    PASS = "pass"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Worsening:
    """A ratio as a change for the worse: a share of A, positive when B is worse."""

    worse: float
    least: float | None
    most: float | None

    @classmethod
    def of(cls, ratio: Ratio, higher_is_better: bool) -> Worsening:
        """Of a metric that is better when higher, or when lower."""
        low = None if ratio.low is None else ratio.low - 1
        high = None if ratio.high is None else ratio.high - 1
        if higher_is_better:
            return cls(1 - ratio.value, None if high is None else -high, None if low is None else -low)
        return cls(ratio.value - 1, low, high)

    def decide(self, allowed: float) -> Decision:
        """What the interval says, where more can be measured: a regression is wholly beyond what is allowed.

        It passes when the whole interval is within. Either is wrong no more often than the interval misses the truth,
        whatever the truth is. Without an interval nothing is decided.
        """
        if self.least is None or self.most is None:
            return Decision.UNDECIDED
        if self.least > allowed:
            return Decision.REGRESSION
        return Decision.PASS if self.most <= allowed else Decision.UNDECIDED

    def decide_at_once(self, allowed: float) -> Decision:
        """What there is to say of values of which there will be no more: a regression needs less.

        It is worse by more than is allowed, and the interval has only changes for the worse: of a B that is slower, but
        by less than is allowed, that may be said too. Without an interval the value alone decides.
        """
        beyond = self.worse > allowed
        if self.least is None or self.most is None:
            return Decision.REGRESSION if beyond else Decision.PASS
        return Decision.REGRESSION if beyond and self.least > 0 else self.decide(allowed)


def kept(logs: Sequence[float]) -> list[int]:
    """Which rounds ``paired_ratio`` takes the mean of, in their order."""
    cut = int(TRIMMED * len(logs)) if len(logs) >= BOOTSTRAP_FROM else 0
    return sorted(sorted(range(len(logs)), key=logs.__getitem__)[cut : len(logs) - cut])


def paired_ratio(logs: Sequence[float], tails: Tails, resamplings: int = RESAMPLINGS) -> Ratio:
    """The ratio of which every round gave one, as its logarithm: their trimmed mean from ``BOOTSTRAP_FROM`` on.

    Raises:
        ValueError: no round.
    """
    if not logs:
        raise ValueError("paired_ratio: expected at least one round")
    data = np.asarray(logs, dtype=np.float64)
    count = len(logs)
    if count < BOOTSTRAP_FROM:
        down, up = (stats.mean_interval(list(data), 1 - 2 * tail).half_width for tail in (tails.below, tails.above))
        return _student(float(data.mean()), down, up, tails, count)
    mean, error = _mean_error(data)
    means, errors = _mean_error(data[_generator().integers(0, count, size=(resamplings, count))])
    return _studentized(mean, error, means, errors, tails, count)


def unpaired_ratio(
    before: Sequence[float], after: Sequence[float], confidence: float, resamplings: int = RESAMPLINGS
) -> Ratio | None:
    """The ratio of two sides that were not measured in turns, as ``paired_ratio``; None unless all are positive.

    Raises:
        ValueError: a side without values.
    """
    if not before or not after:
        raise ValueError("unpaired_ratio: expected at least one value on each side")
    if min(*before, *after) <= 0:
        return None
    a, b = (np.log(np.asarray(side, dtype=np.float64)) for side in (before, after))
    count, tails = min(len(a), len(b)), Tails.alike(confidence)
    if count < BOOTSTRAP_FROM:
        half = stats.difference_noise(list(a), list(b), confidence)
        return _student(float(b.mean() - a.mean()), half, half, tails, count)
    rng = _generator()
    (mean_a, error_a), (mean_b, error_b) = _mean_error(a), _mean_error(b)
    means_a, errors_a = _mean_error(a[rng.integers(0, len(a), size=(resamplings, len(a)))])
    means_b, errors_b = _mean_error(b[rng.integers(0, len(b), size=(resamplings, len(b)))])
    return _studentized(
        mean_b - mean_a,
        np.hypot(error_a, error_b),
        means_b - means_a,
        np.hypot(errors_a, errors_b),
        tails,
        count,
    )


def _generator() -> np.random.Generator:
    return np.random.default_rng(_SEED)


def _mean_error(values: Floats) -> tuple[Floats, Floats]:
    """Trimmed means over the last axis, and their standard errors, of values with their ends drawn in."""
    count = values.shape[-1]
    cut = int(TRIMMED * count)
    inner = np.sort(values, axis=-1)[..., cut : count - cut]
    drawn_in = np.clip(values, inner[..., :1], inner[..., -1:])
    error = drawn_in.std(axis=-1, ddof=1) / ((1 - 2 * cut / count) * math.sqrt(count))
    return inner.mean(axis=-1), error


def _student(log: float, down: float | None, up: float | None, tails: Tails, count: int) -> Ratio:
    low, high = (None, None) if down is None or up is None else (math.exp(log - down), math.exp(log + up))
    return Ratio(math.exp(log), low, high, tails.confidence, count, "student-t")


def _studentized(mean: Floats, error: Floats, means: Floats, errors: Floats, tails: Tails, count: int) -> Ratio:
    """The interval whose ends are the quantiles of ``(mean* - mean) / error*``, turned round."""
    distance = means - mean
    # A resampling of one value over and over has no spread: as far away as can be, unless it is where the mean is.
    scores = np.where(np.abs(distance) <= _ROUNDING, 0.0, np.copysign(np.inf, distance))
    np.divide(distance, errors, out=scores, where=errors > _ROUNDING)
    lowest, highest = np.quantile(scores, [tails.above, 1 - tails.below], method="nearest")
    # Equal values have no error, and their resamplings none either.
    spread = float(error) if error > _ROUNDING else 0.0
    low, high = (float(mean) - (float(score) * spread if spread else 0.0) for score in (highest, lowest))
    return Ratio(math.exp(mean), math.exp(low), _exp(high), tails.confidence, count, "bootstrap-t")


def _exp(log: float) -> float:
    return math.exp(log) if log < 700 else math.inf
