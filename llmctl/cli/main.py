"""The ``llmctl`` command. Importing this module imports neither torch, transformers nor cupy."""

from __future__ import annotations

import signal
import sys
from typing import Annotated

import typer

from llmctl import __version__
from llmctl.cli import bench
from llmctl.cli.build import build
from llmctl.cli.cached import list_cached, remove
from llmctl.cli.common import OneLineErrors, WholeNames
from llmctl.cli.convert import convert
from llmctl.cli.doctor import doctor
from llmctl.cli.eval import evaluate
from llmctl.cli.inspect import inspect
from llmctl.cli.merge import merge
from llmctl.cli.quantize import quantize
from llmctl.cli.quantize_compare import compare
from llmctl.cli.run import run
from llmctl.cli.serve import serve

app = typer.Typer(
    name="llmctl",
    cls=OneLineErrors,
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


app.command("run", cls=WholeNames)(run)
app.command("chat", cls=WholeNames, hidden=True)(run)
app.command("build", cls=WholeNames)(build)
app.command("inspect", cls=WholeNames)(inspect)
app.command("show", cls=WholeNames, hidden=True)(inspect)
app.add_typer(bench.app, name="bench")
app.command(
    "serve",
    cls=WholeNames,
    context_settings={"allow_extra_args": True},
    options_metavar="[MODEL] [OPTIONS]",
)(serve)
app.command("quantize", cls=WholeNames)(quantize)
app.command("quantize compare", cls=WholeNames)(compare)
app.command("convert", cls=WholeNames)(convert)
app.command("merge", cls=WholeNames)(merge)
app.command("eval", cls=WholeNames)(evaluate)
app.command("list", cls=WholeNames)(list_cached)
app.command("rm", cls=WholeNames)(remove)
app.command("doctor", cls=WholeNames)(doctor)


def _terminate(number: int, _: object) -> None:
    print("terminated", file=sys.stderr)
    sys.exit(128 + number)


def main() -> None:
    """Entry point of the console script."""
    # Without a handler SIGTERM would end the process where it stands and leave half-written folders behind.
    signal.signal(signal.SIGTERM, _terminate)
    app()


if __name__ == "__main__":
    main()
