"""Whether a command of the documents could be typed: what of it can be known without running it."""

from __future__ import annotations

import ast
import itertools
import json
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema_rs
import typer
from docs.documents import ROOT

from llmctl.cli.main import app
from llmctl.serving.addresses import ALIASES
from llmctl.serving.openapi import describe

_WRAPPERS = {"taskset": 3, "chrt": 3, "time": 1, "nohup": 1}
"""Programs before another one, with the number of words that are theirs."""
_VENV = ".venv/bin/"
_OPTION = re.compile(r"""["'](--[a-z][a-z0-9-]*)["'= ]""")
_VARIABLE = re.compile(r"[A-Z_]+=")
_ROOT_COMMAND: Any = typer.main.get_command(app)


class WrongCommand(Exception):
    """It could not be typed as it stands."""


def check(words: Sequence[str]) -> None:
    """Hold a command to what it names.

    Raises:
        WrongCommand: with the reason; a program that nobody here knows is one.
    """
    words = list(itertools.dropwhile(_VARIABLE.match, words))
    if not words:  # variables alone
        return
    program = words[0].removeprefix(_VENV)
    if program in _WRAPPERS:
        check(words[_WRAPPERS[program] :])
    elif program in _CHECKS:
        _CHECKS[program](words[1:])
    else:
        raise WrongCommand(f"'{program}': nothing checks it; mark the block as not run, with the reason")


@cache
def known_options() -> frozenset[str]:
    """Every option of every command, and of every script."""
    found: set[str] = set()
    todo = [_ROOT_COMMAND]
    while todo:
        command = todo.pop()
        todo += getattr(command, "commands", {}).values()
        found.update(*(parameter.opts + parameter.secondary_opts for parameter in command.params))
    for script in (ROOT / "scripts").rglob("*.py"):
        found |= set(_OPTION.findall(script.read_text(encoding="utf-8")))
    return frozenset(found)


def _llmctl(words: Sequence[str]) -> None:
    """As Typer reads it: the command, and every option with its value."""
    command, name, rest = _ROOT_COMMAND, "llmctl", list(words)
    if rest == ["--version"]:
        return
    rest = _without_missing_config(rest)
    try:
        while hasattr(command, "commands"):
            context = command.context_class(command, info_name=name)
            name, command, rest = command.resolve_command(context, rest)
        command.make_context(name, list(rest))
    except typer.Exit as ended:
        if ended.exit_code:
            raise WrongCommand(f"exit code {ended.exit_code}") from ended
    except typer.BadParameter.__bases__[0] as error:
        raise WrongCommand(error.format_message()) from error  # type: ignore[attr-defined]


def _without_missing_config(words: list[str]) -> list[str]:
    """A file of options that a reader writes is not here to be read."""
    for i, word in enumerate(words[:-1]):
        if word == "--config" and not (ROOT / words[i + 1]).exists():
            if words[i + 1].startswith("configs/"):
                raise WrongCommand(f"no such file: {words[i + 1]}")
            return [*words[:i], *words[i + 2 :]]
    return words


def _python(words: Sequence[str]) -> None:
    if words[:2] == ["-m", "pytest"]:
        _pytest(words[2:])
        return
    if words[:2] == ["-m", "venv"]:
        return
    script = ROOT / words[0]
    if not script.is_file():
        raise WrongCommand(f"no such file: {words[0]}")
    known = _options_of(script)
    own = list(itertools.takewhile(lambda word: word != "--", words[1:]))
    if beyond := words[2 + len(own) :]:  # of the servers that the script starts
        _llmctl(["serve", "./engine", *beyond])
    for word in own:
        option = word.partition("=")[0]
        if option.startswith("--") and option not in known:
            raise WrongCommand(f"{words[0]} has no option {option}")


