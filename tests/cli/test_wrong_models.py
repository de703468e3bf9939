"""A name that no model has is a usage error of every command that takes a model, and says so in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer
from in_one_python import answers, run

from llmctl.cli.main import app
from llmctl.errors import ExitCode

COMMANDS: dict[str, list[str]] = {
    "run": ["WRONG", "why?"],
    "chat": ["WRONG", "why?"],
    "build": ["WRONG", "--output", "OUT"],
    "inspect": ["WRONG"],
    "show": ["WRONG"],
    "quantize": ["WRONG", "--output", "OUT"],
    "quantize compare": ["WRONG"],
    "convert": ["WRONG", "--to", "gptq", "--output", "OUT"],
    "merge": ["WRONG", "ADAPTER", "--output", "OUT"],
    "eval": ["WRONG"],
    "bench throughput": ["WRONG"],
    "bench latency": ["WRONG"],
    "bench profile": ["WRONG"],
}
SERVERS: dict[str, list[str]] = {
    "serve": ["WRONG", "--port", "0"],
    "bench compare": ["--a", "WRONG", "--b", "WRONG"],
    "bench sweep": ["--engine", "WRONG", "--num-prompts", "1", "--max-concurrency", "1"],
}
"""Those in which another process looks for the model."""
WITHOUT = {"bench serve", "list", "rm", "doctor"}
WRONG = ("missing folder", "empty folder", "no config", "not a checkpoint", "unknown demo", "offline hub id")


@pytest.fixture
def wrong(tmp_path: Path) -> dict[str, str]:
    """What is given as MODEL, by what is wrong with it."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "model.safetensors").write_bytes(b"x" * 64)
    (tmp_path / "notes.txt").write_text("no model")
    found = [str(tmp_path / name) for name in ("nowhere", "empty", "bare", "notes.txt")]
    return dict(zip(WRONG, [*found, "demo:no-such-model", "nobody/no-such-model"], strict=True))


@pytest.fixture
def offline(tmp_path: Path) -> dict[str, str]:
    """Environment variables under which nothing is fetched or found in a cache."""
    names = ("LLMCTL_CACHE", "HF_HOME", "HF_HUB_CACHE")
    return {**{name: str(tmp_path / name) for name in names}, "HF_HUB_OFFLINE": "1"}


def words(name: str, args: list[str], model: str, folder: Path) -> list[str]:
    places = {"WRONG": model, "OUT": str(folder / "out"), "ADAPTER": str(folder / "adapter")}
    return [*name.split(), *(places.get(word, word) for word in args)]


def names(group: Any = None, path: str = "") -> set[str]:
    found: set[str] = set()
    for name, command in (group or typer.main.get_command(app)).commands.items():
        found |= names(command, f"{name} ") if hasattr(command, "commands") else {path + name}
    return found


def test_no_command_is_left_out() -> None:
    assert names() == COMMANDS.keys() | SERVERS.keys() | WITHOUT


def test_in_this_process(wrong: dict[str, str], offline: dict[str, str], tmp_path: Path) -> None:
    asked = [(name, what) for name in COMMANDS for what in WRONG]
    commands = [words(name, COMMANDS[name], wrong[what], tmp_path) for name, what in asked]
    for (name, what), (code, stdout, stderr) in zip(asked, answers(offline, *commands), strict=True):
        line = stderr.splitlines()[-1]
        assert (name, what, code, stdout) == (name, what, ExitCode.USAGE, ""), stderr
        assert line.startswith("error: "), f"{name}, {what}: {stderr}"
        assert wrong[what] in line, f"{name}, {what}: {stderr}"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=[] if what == "empty folder" else pytest.mark.slow) for what in WRONG]
)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "serve" else pytest.mark.slow) for name in SERVERS]
)
def test_in_a_server(name: str, what: str, wrong: dict[str, str], offline: dict[str, str], tmp_path: Path) -> None:
    command = words(name, SERVERS[name], wrong[what], tmp_path)
    done = run(offline, "-m", "llmctl", *command)
    assert (done.returncode, done.stdout) == (ExitCode.USAGE, ""), done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
