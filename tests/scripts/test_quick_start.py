"""What scripts/quick_start.py keeps of the commands' output."""

from __future__ import annotations

import json

import pytest
import quick_start


def test_the_commands_are_readmes() -> None:
    found = quick_start.commands(quick_start.README.read_text(encoding="utf-8"))
    assert [line.split()[:2] for line in found if line.startswith("llmctl")] == [
        ["llmctl", name] for name in ("run", "build", "serve", "bench")
    ]
    assert len(found) == 5


@pytest.mark.parametrize(
    ("command", "output", "kept"),
    [
        ("llmctl build --model x", "weights 10%\nengine: 1 MiB\n", ["engine: 1 MiB"]),
        (
            "llmctl serve",
            "╭── serve: ready in 1.0 s ──╮\n│ URL  http://h │\n",
            ["serve: ready in 1.0 s", "URL  http://h"],
        ),
        ("llmctl bench serve", " TTFT  1  2 \nclient CPU\npass  32 completed\n", [" TTFT  1  2", "pass  32 completed"]),
        ("llmctl run m", "It is\n\nso.\n", ["It is", "so."]),
        ("curl x", json.dumps({"choices": [{"message": {"content": " Hi. "}}]}), ["Hi."]),
    ],
)
def test_what_is_kept(command: str, output: str, kept: list[str]) -> None:
    assert quick_start.shown(command, output) == kept


def test_an_output_without_what_is_looked_for_is_no_output() -> None:
    with pytest.raises(ValueError, match="nothing of the output of 'llmctl build x'"):
        quick_start.shown("llmctl build x", "something else")


def test_the_section_names_each_command() -> None:
    assert quick_start.section([("llmctl build …", ["engine"])]) == "```text\n$ llmctl build …\nengine\n```"
