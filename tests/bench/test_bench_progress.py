"""What a bench says of itself while nothing ends: a plain line now and then, where there is no terminal."""

from __future__ import annotations

import time

import pytest

from llmctl.bench import progress as module
from llmctl.bench.progress import Progress


def lines(capsys: pytest.CaptureFixture[str], count: int) -> list[str]:
    """At least so many lines of stderr, which come by themselves."""
    said, deadline = "", time.monotonic() + 10
    while said.count("\n") < count:
        assert time.monotonic() < deadline, said
        time.sleep(0.005)
        said += capsys.readouterr().err
    return said.splitlines()


def test_lines_come_while_nothing_ends(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "_PLAIN_EVERY", 0.02)
    progress = Progress()
    progress.start("requests", 5)
    for _ in range(3):
        progress.sent()
    assert lines(capsys, 2)[-1] == "requests: 3 sent, 0/5 done, 3 running"
    progress.advance()
    progress.advance(failed=True)
    assert lines(capsys, 2)[-1] == "requests: 3 sent, 2/5 done, 1 running, 1 failed"
    progress.start("iterations", 2)  # none of which runs beside another
    progress.advance()
    assert lines(capsys, 2)[-1] == "iterations: 1/2 done"
    progress.stop()
    capsys.readouterr()
    time.sleep(0.06)
    assert capsys.readouterr().err == ""
