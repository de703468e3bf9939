"""When requests arrive: all at once, at a Poisson or gamma-distributed rate, or evenly spaced."""

from __future__ import annotations

import math

import numpy as np

from llmctl.errors import UsageError


def arrival_times(count: int, request_rate: float, burstiness: float, seed: int) -> list[float]:
    """Seconds from the start at which each of ``count`` requests arrives, ascending.

    ``request_rate`` is in requests a second; infinity means all at 0. Gaps are gamma distributed with shape
    ``burstiness``: 1 is a Poisson process, below 1 burstier, above 1 more even, infinity exactly even. The gaps are
    rescaled so that the last request arrives at ``count / request_rate``, as ``vllm bench serve`` does, which keeps
    the offered load the same for every seed.

    Raises:
        UsageError: a rate or burstiness that is not positive.
    """
    if not request_rate > 0:
        raise UsageError(f"--request-rate: expected a positive number or inf, found {request_rate}")
    if not burstiness > 0:
        raise UsageError(f"--burstiness: expected a positive number or inf, found {burstiness}")
    if math.isinf(request_rate):
        return [0.0] * count
    if math.isinf(burstiness):
        return [(i + 1) / request_rate for i in range(count)]
    rng = np.random.default_rng([seed, 0xA221])
    times = np.cumsum(rng.gamma(burstiness, 1 / (request_rate * burstiness), size=count))
    if count and times[-1] > 0:
        times *= count / request_rate / times[-1]
    return [float(t) for t in times]
