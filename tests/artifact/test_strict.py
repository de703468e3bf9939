"""Dataclasses <-> JSON data: what is written is read back, everything else is refused by its path."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmctl.artifact.strict import from_data, to_data


@dataclass(frozen=True)
class Inner:
    text: str
    numbers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Outer:
    flag: bool
    share: float
    inner: Inner
    maybe: Inner | None
    several: tuple[Inner, ...]
    by_name: Mapping[str, int]


inners = st.builds(Inner, st.text(), st.lists(st.integers()).map(tuple))
outers = st.builds(
    Outer,
    st.booleans(),
    st.floats(allow_nan=False),
    inners,
    st.none() | inners,
    st.lists(inners, max_size=3).map(tuple),
    st.dictionaries(st.text(), st.integers(), max_size=3),
)


@given(outers)
def test_round_trip_through_json(value: Outer) -> None:
    assert from_data(Outer, json.loads(json.dumps(to_data(value)))) == value


GOOD = {
    "flag": True, "share": 1, "inner": {"text": "a", "numbers": [1]}, "maybe": None, "several": [], "by_name": {"x": 1},
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"falg": True}, "unknown key 'falg'; the nearest known one is 'flag'"),
        ({"inner": {"text": "a", "numbers": [], "more": 1}}, "unknown key 'inner.more'"),
        ({"inner": {"text": "a"}}, "key 'inner.numbers' is missing"),
        ({"inner": {"text": 1, "numbers": []}}, "inner.text: expected a string, found int"),
        ({"inner": {"text": "a", "numbers": [True]}}, r"inner.numbers\[0\]: expected an integer, found bool"),
        ({"inner": None}, "inner: expected an object, found NoneType"),
        ({"flag": 1}, "flag: expected true or false, found int"),
        ({"share": "x"}, "share: expected a number, found str"),
        ({"several": {}}, "several: expected a list, found dict"),
        ({"by_name": {"x": "y"}}, "by_name.x: expected an integer, found str"),
    ],
)
def test_refusals_name_the_path(change: dict[str, object], message: str) -> None:
    assert from_data(Outer, GOOD)
    with pytest.raises(ValueError, match=message):
        from_data(Outer, GOOD | change)
