"""MODEL without ``--model``, in every command that has the option."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from llmctl.bench import offline, step_profile
from llmctl.checkpoint import convert
from llmctl.cli import build_run
from llmctl.cli.main import app
from llmctl.quantize import backends


class Caught(Exception):
    """The settings that a command would have run with."""


COMMANDS: dict[str, tuple[Any, str, list[str]]] = {
    "build": (build_run, "run_build", []),
    "quantize": (backends, "run_backend", ["--output", "x", "--eval-text", "none"]),
    "convert": (convert, "convert_checkpoint", []),
    "bench throughput": (offline, "run_throughput", []),
    "bench latency": (offline, "run_latency", []),
    "bench profile": (step_profile, "run_profile", []),
}
OTHERWISE = {"serve", "run", "chat", "bench serve", "bench sweep", "bench compare"}
"""serve and run take further words; those of the benches of servers are values of their options, as vLLM's are."""


@pytest.fixture(params=COMMANDS)
def command(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a command up to the point where it would begin; the model that it has, or what went wrong."""
    module, function, more = COMMANDS[request.param]

    def catch(settings: Any, *_: object, **__: object) -> None:
        raise Caught(settings.model)

    monkeypatch.setattr(module, function, catch)

    def run(*args: str) -> Result:
        return CliRunner().invoke(app, [*request.param.split(), *more, *args])

    return run


def model_of(result: Result) -> str:
    assert isinstance(result.exception, Caught), result.output
    return str(result.exception)


def test_by_place_or_by_name(command: Any, tmp_path: Path) -> None:
    for args in (["m"], ["--model", "m"], ["m", "--model", "m"]):
        assert model_of(command(*args)) == "m"
    (tmp_path / "c.yaml").write_text("model: from-file\n")
    assert model_of(command("--config", str(tmp_path / "c.yaml"))) == "from-file"
    assert model_of(command("m", "--config", str(tmp_path / "c.yaml"))) == "m"


def test_no_command_is_left_out() -> None:
    having = {
        " ".join(words)
        for words, command in all_commands()
        if any("--model" in parameter.opts for parameter in command.params)
    }
    assert having == set(COMMANDS) | OTHERWISE


def all_commands(group: Any = None) -> Iterator[tuple[list[str], Any]]:
    for name, command in (group or typer.main.get_command(app)).commands.items():
        if hasattr(command, "commands"):
            yield from (([name, *rest], found) for rest, found in all_commands(command))
        else:
            yield [name], command


def test_two_models_are_refused(command: Any) -> None:
    made = command("a", "--model", "b")
    assert (made.exit_code, made.stderr) == (2, "error: two models: 'a' and --model 'b' (fix: name one)\n")
    made = command("a", "b")
    assert (made.exit_code, "unexpected extra argument" in made.stderr) == (2, True)


def test_no_file_has_a_key_for_the_place(command: Any, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("model-word: m\n")
    assert "unknown option 'model-word'" in command("--config", str(tmp_path / "c.yaml")).stderr


def test_completion_is_typers_own() -> None:
    code = "import sys; from llmctl.cli.main import app; app(['--show-completion', 'bash'], prog_name='llmctl')"
    env = os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}  # the suite's own shell may be any
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=env)
    assert "_LLMCTL_COMPLETE=complete_bash" in made.stdout, made.stderr
