"""How often, and how soon, a dead worker is replaced."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

WINDOW_SECONDS = 600.0
"""Restarts that are longer ago do not count any more."""
FIRST_DELAY_SECONDS = 0.1
_GROWTH = 3.0
_MOST_GROWTHS = 10
_LONGEST_DELAY_SECONDS = 30.0


class RestartPolicy:
    """At most ``most`` restarts within ``WINDOW_SECONDS``, each after three times the wait of the one before.

    Args:
        clock: seconds.
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.most = most
        self._clock = clock
        self._times: deque[float] = deque()

    def next_delay(self) -> float | None:
        """Seconds to wait before the restart that is now due, which counts from here on; None: no more restarts."""
        now = self._clock()
        while self._times and now - self._times[0] > WINDOW_SECONDS:
            self._times.popleft()
        if len(self._times) >= self.most:
            return None
        self._times.append(now)
        exponent = min(len(self._times) - 1, _MOST_GROWTHS)
        return float(min(FIRST_DELAY_SECONDS * _GROWTH**exponent, _LONGEST_DELAY_SECONDS))

    def describe(self) -> str:
        """The restarts within the window, in words."""
        return f"{len(self._times)} of {self.most} restarts within {WINDOW_SECONDS / 60:.0f} minutes"