@cache
def _options_of(script: Path) -> frozenset[str]:
    """What a script, and the modules of scripts/ that it imports, call options of theirs."""
    seen: set[Path] = set()
    todo, found = [script], set()
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        source = path.read_text(encoding="utf-8")
        found |= set(_OPTION.findall(source))
        for node in ast.walk(ast.parse(source)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                module = ROOT / "scripts" / (name.replace(".", "/") + ".py")
                todo += [module] if module.is_file() else []
    return frozenset(found)


def _pytest(words: Sequence[str]) -> None:
    for i, word in enumerate(words):
        path = word.partition("::")[0]
        value = i > 0 and words[i - 1] in ("-m", "-k", "-n", "--dist")
        if not word.startswith("-") and not value and not (ROOT / path).exists():
            raise WrongCommand(f"no such test: {path}")


def _make(words: Sequence[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in words:
        name, equals, _ = word.partition("=")
        if equals and f"$({name})" not in makefile and f"$(if $({name})" not in makefile:
            raise WrongCommand(f"the Makefile has no variable {name}")
        if not equals and not re.search(rf"^{re.escape(word)}:", makefile, re.MULTILINE):
            raise WrongCommand(f"the Makefile has no target {word}")


def _pip(words: Sequence[str]) -> None:
    """Extras are those of pyproject.toml, and what is installed by our name has it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in words:
        if (found := re.fullmatch(r"(\.|[A-Za-z][\w.-]*)\[([\w,-]+)\](?: @ .+)?", word)) is None:
            continue
        name, extras = found[1], found[2].split(",")
        if name not in (".", project["name"]):
            raise WrongCommand(f"'{name}' is not this project's name, {project['name']}")
        for extra in extras:
            if extra not in project["optional-dependencies"]:
                raise WrongCommand(f"no extra '{extra}'")


def _curl(words: Sequence[str]) -> None:
    """An endpoint of ours, with a body that its description allows, declared to be JSON."""
    headers, body, url, rest = [], None, "", list(words)
    while rest:
        word = rest.pop(0)
        if word in ("-H", "--header"):
            headers.append(rest.pop(0).lower())
        elif word in ("-d", "--data"):
            body = rest.pop(0)
        elif word in ("-o", "-u", "-X", "--max-time", "--retry"):
            rest.pop(0)
        elif not word.startswith("-"):
            url = word
    path = re.sub(r"^(https?://)?[^/]+", "", url).partition("?")[0]
    document = _description()
    item = document["paths"].get(ALIASES.get(path, path))
    if item is None and path not in ("/openapi.json", "/docs", "/"):
        raise WrongCommand(f"{url}: no such endpoint")
    if body is None:
        if item is not None and "get" not in item:
            raise WrongCommand(f"{url}: wants a body")
        return
    if "content-type: application/json" not in headers:
        raise WrongCommand(f"{url}: a body without -H 'Content-Type: application/json' is refused")
    if item is None or "post" not in item:
        raise WrongCommand(f"{url}: takes no body")
    schema = item["post"]["requestBody"]["content"]["application/json"]["schema"]
    validator = jsonschema_rs.Draft202012Validator({**schema, "components": document["components"]})
    try:
        for error in validator.iter_errors(json.loads(body)):
            raise WrongCommand(f"{url}: {error.message}")
    except ValueError as error:
        raise WrongCommand(f"{url}: the body is not JSON: {error}") from error


@cache
def _description() -> Mapping[str, Any]:
    return describe("model", with_keys=False)


def _paths(words: Sequence[str]) -> None:
    for word in words:
        if "/" in word and not word.startswith("-") and not (ROOT / word).exists():
            raise WrongCommand(f"no such file: {word}")


_CHECKS: Mapping[str, Callable[[Sequence[str]], None]] = {
    "llmctl": _llmctl,
    "python": _python,
    "python3": _python,
    "pytest": _pytest,
    "make": _make,
    "pip": _pip,
    "curl": _curl,
    "ruff": _paths,
    "mypy": _paths,
    "printf": lambda _: None,
    "cat": _paths,
}
