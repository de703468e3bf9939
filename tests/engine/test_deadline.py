"""The text of a deadline, and how one completes another."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmctl.engine.deadline import NO_DEADLINE, PATIENCE, Deadline
from llmctl.errors import UsageError

MS = st.one_of(st.none(), st.floats(1e-3, 1e6))


@given(MS, MS, st.booleans())
def test_what_is_written_is_what_is_read(ttft: float | None, itl: float | None, turned: bool) -> None:
    parts = [f"{name}:{ms!r}" for name, ms in (("ttft", ttft), ("itl", itl)) if ms is not None]
    if not parts:
        return
    found = Deadline.parse(",".join(reversed(parts) if turned else parts), "--deadline")
    assert found == Deadline(*(None if ms is None else ms / 1000 for ms in (ttft, itl)))


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "300",
            "ttft",
            "ttft:",
            "ttft:0",
            "ttft:-1",
            "ttft:nan",
            "ttft:inf",
            "ttft:" + "9" * 60,
            "ttft:300ms",
            "tpot:5",
        ),
        *("ttft:1,ttft:2", "ttft:300;itl:50", "ttft:300,", ",itl:5", "TTFT:300", "ttft=300", "parse:1"),
        *("ttft:1e3", "ttft:1_0", "ttft:+1", " ttft:1", "ttft: 1", "ttft:١", "ttft:0.0", "ttft:1\n", "ttft:1."),
    ],
)
def test_anything_else_is_refused_with_what_is_expected(text: str) -> None:
    with pytest.raises(UsageError, match="--deadline: expected ttft:MS, itl:MS or ttft:MS,itl:MS") as caught:
        Deadline.parse(text, "--deadline")
    assert (caught.value.param, caught.value.http_status) == ("deadline", 400)


def test_a_long_text_is_not_told_whole() -> None:
    with pytest.raises(UsageError) as caught:
        Deadline.parse("x" * 10_000, "deadline")
    assert len(str(caught.value)) < 250


def test_what_it_lacks_is_the_others() -> None:
    default = Deadline(0.3, 0.05)
    assert Deadline(1.0).over(default) == Deadline(1.0, 0.05)
    assert Deadline(None, 1.0).over(default) == Deadline(0.3, 1.0)
    assert Deadline.parse(None, "deadline").over(default) == default
    assert NO_DEADLINE.over(NO_DEADLINE) == NO_DEADLINE
    assert [bool(d) for d in (NO_DEADLINE, Deadline(1.0), Deadline(None, 1.0))] == [False, True, True]


def test_when_it_is_due() -> None:
    assert Deadline(0.25).due(100.0) == 100.25
    assert Deadline(None, 0.25).due(100.0) == 100.0 + PATIENCE
