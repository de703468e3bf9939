"""How fast things finish, and so how long until a number of them has: what a ``Retry-After`` says."""

from __future__ import annotations

import math
import time
from collections import deque

WINDOW_SECONDS = 10
LEAST_SECONDS, MOST_SECONDS = 1, 60


def whole_seconds(seconds: float) -> int:
    """What a ``Retry-After`` says of so many seconds: 1 to 60."""
    return min(max(math.ceil(seconds), LEAST_SECONDS), MOST_SECONDS)


class FinishRate:
    """Counts what finished in the last ``WINDOW_SECONDS``, by the second.

    A moment is in seconds on ``time.monotonic``; None is now.
    """

    def __init__(self, since: float | None = None) -> None:
        self._since = time.monotonic() if since is None else since
        self._seconds: deque[tuple[int, int]] = deque()  # which second, how many in it

    def begin(self, now: float | None = None) -> None:
        """Work begins after none was there: the time before says nothing of how fast it is done."""
        self._since = time.monotonic() if now is None else now
        self._seconds.clear()

    def count(self, finished: int = 1, now: float | None = None) -> None:
        """So many finished."""
        second = int(time.monotonic() if now is None else now)
        if self._seconds and self._seconds[-1][0] == second:
            finished += self._seconds.pop()[1]
        self._seconds.append((second, finished))
        self._forget(second)

    def seconds_until(self, finished: int, now: float | None = None) -> int:
        """Whole seconds until so many more will have finished at the present rate, 1 to 60.

        With nothing finished yet, one is taken to be about to.
        """
        count, elapsed = self._counted(now)
        return whole_seconds(finished * elapsed / max(1, count))

    def per_second(self, now: float | None = None) -> float:
        """The present rate; 0 with nothing finished yet."""
        count, elapsed = self._counted(now)
        return count / elapsed

    def _counted(self, now: float | None) -> tuple[int, float]:
        """How many finished in the window, and its seconds."""
        now = time.monotonic() if now is None else now
        self._forget(int(now))
        return sum(n for _, n in self._seconds), min(max(now - self._since, 1.0), float(WINDOW_SECONDS))

    def _forget(self, second: int) -> None:
        while self._seconds and self._seconds[0][0] <= second - WINDOW_SECONDS:
            self._seconds.popleft()
