"""Statistics of a bench run: percentiles, summaries, and Student-t intervals across repeats. Pure functions.

Percentiles interpolate linearly between order statistics (numpy's default, "linear", Hyndman and Fan type 7), as
``vllm bench serve`` does. Standard deviations of one run's samples divide by n (numpy's default, also as there);
intervals across repeats use the unbiased n-1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

PERCENTILE_METHOD = "linear interpolation between order statistics (numpy 'linear', Hyndman-Fan type 7)"


def percentile(values: Sequence[float], q: float) -> float | None:
    """The q-th percentile (0..100); None of nothing."""
    if len(values) == 0:
        return None
    return float(np.percentile(np.asarray(values, dtype=np.float64), q))


def percentile_label(q: float) -> str:
    """``99`` for 99.0 and ``99.9`` for 99.9, as in the key ``p99_ttft_ms``."""
    return str(int(q)) if float(q).is_integer() else repr(float(q))


def summarize(
    values: Sequence[float], percentiles: Sequence[float], name: str, scale: float = 1.0
) -> dict[str, object]:
    """``{mean,median,std}_<name>`` and ``p<q>_<name>`` of ``values * scale``; every value None when there are none."""
    keys = [f"mean_{name}", f"median_{name}", f"std_{name}", *(f"p{percentile_label(q)}_{name}" for q in percentiles)]
    if len(values) == 0:
        return dict.fromkeys(keys)
    data = np.asarray(values, dtype=np.float64) * scale
    numbers = [data.mean(), np.median(data), data.std(), *np.percentile(data, list(percentiles))]
    return dict(zip(keys, map(float, numbers), strict=True))


@dataclass(frozen=True)
class Interval:
    """A mean over repeats with its two-sided confidence interval; ``half_width`` is None for a single repeat."""

    mean: float
    std: float | None
    half_width: float | None
    count: int
    confidence: float

    @property
    def low(self) -> float | None:
        """Lower end."""
        return None if self.half_width is None else self.mean - self.half_width

    @property
    def high(self) -> float | None:
        """Upper end."""
        return None if self.half_width is None else self.mean + self.half_width


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Student-t interval of the mean of repeats.

    Raises:
        ValueError: no values, or a confidence outside (0, 1).
    """
    if not values:
        raise ValueError("mean_interval: expected at least one value")
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return Interval(mean, None, None, 1, confidence)
    std = _sample_std(values)
    half = t_quantile(0.5 + confidence / 2, len(values) - 1) * std / math.sqrt(len(values))
    return Interval(mean, std, half, len(values), confidence)


def geometric_mean(values: Sequence[float]) -> float:
    """The mean that ratios are taken of.

    Raises:
        ValueError: no values, or one that is not positive.
    """
    if not values:
        raise ValueError("geometric_mean: expected at least one value")
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def difference_noise(before: Sequence[float], after: Sequence[float], confidence: float = 0.95) -> float | None:
    """Half width of the two-sided Student-t interval of ``mean(after) - mean(before)``.

    The variance is pooled over both sides, so one side may have a single repeat; None when neither has two, for
    then nothing is known about the noise.
    """
    if not before or not after:
        raise ValueError("difference_noise: expected at least one value on each side")
    degrees = len(before) + len(after) - 2
    if degrees < 1:
        return None
    squares = sum((len(side) - 1) * _sample_std(side) ** 2 for side in (before, after) if len(side) > 1)
    error = math.sqrt(squares / degrees * (1 / len(before) + 1 / len(after)))
    return t_quantile(0.5 + confidence / 2, degrees) * error


def _sample_std(values: Sequence[float]) -> float:
    return float(np.std(np.asarray(values, dtype=np.float64), ddof=1))


def binomial_cdf(count: int, trials: int, share: float) -> float:
    """Probability of at most ``count`` successes in so many trials of probability ``share`` each (DLMF 8.17.5).

    Raises:
        ValueError: a share outside [0, 1], or trials below 1.
    """
    if not 0 <= share <= 1 or trials < 1:
        raise ValueError(f"binomial_cdf: share {share} not in [0, 1] or {trials} trials")
    if count < 0:
        return 0.0
    if count >= trials:
        return 1.0
    return _beta_inc(trials - count, count + 1, 1 - share)


@lru_cache(maxsize=256)
def t_quantile(probability: float, degrees: float) -> float:
    """Quantile of Student's t distribution, by bisection of its CDF to about 1e-12 relative.

    Raises:
        ValueError: a probability outside (0, 1) or degrees of freedom that are not positive.
    """
    if not 0 < probability < 1 or not degrees > 0:
        raise ValueError(f"t_quantile: probability {probability} not in (0, 1) or degrees {degrees} not positive")
    if probability < 0.5:
        return -t_quantile(1 - probability, degrees)
    low, high = 0.0, 1.0
    while _t_cdf(high, degrees) < probability:
        low, high = high, high * 2
    while high - low > 1e-12 * max(1.0, high):
        middle = (low + high) / 2
        if _t_cdf(middle, degrees) < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _t_cdf(t: float, degrees: float) -> float:
    """CDF at t >= 0, through the regularized incomplete beta function."""
    return 1 - 0.5 * _beta_inc(degrees / 2, 0.5, degrees / (degrees + t * t))


def _beta_inc(a: float, b: float, x: float) -> float:
    """Regularized incomplete beta I_x(a, b), by Lentz's evaluation of its continued fraction (DLMF 8.17.22)."""
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):
        return 1 - _beta_inc(b, a, 1 - x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    tiny = 1e-300
    c, d = 1.0, 1 / _away_from_zero(1 - (a + b) * x / (a + 1), tiny)
    fraction = d
    for m in range(1, 500):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / _away_from_zero(1 + numerator * d, tiny)
            c = _away_from_zero(1 + numerator / c, tiny)
            fraction *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * fraction / a


def _away_from_zero(value: float, tiny: float) -> float:
    return value if abs(value) > tiny else tiny
