from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st

from llmctl.bench.pareto import Point, chart, front

SPEEDS = st.none() | st.integers(0, 4).map(float)
POINTS = st.lists(
    st.builds(Point, st.sampled_from(["a", "b & <c>"]), st.integers(1, 5), st.integers(0, 5).map(float), SPEEDS),
    min_size=1,
    max_size=6,
)


@given(POINTS)
def test_who_is_off_the_front_is_beaten_in_everything(points: list[Point]) -> None:
    on_front = front(points)
    for point, is_on in zip(points, on_front, strict=True):
        better = [
            other
            for other in points
            if other.size <= point.size
            and other.kl <= point.kl
            and (other.speed is None or point.speed is None or other.speed >= point.speed)
            and (other.size, other.kl) != (point.size, point.kl)
        ]
        if not better and not any((o.size, o.kl) == (point.size, point.kl) and o.speed != point.speed for o in points):
            assert is_on
        if not is_on:
            assert any(other.beats(point) for other in points)
    least = min(points, key=lambda p: (p.size, p.kl, -(p.speed or 0)))
    assert any(is_on and p.size == least.size for p, is_on in zip(points, on_front, strict=True))


def test_a_faster_one_of_the_same_size_and_kl_wins() -> None:
    slow, fast, smaller = Point("slow", 4, 0.1, 10.0), Point("fast", 4, 0.1, 20.0), Point("smaller", 3, 0.2, 5.0)
    assert front([slow, fast, smaller]) == [False, True, True]
    assert front([Point("a", 4, 0.1, None), fast]) == [True, True]


@given(POINTS)
def test_the_chart_is_svg_with_every_point_inside(points: list[Point]) -> None:
    root = ElementTree.fromstring(chart(points, "x < y"))
    circles = [e for e in root.iter() if e.tag.endswith("circle")]
    assert len(circles) == len(points)
    for circle in circles:
        assert 0 <= float(circle.attrib["cx"]) <= 760
        assert 0 <= float(circle.attrib["cy"]) <= 460
    filled = [circle.attrib["fill"] != "#fff" for circle in circles]
    assert filled == front(points)
    texts = [e.text or "" for e in root.iter() if e.tag.endswith("text")]
    assert "x < y" in texts
    for point in points:
        assert any(text.startswith(point.label) for text in texts)
