"""What a ``Retry-After`` is made of."""

from __future__ import annotations

from llmctl.serving.finish_rate import WINDOW_SECONDS, FinishRate


def steady(per_second: int, seconds: int) -> FinishRate:
    rate = FinishRate(since=0.0)
    for i in range(per_second * seconds):
        rate.count(now=i / per_second)
    return rate


def test_seconds_are_what_is_needed_by_the_rate() -> None:
    rate = steady(4, 30)
    assert [rate.seconds_until(n, now=29.9) for n in (1, 4, 5, 40, 200)] == [1, 1, 2, 10, 50]


def test_they_are_whole_and_bounded() -> None:
    assert steady(1000, 20).seconds_until(1, now=19.9) == 1
    assert steady(1, 20).seconds_until(10_000, now=19.9) == 60


def test_only_the_last_seconds_count() -> None:
    rate = steady(100, 20)
    rate.count(5, now=20.0 + WINDOW_SECONDS)
    assert rate.seconds_until(10, now=20.0 + WINDOW_SECONDS) == 20
    assert len(rate._seconds) == 1


def test_a_young_rate_is_measured_from_its_beginning() -> None:
    rate = FinishRate(since=0.0)
    assert rate.seconds_until(3, now=2.0) == 6
    rate.begin(now=100.0)
    rate.count(4, now=101.0)
    assert rate.seconds_until(8, now=102.0) == 4


def test_it_holds_little_however_much_finishes() -> None:
    assert len(steady(500, 60)._seconds) <= WINDOW_SECONDS
