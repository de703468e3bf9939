"""Progress without a terminal: plain lines, few of them."""

from __future__ import annotations

import pytest

from llmctl.artifact.step_progress import PlainProgress, step_progress


def test_a_line_at_the_beginning_and_each_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    show = PlainProgress()
    show("kernels", "compiling norm.cu", 0, 20)
    for done in range(1, 21):
        show("kernels", f"k{done}", done, 20)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "kernels 0/20 (compiling norm.cu)"
    assert [line.split()[1] for line in lines[1:]] == [f"{n}/20" for n in range(2, 21, 2)]


def test_weights_are_shares_and_what_begins_anew_is_counted_anew(capsys: pytest.CaptureFixture[str]) -> None:
    show = PlainProgress()
    for _ in range(2):
        for done in (2**20, 2**21):
            show("weights", "w", done, 2**21)
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == ["50%", "100%"] * 2


def test_without_a_terminal_it_is_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with step_progress() as show:
        show("kernels", "one", 1, 1)
    assert capsys.readouterr().err == "kernels 1/1 (one)\n"
