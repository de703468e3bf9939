"""Write ``docs/cli.md``, every command with its options, out of the commands themselves: ``make docs``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from md_table import markdown_table

from llmctl.cli.main import app

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
_HEAD = """\
# Commands and options

What `llmctl COMMAND --help` says, made of the same source by `make docs`. Where there is
`--config FILE.yaml`, a key of the file is an option's long name without the dashes, a repeatable option takes a list,
and the command line wins. So this page is the reference of the files in [configs](../configs), too."""
_PANEL = "Options"


def page() -> str:
    """The whole page."""
    commands = list(_commands(typer.main.get_command(app), "llmctl"))
    names = [(f"[`{name}`](#{name.replace(' ', '-')})", _first(command)) for name, command in commands]
    parts = [_HEAD, markdown_table(("command", "what it does"), names)]
    for name, command in commands:
        parts += _command(name, command)
    return "\n\n".join(parts) + "\n"


def _commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Every command that is no group, with its whole name."""
    found = getattr(command, "commands", None)
    if found is None:
        yield name, command
        return
    for word, one in found.items():
        if not one.hidden:
            yield from _commands(one, f"{name} {word}")


def _first(command: Any) -> str:
    return _text(command.help).partition("\n\n")[0]


def _text(said: str | None) -> str:
    """Help as Markdown: rich's marks gone, examples as code, lines of a paragraph joined."""
    plain = re.sub(r"\[/?(?:bold|dim|cyan|italic)[^\]]*\]", "", said or "").replace("\b", "")
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", plain) if part.strip()]
    return "\n\n".join(re.sub(r"^Example: (.*)$", r"Example: `\1`", part) for part in paragraphs)


def _command(name: str, command: Any) -> Iterator[str]:
    yield f"## {name}"
    yield _text(command.help)
    panels: dict[str, list[Any]] = {}
    for parameter in command.params:
        if parameter.name == "help" or getattr(parameter, "hidden", False):
            continue
        panels.setdefault(getattr(parameter, "rich_help_panel", None) or _PANEL, []).append(parameter)
    for panel, parameters in panels.items():
        yield f"**{panel}**"
        rows = [(_names(p), _default(p), _cell(getattr(p, "help", "") or "")) for p in parameters]
        yield markdown_table(("option", "default", "meaning"), rows)


def _names(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar or parameter.name.upper()}`"
    metavar = "" if parameter.is_flag else f" {parameter.metavar or 'VALUE'}"
    names = [*parameter.opts, *parameter.secondary_opts]
    return ", ".join(f"`{option}{metavar}`" for option in names).replace("|", "\\|")


def _default(parameter: Any) -> str:
    value = parameter.default
    if parameter.required:
        return "required"
    if value is None or value is False or value in ("", (), []) or callable(value) or "UNSET" in repr(value).upper():
        return ""
    if isinstance(value, bool):
        return "on"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _cell(said: str) -> str:
    return " ".join(_text(said).split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
