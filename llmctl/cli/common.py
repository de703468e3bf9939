"""What every subcommand shares: the ``--config`` option, error reporting, consoles, ``--json`` output."""

from __future__ import annotations

import errno
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from llmctl.config import load_yaml_options, override_text
from llmctl.errors import ExitCode, LlmctlError, UsageError, resource_error
from llmctl.extras import missing_package
from llmctl.secret_options import SECRET_OPTIONS

F = TypeVar("F", bound=Callable[..., Any])

_NOT_OPTIONS = frozenset({"config", "help", "words", "model_word"})
_FROM_MAPPING: Mapping[str, Callable[[Mapping[Any, Any]], str]] = {"override": override_text}
# Typer carries its own copy of click, or depends on it: this is the base of every command-line error in either.
_CommandLineError: Any = typer.BadParameter.__bases__[0]


class OneLineErrors(TyperGroup):
    """A command group whose usage errors are one line on stderr, like every other error."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """As Typer's, where a command's name may be two words (``quantize compare``)."""
        two = " ".join(args[:2])
        if len(args) > 1 and two in self.commands:
            return two, self.commands[two], args[2:]
        return super().resolve_command(ctx, args)

    def main(self, args: Sequence[str] | None = None, *rest: Any, standalone_mode: bool = True, **more: Any) -> Any:
        """As Typer's, which would draw a box around the message."""
        more["standalone_mode"] = False
        if not standalone_mode:
            return super().main(args, *rest, **more)
        try:
            code = super().main(args, *rest, **more)
        except _CommandLineError as error:
            if message := error.format_message().strip():  # empty: no arguments, and the help is already printed
                command = error.ctx.command_path if error.ctx else "llmctl"
                given = sys.argv[1:] if args is None else args
                message, hint = self._in_our_words(error, message, given)
                message = _without_extra_words(message, given)
                report(UsageError(message.rstrip("."), fix=hint or f"see {command} --help"))
            code = ExitCode.USAGE
        sys.exit(int(code) if isinstance(code, int) else 0)

    def _in_our_words(self, error: Any, message: str, args: Sequence[str]) -> tuple[str, str | None]:
        """The message, and what a word that is another tool's is called here; None: it is nobody's."""
        from llmctl.cli.other_words import command_hint, option_hint

        if error.ctx is None:
            return message, None
        refused = getattr(error, "option_name", None)
        if refused is not None and not hasattr(error, "param_hint"):  # an option that there is not
            # By our own name, however this was started: as a script, by python -m.
            command = "llmctl" + error.ctx.command_path.removeprefix(error.ctx.find_root().command_path)
            found = option_hint(refused, args, command, dict(_owners(self, "llmctl")))
            return (message, None) if found is None else (f"No such option: {found[0]}", found[1])
        name = next((arg for arg in args if not arg.startswith("-")), "")
        at_the_top = error.ctx.parent is None and name not in self.commands
        return message, command_hint(name) if at_the_top else None


def _owners(group: Any, path: str) -> Iterator[tuple[str, list[str]]]:
    """Every option -> the commands that have it, by their whole names."""
    found: dict[str, list[str]] = {}
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            for option, owners in _owners(command, f"{path} {name}"):
                found.setdefault(option, []).extend(owners)
        elif not command.hidden:
            for parameter in command.params:
                for option in (*parameter.opts, *parameter.secondary_opts):
                    found.setdefault(option, []).append(f"{path} {name}")
    yield from found.items()


