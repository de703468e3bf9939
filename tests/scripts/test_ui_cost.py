"""What the script takes an open page for, which is what the page does."""

from __future__ import annotations

import ui_cost


def test_the_page_asks_for_nothing_more_often_than_every_two_seconds() -> None:
    found = ui_cost.asked()
    assert set(found) == {"/metrics", "/requests", "/ready"}
    assert min(found.values()) >= 2
    assert found["/metrics"] >= 5  # some 15 ms of the event loop each
