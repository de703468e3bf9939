"""The frame of the CLI: version, help, light imports, ``--config``."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from llmctl import __version__
from llmctl.cli.main import app

BENCH = [["bench", "serve"], ["bench", "throughput"], ["bench", "latency"]]


def all_commands(group: Any = None) -> list[list[str]]:
    """Every command's words, those that the help does not list too."""
    found = []
    for name, command in (group or typer.main.get_command(app)).commands.items():
        deeper = all_commands(command) if hasattr(command, "commands") else [[]]
        found += [[*name.split(), *rest] for rest in deeper]
    return found


COMMANDS = all_commands()
ALIASES = [["chat"], ["show"]]
"""Other names of run and inspect."""


def run(*args: str, columns: str = "120") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "llmctl", *args],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": "/usr/bin:/bin", "COLUMNS": columns, "HOME": str(Path.home())},
    )


def test_version() -> None:
    result = run("--version")
    assert (result.returncode, result.stdout) == (0, f"llmctl {__version__}\n")


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in ALIASES], ids=" ".join)
def test_help_has_panels_and_an_example(command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.returncode == 0, result.stderr
    assert f"llmctl {' '.join(command)}" in result.stdout.split("Usage:")[1].split("\n", 1)[1], "no example"
    assert result.stdout.count("╭─") >= 2, "options are not grouped into panels"


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_cuts_nothing_at_80_columns(command: list[str]) -> None:
    """No ellipsis that is not there where there is room, and every name of an option in one piece."""
    narrow, wide = (help_of(command, columns) for columns in (80, 400))
    assert max(map(len, narrow.splitlines())) <= 80
    assert narrow.count("…") == wide.count("…")
    shown = set(re.findall(r"(?<![\w-])--?[A-Za-z][\w-]*", narrow))
    assert options_of(command) <= shown


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_sentence_of_the_help_breaks_at_the_edge_alone(command: list[str]) -> None:
    paragraphs = inspect.cleandoc(found_command(command).callback.__doc__).split("\n\n")
    lines = [" ".join(line.split()) for line in help_of(command, 1000).splitlines()]
    for paragraph in paragraphs:
        assert " ".join(re.sub(r"\[/?bold\]", "", paragraph).split()) in lines


def help_of(command: list[str], columns: int) -> str:
    made = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": str(columns)})
    assert made.exit_code == 0, made.output
    return made.stdout


def found_command(words: list[str]) -> Any:
    found: Any = typer.main.get_command(app)
    while hasattr(found, "commands"):
        found = found.commands.get(" ".join(words)) or found.commands[words[0]]
        words = words[1:]
    return found


def options_of(command: list[str]) -> set[str]:
    return {
        name for p in found_command(command).params for name in (*p.opts, *p.secondary_opts) if name.startswith("-")
    }


@pytest.mark.parametrize("command", [[], *COMMANDS], ids=" ".join)
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    code = (
        "import sys\n"
        "from llmctl.cli.main import app\n"
        f"app({[*command, '--help']!r}, standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'cupy', 'numpy', 'starlette', 'aiohttp', 'huggingface_hub'}\n"
        "heavy &= set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("command", [["quantize"], ["convert"], ["eval"], ["build"], ["serve"], *BENCH], ids=" ".join)
def test_config_with_an_unknown_key_names_the_nearest(command: list[str], tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("modle: demo:smollm2-135m\n")
    result = run(*command, "--config", str(path))
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "unknown option 'modle'" in result.stderr
    assert "did you mean 'model'" in result.stderr


def one_error_line(*args: str) -> str:
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a\n- b\n", "expected a mapping"),
        ("model: [", "not valid YAML"),
        ("port: [1, 2]", "port: expected one value, found [1, 2]"),
        ("port: {a: 1}", "port: expected one value"),
        ("slo: [[a]]", "slo: expected one value or a list"),
        ("insecure: 3", "insecure: expected true or false, found 3"),
        ("label: yes", "label: expected one value, found true (quote it if it is text)"),
        ("num-prompts: 1.5", "'--num-prompts'"),
    ],
)
def test_a_config_that_cannot_be_taken(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert said in one_error_line("bench", "serve", "--config", str(path))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("api-key: [sk-secret]", "api-key: expected one value, found something else"),
        ("priority-keys: {sk-secret: 1}", "priority-keys: expected one value, found something else"),
        ('api-key: "sk-secret', "not valid YAML: found unexpected end of stream, line 1, column 20"),
        ("api-key: *sk-secret", "not valid YAML: found undefined alias [not shown], line 1, column 10"),
        ("api-key: a: sk-secret", "not valid YAML: mapping values are not allowed here, line 1, column 11"),
    ],
)
def test_an_error_in_a_config_shows_no_key(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    line = one_error_line("serve", "--config", str(path))
    assert said in line
    assert "secret" not in line


def test_the_help_shows_no_key_of_a_config(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("api-key: sk-secret\npriority-keys: sk-secret\nhost: 1.2.3.4\n")
    result = CliRunner().invoke(app, ["serve", "--config", str(path), "--help"])
    assert "1.2.3.4" in result.stdout
    assert "secret" not in result.stdout


@pytest.mark.parametrize("given", [["--api-key", "a,", "sk-secret"], ["--priority-keys=a", "sk-secret"]])
def test_a_word_too_many_beside_a_key_is_not_shown(given: list[str]) -> None:
    line = one_error_line("serve", "--model", "m", *given)
    assert "unexpected extra argument" in line
    assert "secret" not in line


def test_a_missing_config_is_one_line() -> None:
    assert "nowhere.yaml" in one_error_line("build", "--config", "nowhere.yaml")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["nothing"], "No such command 'nothing'"),
        (["bench", "nothing"], "No such command 'nothing'"),
        (["build", "--modle", "x"], "--modle"),
        (["build", "--model"], "requires an argument"),
        (["build", "--block-size", "x"], "'--block-size'"),
        (["build", "x", "y"], "extra argument"),
        (["inspect"], "Missing argument 'ENGINE'"),
        (["serve", "--port", "70000"], "'--port'"),
        (["bench", "latency", "--threads", "0"], "'--threads'"),
        (["bench", "throughput", "--max-num-seqs", "0"], "'--max-num-seqs'"),
    ],
)
def test_a_wrong_command_line_is_one_line(args: list[str], said: str) -> None:
    assert said in one_error_line(*args)


