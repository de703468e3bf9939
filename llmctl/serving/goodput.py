"""Goodput: how many of the requests with a deadline kept it, as their clients see it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from prometheus_client import Counter

from llmctl.engine.deadline import Deadline

OUTCOMES = ("met", "ttft_missed", "itl_missed", "shed")


def outcome(deadline: Deadline, ttft: float, itl: float) -> str:
    """What became of an ended request; the first that holds of ``ttft_missed``, ``itl_missed`` and ``met``.

    Args:
        ttft: seconds from its arrival to its first output; infinity: there was none.
        itl: seconds between tokens after the first, in the mean; infinity: they did not all come.
    """
    if ttft > (math.inf if deadline.ttft is None else deadline.ttft) or math.isinf(ttft):
        return "ttft_missed"
    if itl > (math.inf if deadline.itl is None else deadline.itl) or math.isinf(itl):
        return "itl_missed"
    return "met"


class Goodput:
    """Counts outcomes, in a counter whose last label they are. ``values``: of its other labels."""

    def __init__(self, counter: Counter, values: Sequence[str]) -> None:
        self._outcomes = {name: counter.labels(*values, name) for name in OUTCOMES}

    def ended(self, deadline: Deadline, ttft: float, itl: float) -> None:
        """Count a request that ended, if it had a deadline; see ``outcome``."""
        if deadline:
            self._outcomes[outcome(deadline, ttft, itl)].inc()

    def shed(self, deadline: Deadline, requests: int = 1) -> None:
        """Count requests that were refused for their deadline."""
        if deadline:
            self._outcomes["shed"].inc(requests)
