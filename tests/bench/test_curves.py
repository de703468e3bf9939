"""Axes of charts: whatever the values, they lie on the axis, between ticks that are round."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from hypothesis import given
from hypothesis import strategies as st

from llmctl.bench.curves import HEIGHT, WIDTH, Line, Series, Spot, curves, scale
from llmctl.evaluate import svg


@given(st.lists(st.floats(0, 1e9, allow_subnormal=False), min_size=1, max_size=20))
def test_values_lie_on_the_axis(values: list[float]) -> None:
    found = scale(values, 100, 500)
    assert all(100 - 1e-6 <= found.place(v) <= 500 + 1e-6 for v in values)
    places = [found.place(tick) for tick in found.ticks]
    assert places == sorted(places)
    assert abs(places[0] - 100) < 1e-6
    assert abs(places[-1] - 500) < 1e-6
    assert 2 <= len(places) <= 20


def test_very_different_values_are_shown_by_their_logarithm() -> None:
    found = scale([0.5, 900], 0, 400)
    assert found.ticks == (0.1, 1, 10, 100, 1000)
    assert [round(found.place(tick)) for tick in found.ticks] == [0, 100, 200, 300, 400]
    assert scale([3, 90, 0], 0, 100).ticks == (0, 20, 40, 60, 80, 100)


def test_a_chart_is_svg_whatever_the_words() -> None:
    spots = (Spot(0, 1, 'a < b & "c"', word="<1>"), Spot(9, 2, "", word="at the right end", ringed=True, filled=False))
    parts = curves("title & more", "x", "y", [Series("one <x>", spots), Series("", ())], [Line(1.5, "limit")])
    root = ET.fromstring(svg.document(WIDTH, HEIGHT, parts))
    words = {e.text: e for e in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"title & more", "<1>", "one <x>", "limit", "at the right end"} <= set(words)
    assert words["at the right end"].get("text-anchor") == "end", "it would be cut off"
    assert words["<1>"].get("text-anchor") == "start"
