"""When a dead worker is replaced, and when no more."""

from __future__ import annotations

import pytest

from llmctl.serving.restarts import WINDOW_SECONDS, RestartPolicy


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_each_wait_is_longer_until_the_last_restart() -> None:
    policy = RestartPolicy(3, Clock())
    assert [policy.next_delay() for _ in range(5)] == [pytest.approx(s) for s in (0.1, 0.3, 0.9)] + [None] * 2
    assert policy.describe() == "3 of 3 restarts within 10 minutes"


def test_none_at_all() -> None:
    assert RestartPolicy(0).next_delay() is None


def test_what_is_long_ago_counts_no_more() -> None:
    clock = Clock()
    policy = RestartPolicy(2, clock)
    assert policy.next_delay() is not None
    clock.now = WINDOW_SECONDS / 2
    assert policy.next_delay() == pytest.approx(0.3)
    assert policy.next_delay() is None
    clock.now = WINDOW_SECONDS + 1
    assert policy.next_delay() == pytest.approx(0.3)
    assert policy.next_delay() is None


def test_a_wait_has_an_end() -> None:
    policy = RestartPolicy(1000, Clock())
    assert max(policy.next_delay() or 0.0 for _ in range(1000)) == 30.0
