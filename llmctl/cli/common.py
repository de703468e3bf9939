"""What every subcommand shares: the ``--config`` option, error reporting, consoles, ``--json`` output."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from llmctl.config import load_yaml_options
from llmctl.errors import ExitCode, LlmctlError

F = TypeVar("F", bound=Callable[..., Any])

_NOT_OPTIONS = frozenset({"config", "help"})


def _apply_config(ctx: typer.Context, value: Path | None) -> Path | None:
    """Make a YAML file's values the defaults of this command's options; the command line still wins."""
    if value is None or ctx.resilient_parsing:
        return value
    known = [p.name for p in ctx.command.params if p.name and p.name not in _NOT_OPTIONS]
    try:
        options = load_yaml_options(value, known)
    except LlmctlError as error:
        report(error)
        raise typer.Exit(int(error.exit_code)) from None
    ctx.default_map = {**(ctx.default_map or {}), **{k: _as_click_value(v) for k, v in options.items()}}
    return value


def _as_click_value(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [str(item) for item in value]
    return value if isinstance(value, bool | type(None)) else str(value)


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

JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout.", rich_help_panel="General")
]


def report(error: LlmctlError) -> None:
    """Print an error as one line on stderr: what is wrong, then the fix."""
    line = f"error: {error.message}"
    if error.fix:
        line += f" (fix: {error.fix})"
    print(" ".join(line.split()), file=sys.stderr)


def guarded(function: F) -> F:
    """Decorate a subcommand: a user-visible error becomes one line and its exit code, never a traceback.

    Set LLMCTL_TRACEBACK=1 to see tracebacks of user errors too.
    """

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
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
        except OSError as error:
            if os.environ.get("LLMCTL_TRACEBACK"):
                raise
            report(LlmctlError(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")))
            raise typer.Exit(int(ExitCode.RUNTIME)) from None

    return wrapper  # type: ignore[return-value]


def print_json(document: Mapping[str, Any]) -> None:
    """One JSON document on stdout, keys in insertion order."""
    print(json.dumps(document, indent=2, ensure_ascii=False, default=str))
