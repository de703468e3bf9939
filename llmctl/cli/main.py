"""The ``llmctl`` command. Importing this module imports neither torch, transformers nor cupy."""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from llmctl import __version__
from llmctl.cli.lazy import Later, LazyGroup

if TYPE_CHECKING:
    from llmctl.serving.spawned import SpawnedWorker


class Commands(LazyGroup):
    """All of llmctl's."""

    later: ClassVar[Mapping[str, Later]] = {
        "run": Later("run", "run"),
        "chat": Later("run", "run", {"hidden": True}),
        "build": Later("build", "build"),
        "inspect": Later("inspect", "inspect"),
        "show": Later("inspect", "inspect", {"hidden": True}),
        "serve": Later(
            "serve",
            "serve",
            {"context_settings": {"allow_extra_args": True}, "options_metavar": "[MODEL] [OPTIONS]"},
        ),
        "quantize": Later("quantize", "quantize"),
        "quantize compare": Later("quantize_compare", "compare"),
        "convert": Later("convert", "convert"),
        "merge": Later("merge", "merge"),
        "eval": Later("eval", "evaluate"),
        "list": Later("cached", "list_cached"),
        "rm": Later("cached", "remove"),
        "doctor": Later("doctor", "doctor"),
        "bench": Later("bench", "app"),
    }


app = typer.Typer(
    name="llmctl",
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Quantize, build, serve and bench language models over one engine core.",
    epilog="Start here: [bold]llmctl run demo:smollm2-135m[/bold]",
)


def _version(value: bool) -> None:
    if value:
        print(f"llmctl {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Quantize, build, serve and bench language models over one engine core."""


def _terminate(number: int, _: object) -> None:
    print("terminated", file=sys.stderr)
    sys.exit(128 + number)


def run_command(worker: SpawnedWorker | None = None) -> None:
    """The command of ``sys.argv``. ``worker``: one for ``serve`` that was started before, whose owner ends it."""
    # Without a handler SIGTERM would end the process where it stands and leave half-written folders behind.
    signal.signal(signal.SIGTERM, _terminate)
    app(obj=worker)