def test_no_arguments_is_the_help() -> None:
    result = run()
    assert result.returncode == 2
    assert "Usage:" in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize("text", ["slo: p99_ttft_ms<=x", "slo: [p99_ttft_ms<=x]"])
def test_one_value_of_a_repeatable_option_needs_no_list(text: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    assert "--slo 'p99_ttft_ms<=x'" in one_error_line("bench", "serve", "--config", str(path))


def test_keys_are_the_options_names(tmp_path: Path) -> None:
    """Also where the parameter behind the option is called otherwise, and for arguments."""
    path = tmp_path / "c.yaml"
    path.write_text("json: true\nengine: ./from-config\n")
    assert "./from-config" in one_error_line("inspect", "--config", str(path))


def test_command_line_wins_over_config(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: ./from-config\ntarget: reference\n")
    result = run("build", "--config", str(path), "--model", "./from-command-line", "--output", str(tmp_path / "e"))
    assert result.returncode == 2
    assert "from-command-line" in result.stderr
    assert not (tmp_path / "e").exists()


def test_sigterm_lets_a_command_clean_up() -> None:
    code = (
        "import os, signal, time\n"
        "from llmctl.cli import main\n"
        "@main.app.command()\n"
        "def wait():\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        time.sleep(30)\n"
        "    finally:\n"
        "        print('cleaned up')\n"
        "main.run_command()\n"
    )
    result = subprocess.run([sys.executable, "-c", code, "wait"], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (143, "cleaned up\n", "terminated\n")