class WholeNames(TyperCommand):
    """A command whose help shows every option's whole name, in a terminal of 80 columns as well."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        if self.help:  # Typer keeps the line breaks of all paragraphs but the first
            self.help = "\n\n".join(" ".join(paragraph.split()) for paragraph in self.help.split("\n\n"))

    def format_help(self, *args: Any) -> None:
        """As Typer's, with an option's names in one column: in its four they are cut to make room for each other."""
        from rich.table import Table
        from rich.text import Text
        from typer import rich_utils

        class Options(Table):
            def add_row(self, *cells: Any, **more: Any) -> None:
                if len(cells) < 6:  # not an option's: [required], --long, -s, --no-long, -S, type, help
                    return super().add_row(*cells, **more)
                *required, long, short, off, short_off, kind, text = cells
                names = [Text(", ").join(name for name in pair if name) for pair in ((long, short), (off, short_off))]
                if not self.columns:
                    for _ in required:
                        self.add_column(no_wrap=True)
                    self.add_column(no_wrap=True)
                for part in getattr(text, "renderables", []):  # a default that has no space to be divided at
                    part.overflow = "fold"
                return super().add_row(*required, Text("\n").join(name for name in names if name), kind, text, **more)

        whole: Any = rich_utils
        if not hasattr(whole, "Table"):  # not Typer's to promise: names are cut then, which a test sees
            return super().format_help(*args)
        was, whole.Table = whole.Table, Options
        try:
            super().format_help(*args)
        finally:
            whole.Table = was


def _without_extra_words(message: str, args: Sequence[str]) -> str:
    """The message without the words that are one too many, which may be keys (``--api-key A, B``)."""
    secret = tuple("--" + name.replace("_", "-") for name in SECRET_OPTIONS)
    if message.startswith("Got unexpected extra argument") and any(arg.startswith(secret) for arg in args):
        return message.partition(" (")[0] + ", not shown as a key is given"
    return message


def _apply_config(ctx: typer.Context, value: Path | None) -> Path | None:
    """Make a YAML file's values the defaults of this command's options; the command line still wins."""
    if value is None or ctx.resilient_parsing:
        return value
    parameters = {_yaml_key(p): p for p in ctx.command.params if p.name not in _NOT_OPTIONS}
    try:
        options = load_yaml_options(value, parameters)
        defaults = {parameters[k].name: _default(value, parameters[k], k, found) for k, found in options.items()}
    except LlmctlError as error:
        report(error)
        raise typer.Exit(int(error.exit_code)) from None
    ctx.default_map = {**(ctx.default_map or {}), **defaults}
    return value


def _yaml_key(parameter: Any) -> str:
    """An option's long name with underscores; an argument's own name."""
    names = [name[2:].replace("-", "_") for name in parameter.opts if name.startswith("--")]
    return names[0] if names else str(parameter.name)


def _default(path: Path, parameter: Any, key: str, found: Any) -> Any:
    """A YAML value as the text that Typer would have read from the command line.

    Raises:
        UsageError: a value that no command line could have given.
    """
    repeatable, switch = getattr(parameter, "multiple", False), getattr(parameter, "is_flag", False)
    wanted = "true or false" if switch else "one value or a list" if repeatable else "one value"
    items = found if repeatable and isinstance(found, list) else [found]
    as_text = _FROM_MAPPING.get(key)
    if as_text is not None:
        items = [as_text(item) if isinstance(item, Mapping) else item for item in items]
    for item in items:
        scalar = not isinstance(item, list | dict)
        if item is not None and (not scalar or isinstance(item, bool) != switch):
            shown = "something else" if key in SECRET_OPTIONS else str(item)
            if scalar:
                shown = shown.lower() + ("" if switch else " (quote it if it is text)")
            name = key.replace("_", "-")
            raise UsageError(f"--config {path}: {name}: expected {wanted}, found {shown}", param=parameter.name)
    if found is None or switch:
        return found
    return [str(item) for item in items if item is not None] if repeatable else str(found)


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE.yaml",
        is_eager=True,
        callback=_apply_config,
        help="Read options from a YAML file (keys = option names); the command line wins.",
        rich_help_panel="General",
    ),
]

AsOption = Annotated[
    str,
    typer.Option(
        "--as",
        metavar="FAMILY",
        help="Read a checkpoint whose model_type is not known as this family's, such as llama; an error offers those "
        "that its settings and tensors fit.",
        rich_help_panel="Model",
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout.", rich_help_panel="General")
]


def is_given(ctx: typer.Context, name: str, *, environment: bool = True) -> bool:
    """Whether an option stands on the command line, in the environment (if that counts) or in the YAML file."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name not in ("DEFAULT", *(() if environment else ("ENVIRONMENT",)))


def on_command_line(ctx: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line itself, where it wins over the YAML file."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def report(error: LlmctlError) -> None:
    """Print an error as one line on stderr: what is wrong, then the fix."""
    line = f"error: {error.message}"
    if error.fix:
        line += f" (fix: {error.fix})"
    print(" ".join(line.split()), file=sys.stderr)


def _check_address_space() -> None:
    from llmctl.targets.address_space import check_address_space

    check_address_space()


_ELSEWHERE = "write elsewhere: --output DIR for what is made, LLMCTL_CACHE=DIR for what is kept between runs"
_PLACE_FIXES = {
    errno.ENOSPC: f"free space there, or {_ELSEWHERE}",
    errno.EDQUOT: f"free space there, or {_ELSEWHERE}",
    errno.EROFS: _ELSEWHERE,
}
"""What to do where a folder takes nothing."""


def guarded(function: F) -> F:
    """Decorate a subcommand: a user-visible error becomes one line and its exit code, never a traceback.

    Set LLMCTL_TRACEBACK=1 to see tracebacks of user errors too.
    """

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            _check_address_space()
            return function(*args, **kwargs)
        except LlmctlError as error:
            if os.environ.get("LLMCTL_TRACEBACK"):
                raise
            report(error)
            raise typer.Exit(int(error.exit_code)) from None
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(130) from None
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(int(ExitCode.RUNTIME)) from None
        except (MemoryError, ImportError, RuntimeError) as error:
            said = missing_package(error) or resource_error(error)
            if said is None or os.environ.get("LLMCTL_TRACEBACK"):
                raise
            report(said)
            raise typer.Exit(int(said.exit_code)) from None
        except OSError as error:
            if os.environ.get("LLMCTL_TRACEBACK"):
                raise
            where, fix = "", None
            if error.filename:  # what has no name may be stdout
                where, fix = f": {error.filename}", _PLACE_FIXES.get(error.errno or 0)
            report(LlmctlError(f"{error.strerror or error}{where}", fix=fix))
            raise typer.Exit(int(ExitCode.RUNTIME)) from None

    return wrapper  # type: ignore[return-value]


def print_json(document: Mapping[str, Any]) -> None:
    """One JSON document on stdout, keys in insertion order."""
    print(json.dumps(document, indent=2, ensure_ascii=False, default=str))
