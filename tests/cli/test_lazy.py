"""A command is read when it is asked for, and ``serve``'s worker starts before anything else is."""

from __future__ import annotations

import contextlib
import errno
import subprocess
import sys
from collections.abc import Iterator

import pytest
import typer

from llmctl import __main__ as entry
from llmctl.cli import main
from llmctl.cli.lazy import Later, LazyCommands
from llmctl.serving import spawned


def imported_by(code: str) -> set[str]:
    """Names of the modules that a Python process has imported at its end."""
    code += "\nimport sys\nprint(*sys.modules)"
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(made.stdout.splitlines()[-1].split())


def test_one_command_imports_no_other() -> None:
    found = imported_by("from llmctl.cli.main import app\napp(['serve', '--help'], standalone_mode=False)")
    commands = {f"llmctl.cli.{later.module}" for later in main.Commands.later.values()}
    assert commands & found == {"llmctl.cli.serve"}


def test_commands_are_made_once_and_in_order() -> None:
    found = typer.main.get_command(main.app).commands  # type: ignore[attr-defined]
    assert list(found) == list(main.Commands.later)
    assert all(found[word].name == word for word in found)
    assert found["bench"].commands["serve"].name == "serve"
    assert found["serve"] is found["serve"]


def test_what_there_is_not_is_not_found() -> None:
    commands = LazyCommands({"no": Later("no_such_module", "no")})
    assert commands.get("other") is None
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        commands["no"]


@pytest.mark.parametrize(
    ("given", "starts"),
    [
        (["serve", "m"], True),
        (["serve"], True),
        (["serve", "--help"], False),
        (["bench", "serve"], False),
        (["run", "serve"], False),
        ([], False),
    ],
)
def test_a_worker_for_serve_alone(given: list[str], starts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[object] = []

    @contextlib.contextmanager
    def early_worker() -> Iterator[str]:
        events.append("started")
        yield "worker"
        events.append("ended")

    monkeypatch.setattr(spawned, "early_worker", early_worker)
    monkeypatch.setattr(main, "run_command", events.append)
    monkeypatch.setattr(sys, "argv", ["llmctl", *given])
    entry.main()
    assert events == (["started", "worker", "ended"] if starts else [None])


def test_a_worker_that_cannot_be_started_is_for_the_command_to_say(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    events: list[object] = []
    monkeypatch.setattr(spawned, "SpawnedWorker", none)
    monkeypatch.setattr(main, "run_command", events.append)
    monkeypatch.setattr(sys, "argv", ["llmctl", "serve", "m"])
    entry.main()
    assert events == [None]


def test_the_worker_waits_for_no_import() -> None:
    """What stands before its start, it waits for."""
    found = imported_by("import llmctl.__main__, llmctl.serving.spawned")
    assert not {"typer", "rich", "numpy", "msgspec", "asyncio", "pydantic", "yaml", "llmctl.config"} & found


def test_the_worker_imports_what_it_needs() -> None:
    """A third of a start is its imports."""
    found = imported_by("from llmctl.serving import worker\nworker._preload()")
    assert not {"asyncio", "ssl", "jinja2", "tokenizers", "pydantic", "starlette", "rich", "typer"} & found
    assert not {"llmctl.targets.cuda", "llmctl.serving.supervisor", "llmctl.serving.client"} & found


def test_a_wrong_option_leaves_no_worker_behind() -> None:
    made = subprocess.run(
        [sys.executable, "-m", "llmctl", "serve", "--no-such-option"], capture_output=True, text=True, timeout=60
    )
    assert made.returncode == 2
    assert made.stderr.count("\n") == 1
    assert "No such option" in made.stderr
