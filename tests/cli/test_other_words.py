"""Words of other tools: each hint names something that there is; and so does every command that a message shows."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import llmctl
from llmctl.cli.main import app
from llmctl.cli.other_words import COMMANDS, OPTIONS, WITHOUT

ROOT = typer.main.get_command(app)


def commands(group: Any = ROOT, path: str = "llmctl") -> Iterator[tuple[str, Any]]:
    """Every command by its whole name."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


BY_NAME = dict(commands())
HAS = {name: {o for p in command.params for o in (*p.opts, *p.secondary_opts)} for name, command in BY_NAME.items()}


def error_line(*args: str) -> str:
    made = CliRunner().invoke(app, args)
    assert made.exit_code == 2, made.output
    (line,) = made.stderr.splitlines()
    return line


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["serve", "m", "-c", "4096"], "here it is --max-model-len TOKENS)"),
        (["serve", "m", "--ctx-size=4096"], "here it is --max-model-len TOKENS)"),
        (["serve", "m", "-ngl", "99"], "No such option: -ngl (fix: here it is --target cuda, which puts all layers on"),
        (["serve", "m", "-np", "4"], "here it is --max-num-seqs N)"),
        (["run", "m", "-n", "4"], "here it is --max-tokens TOKENS of llmctl run"),
        (["run", "m", "-p", "hello"], 'leave it out: the prompt is a word of its own: llmctl run MODEL "PROMPT")'),
        (["serve", "m", "--no-mmap"], "leave it out: weights are always mapped"),
        (["quantize", "m", "-c", "4096"], "here it is --max-model-len TOKENS of llmctl run, llmctl build, "),
        (["pull", "m"], "(fix: llmctl run MODEL, which fetches what it is given first"),
        (["generate", "m"], '(fix: llmctl run MODEL "PROMPT")'),
        (["ls"], "(fix: llmctl list)"),
        (["serve", "m", "--nothing-of-the-kind"], "(fix: see llmctl serve --help)"),
        (["nothing"], "(fix: see llmctl --help)"),
    ],
)
def test_a_word_of_another_tool_names_ours(args: list[str], said: str) -> None:
    assert said in error_line(*args)


@pytest.mark.parametrize(("args", "said"), [(["pull", "m"], "llmctl run MODEL"), (["run", "-c", "1"], "-model-len")])
def test_whatever_the_program_is_called(args: list[str], said: str) -> None:
    code = f"from llmctl.cli.main import app; app({args!r}, prog_name='python -m llmctl')"
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (made.returncode, said in made.stderr) == (2, True), made.stderr
    assert made.stderr.count("\n") == 1


def test_every_hint_names_an_option_that_there_is() -> None:
    known = {option for options in HAS.values() for option in options}
    for ours in OPTIONS:
        assert ours.split()[0].rstrip(",") in known, ours


def test_every_hint_names_a_command_that_there_is() -> None:
    for ours, theirs in COMMANDS.items():
        for name in re.findall(r"llmctl ((?:bench )?[a-z]+)", ours):
            assert f"llmctl {name}" in BY_NAME, ours
        assert not set(theirs) & {name.split()[1] for name in BY_NAME}, theirs


def test_no_word_has_two_meanings() -> None:
    words = [word for table in (OPTIONS, WITHOUT, COMMANDS) for names in table.values() for word in names]
    assert len(words) == len(set(words))


_SHOWN = re.compile(r"llmctl ((?:bench |quantize )?[a-z]+)((?:[^\n`);,\"]|\{[^}]*\})*)")


def test_commands_in_messages_and_help_exist() -> None:
    """Every ``llmctl COMMAND --option`` in the package's own text: the command and its options are there."""
    seen = 0
    for path in sorted(Path(llmctl.__file__).parent.rglob("*.py")):
        for words, rest in _SHOWN.findall(path.read_text()):
            parts = words.split()
            name = f"llmctl {words}" if f"llmctl {words}" in BY_NAME else f"llmctl {parts[0]}"
            options = re.findall(r"(?<![\w-])(--[a-z][a-z-]+|-[a-z])(?![\w-])", rest)
            if not options:
                continue
            assert name in BY_NAME, f"{path.name}: llmctl {words}"
            seen += 1
            allowed = HAS[name] | {"--help", "-h"}
            assert set(options) <= allowed, f"{path.name}: llmctl {words}{rest}: {set(options) - allowed}"
    assert seen > 20
