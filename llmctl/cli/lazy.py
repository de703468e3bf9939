"""Commands that are imported when they are looked up: to start one, none of the others is read."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, ClassVar

import typer

from llmctl.cli.common import OneLineErrors, WholeNames


@dataclass(frozen=True)
class Later:
    """A command, or a Typer app of some.

    Attributes:
        module: below ``llmctl.cli``. name: its name in there.
        options: further ones of ``Typer.command``.
    """

    module: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def command(self, word: str) -> Any:
        """The command that ``word`` stands for."""
        found = getattr(import_module(f"llmctl.cli.{self.module}"), self.name)
        one = typer.Typer(add_completion=False, rich_markup_mode="rich")
        if isinstance(found, typer.Typer):
            one.add_typer(found, name=word)
        else:
            one.command(word, cls=WholeNames, **self.options)(found)
        return typer.main.get_group(one).commands[word]


class LazyCommands(UserDict[str, Any]):
    """Commands by their words, ``Later`` ones made when somebody asks for them."""

    def __getitem__(self, word: str) -> Any:
        """The command.

        Raises:
            KeyError: there is none.
        """
        found = self.data[word]
        if isinstance(found, Later):
            found = self.data[word] = found.command(word)
        return found


class LazyGroup(OneLineErrors):
    """A group with the commands of ``later``, by their words, before its own."""

    later: ClassVar[Mapping[str, Later]] = {}

    def __init__(self, *, commands: Mapping[str, Any] | None = None, **more: Any) -> None:
        super().__init__(**more)
        self.commands = LazyCommands({**self.later, **(commands or {})})
