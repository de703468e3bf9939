"""Every command in the documents is run (test_docs_run.py), held to what it names, or marked with the reason."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from docs.command_checks import WrongCommand, check, known_options
from docs.documents import NOT_RUN, PAGES, ROOT, Block, all_blocks, inline, simple_commands

LANGUAGES = {"bash", "text", "json", "yaml", "python", "toml", "nginx", "dockerfile", "promql"}
PARSERS: Mapping[str, Callable[[str], Any]] = {"python": ast.parse, "json": json.loads, "yaml": yaml.safe_load}
OTHERS = {"--help", "--version", "--sanitize", "--gpus", "--build-arg", "--profile", "--now", "--extra-index-url"}
"""Options of Docker, systemd, pip, scripts/gpu_check.sh, and those that every command has."""
SWITCHES = {"--help", "--version", "--dry-run", "--json"}
BLOCKS = all_blocks()
COMMANDS = [block for block in BLOCKS if block.commands() and block.mark != NOT_RUN]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_says_what_it_is(page: Path) -> None:
    """So that no command goes by as something else."""
    wrong = [block.place for block in BLOCKS if block.page == page and block.language not in LANGUAGES]
    assert not wrong, f"fence these with one of {', '.join(sorted(LANGUAGES))}"


@pytest.mark.parametrize("block", COMMANDS, ids=lambda block: block.place)
def test_commands_could_be_typed(block: Block) -> None:
    for words in block.commands():
        try:
            check(words)
        except WrongCommand as error:
            pytest.fail(f"{block.place}: {' '.join(words)}: {error}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_within_sentences_could_be_typed(page: Path) -> None:
    for token in inline(page):
        if token.type == "code_inline" and token.content.startswith("llmctl ") and "…" not in token.content:
            words = token.content.split()
            named = not any(word.startswith("-") for word in words[1:]) or words[-1].startswith("--")
            if words[1].isupper() or (named and words[-1] not in SWITCHES):  # a name of a command or an option alone
                continue
            try:
                check(simple_commands(token.content)[0])
            except WrongCommand as error:
                pytest.fail(f"{page.relative_to(ROOT)}: {token.content}: {error}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_options_that_are_named_exist(page: Path) -> None:
    codes = [token.content for token in inline(page) if token.type == "code_inline"]
    named = {option for code in codes for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", code)}
    assert named <= known_options() | OTHERS


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block.language in PARSERS], ids=lambda block: block.place
)
def test_what_has_a_grammar_is_written_by_it(block: Block) -> None:
    PARSERS[str(block.language)](block.text)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("llmctl serve --modle x", "--modle"),
        ("llmctl quantise --model x", "quantise"),
        ("llmctl build --model x --block-size many", "'--block-size'"),
        ("llmctl bench serve --config configs/bench/none.yaml", "no such file"),
        ("python scripts/soak.py --hostle", "has no option --hostle"),
        ("python scripts/none.py", "no such file"),
        ("make demos", "no target demos"),
        ("make demo PIP_FLAG=x", "no variable PIP_FLAG"),
        ("pytest tests/nowhere", "no such test"),
        ("pip install -e '.[everything]'", "no extra 'everything'"),
        ("pip install 'llmctl-of-somebody[dev]'", "is not this project's name"),
        ("pip install 'llmctl-engine[everything] @ git+https://h/o/r'", "no extra 'everything'"),
        ("curl localhost:8000/v1/chat", "no such endpoint"),
        ("curl localhost:8000/v1/completions", "wants a body"),
        ("""curl localhost:8000/v1/completions -d '{"prompt": "a"}'""", "without -H 'Content-Type"),
        ("curl -H 'Content-Type: application/json' localhost:8000/v1/completions -d '{\"prompt\": 1}'", "1 is not"),
        ("curl -H 'Content-Type: application/json' localhost:8000/v1/completions -d '{prompt}'", "is not JSON"),
        ("taskset -c 0 llmctl serve --prot 1", "--prot"),
        ("X=1 llmctl serve --prot 1 > log 2>&1 &", "--prot"),
        ("cd x && llmctl serve --prot 1", "nothing checks it"),
    ],
)
def test_what_could_not_be_typed_is_noticed(line: str, said: str) -> None:
    with pytest.raises(WrongCommand) as caught:
        check_all(line)
    assert said in str(caught.value)


def check_all(line: str) -> None:
    for words in simple_commands(line):
        check(words)


def test_a_line_of_shell_is_its_commands() -> None:
    assert simple_commands("a 'b c' | d > e 2>&1 && f; g &  # h") == [["a", "b c"], ["d"], ["f"], ["g"]]
