"""``llmctl list`` and ``llmctl rm``: what is cached on this machine."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from llmctl.cli.common import JsonOption, guarded, print_json
from llmctl.errors import UsageError

if TYPE_CHECKING:
    from llmctl.artifact.cache import CacheEntry

_COLUMNS, _OTHERS = 80, 18
"""Characters of a line, and of those what size and age take, with what is between the columns."""

Names = Annotated[
    list[str], typer.Argument(metavar="NAME", help="As llmctl list shows it, or a pattern such as 'demo-*'.")
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


@guarded
def list_cached(json_output: JsonOption = False) -> None:
    """List what is cached: models that were fetched, engines that were built on the way, compiled kernels.

    Engines that llmctl build wrote are where --output said, and not listed.

    Example: [bold]llmctl list[/bold]
    """
    from llmctl.artifact.cache import cache_entries
    from llmctl.checkpoint.resolve import cache_dir

    entries = cache_entries()
    if json_output:
        print_json({"cache": str(cache_dir()), "entries": [entry.as_dict() for entry in entries]})
    elif entries:
        _print_table(entries)
    else:
        print(f"nothing is cached in {cache_dir()}")


@guarded
def remove(names: Names, yes: Yes = False, json_output: JsonOption = False) -> None:
    """Remove cached models, engines or kernels; what is removed is fetched or built again when it is named.

    A server that runs an engine keeps running it, but cannot be started again from it.

    Example: [bold]llmctl rm demo:smollm2-135m[/bold]
    """
    from llmctl.artifact.cache import find_entries, remove_entry
    from llmctl.artifact.memory import human_bytes

    entries = find_entries(names)
    total = human_bytes(sum(entry.size for entry in entries))
    if not yes:
        for entry in entries:
            print(f"{entry.name} ({entry.kind}, {human_bytes(entry.size)})", file=sys.stderr)
        if not sys.stdin.isatty():
            raise UsageError(f"rm: nobody to ask about {total}", fix=f"llmctl rm {' '.join(names)} --yes")
        print(f"remove {total}? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            print("nothing is removed", file=sys.stderr)
            raise typer.Exit(1)
    for entry in entries:
        remove_entry(entry)
    if json_output:
        print_json({"removed": [entry.as_dict() for entry in entries]})
    else:
        print(f"removed {total}")


def _print_table(entries: list[CacheEntry]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from llmctl.artifact.cache import ENGINE, HUB, KERNELS, LEFTOVER, MODEL
    from llmctl.artifact.memory import human_bytes
    from llmctl.checkpoint.resolve import cache_dir

    headings = {
        ENGINE: "engines", MODEL: "demo models", HUB: "hub models", KERNELS: "compiled kernels", LEFTOVER: "leftovers",
    }  # fmt: skip
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    targets = [entry.target.replace(",", ", ") for entry in entries]  # to be divided there, and nowhere else
    part = max(len(part) for target in targets for part in target.split(" "))
    longest = max(len(entry.name) for entry in entries)  # in one piece where there is room: names are copied
    table.add_column("name", overflow="fold", no_wrap=longest + part + _OTHERS <= _COLUMNS)
    table.add_column("target", min_width=part)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("age", justify="right", no_wrap=True)
    now = time.time()
    for kind, heading in headings.items():
        of_kind = [row for row in zip(entries, targets, strict=True) if row[0].kind == kind]
        if of_kind:
            table.add_row(f"[bold]{heading}[/bold]")
        for entry, target in of_kind:
            table.add_row(escape(entry.name), target, human_bytes(entry.size), age(now - entry.modified))
    console = Console(width=None if sys.stdout.isatty() else _COLUMNS)
    console.print(table, highlight=False)
    for entry in entries:
        if entry.problem:
            console.print(f"{entry.name}: {entry.problem}", highlight=False, markup=False)
    console.print(f"{human_bytes(sum(entry.size for entry in entries))} in all; cache: {cache_dir()}", highlight=False)


def age(seconds: float) -> str:
    """``3 min``, ``5 h``, ``12 d``."""
    for unit, length, most in (("s", 1, 60), ("min", 60, 3600), ("h", 3600, 48 * 3600)):
        if seconds < most:
            return f"{max(0, seconds) / length:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"
