"""What a bench says of itself while nothing ends: a plain line now and then, where there is no terminal."""

from __future__ import annotations

import time

import pytest

from llmctl.bench import progress as module
from llmctl.bench.progress import Progress


def await_line(capsys: pytest.CaptureFixture[str], line: str) -> None:
    """Until it is on stderr twice, where lines come by themselves; before it there may be some of earlier states."""
    said, deadline = "", time.monotonic() + 10
    while said.splitlines().count(line) < 2:
        assert time.monotonic() < deadline, said
        time.sleep(0.005)
        said += capsys.readouterr().err


def test_lines_come_while_nothing_ends(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "_PLAIN_EVERY", 0.02)
    progress = Progress()
    progress.start("requests", 5)
    for _ in range(3):
        progress.sent()
    await_line(capsys, "requests: 3 sent, 0/5 done, 3 running")
    progress.advance()
    progress.advance(failed=True)
    await_line(capsys, "requests: 3 sent, 2/5 done, 1 running, 1 failed")
    progress.start("iterations", 2)  # none of which runs beside another
    progress.advance()
    await_line(capsys, "iterations: 1/2 done")
    progress.stop()
    capsys.readouterr()
    time.sleep(0.06)
    assert capsys.readouterr().err == ""
