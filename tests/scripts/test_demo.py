"""What ``make demo`` shows is what it runs, and can be copied."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import demo
import pytest
from bench.test_local_server import STUB, child_of, wait_gone
from fixtures import ServerProcess

LONG = ["run", "./a folder/with [brackets]", "--system", "x" * 200]


def shown(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The command on the one line that was shown."""
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("$ ")]
    return shlex.split(line[2:])


def test_a_command_can_be_copied(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "console", demo.Console(width=80))
    demo.show(LONG)
    assert shown(capsys) == LONG


def test_what_is_shown_is_what_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []

    def record(command: list[str]) -> subprocess.CompletedProcess[str]:
        ran.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(demo.subprocess, "run", record)
    demo.run("inspect", "./engine")
    assert [shown(capsys)] == ran


def test_llmctl_is_this_pythons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / "bin" / "python"))
    assert demo.llmctl("list")[1:] == ["-m", "llmctl", "list"]
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "llmctl").touch()
    assert demo.llmctl("list") == ["venv/bin/llmctl", "list"]


def test_the_server_that_is_shown_is_the_one_that_serves(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(demo, "llmctl", lambda *args: [*STUB, *args])
    monkeypatch.setattr(demo, "show", lambda command, **_: print("$", shlex.join(command[-4:])))
    with demo.server(tmp_path) as served:
        assert served.ready_seconds > 0
        assert served.process.poll() is None
    said = capsys.readouterr().out
    assert said.startswith(f"$ serve {tmp_path} --port {served.url.rpartition(':')[2]}\nloading weights\n")
    assert served.process.returncode == 0
    wait_gone(child_of(said))


def test_a_server_that_does_not_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "llmctl", lambda *args: [*STUB, *args])
    monkeypatch.setenv("END", "at once")
    with pytest.raises(SystemExit, match="it said last: error: out of memory"), demo.server(Path()):
        pytest.fail("entered")


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl on this machine")
def test_the_curls_answer(server: ServerProcess, capsys: pytest.CaptureFixture[str]) -> None:
    """That of the demo, and the line that serve itself shows at its start."""
    demo.ask(server.url)
    said = json.loads(subprocess.run(shown(capsys), check=True, capture_output=True, timeout=60).stdout)
    assert said["choices"][0]["message"]["role"] == "assistant"
    (line,) = [line for line in server.output.splitlines() if line.startswith("try: ")]
    made = subprocess.run(line.removeprefix("try: "), shell=True, check=True, capture_output=True, timeout=60)
    assert json.loads(made.stdout)["object"] == "chat.completion"
