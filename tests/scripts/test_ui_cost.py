"""What the script takes an open page for, which is what the page does; and what it says of an interval."""

from __future__ import annotations

import math

import pytest
import ui_cost

from llmctl.bench.ratios import Ratio


def test_the_page_asks_for_nothing_more_often_than_every_two_seconds() -> None:
    found = ui_cost.asked()
    assert set(found) == {"/metrics", "/requests", "/ready"}
    assert min(found.values()) >= 2
    assert found["/metrics"] >= 5  # some 15 ms of the event loop each


@pytest.mark.parametrize(("low", "high", "code"), [(0.991, 0.999, 0), (0.98, 0.989, 5), (0.985, 0.995, 6)])
def test_the_exit_code_is_what_the_interval_says(low: float, high: float, code: int) -> None:
    ratio = Ratio((low + high) / 2, low, high, ui_cost.CONFIDENCE, 24, "bootstrap-t")
    assert ui_cost.verdict(ratio, 0.99) == code


def test_a_rounds_cost_is_against_both_windows_without() -> None:
    found = ui_cost.Round(100.0, 121.0, 110.0)
    assert math.exp(found.cost) == pytest.approx(1.0)
    assert math.exp(found.noise) == pytest.approx(1.21)
    assert {kind for order in ui_cost.ORDERS for kind in order} == {"without", "again", "open"}
    assert {order.index("open") for order in ui_cost.ORDERS} == {0, 1, 2}
