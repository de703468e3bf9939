"""``llmctl doctor``: this machine, as one pastes it into an issue."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import typer

from llmctl.cli.common import JsonOption, guarded, print_json
from llmctl.errors import ExitCode

if TYPE_CHECKING:
    from llmctl.cli.diagnosis import Diagnosis


@guarded
def doctor(json_output: JsonOption = False) -> None:
    """Show what this machine has for llmctl: processor, memory, compilers, GPU, packages, caches.

    Without secrets, and without your home's name: it can be pasted into an issue. Exit code 1 if something is missing.

    Example: [bold]llmctl doctor[/bold]
    """
    from llmctl.cli.diagnosis import diagnose

    found = diagnose()
    if json_output:
        print_json(found.as_dict())
    else:
        _print(found)
    if found.problems:
        raise typer.Exit(int(ExitCode.RUNTIME))


def _print(found: Diagnosis) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 80)
    for section, lines in found.sections.items():
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, text in lines.items():
            table.add_row(f"  {name}", text)
        console.print(section, style="bold", highlight=False, markup=False)
        console.print(table, highlight=False, markup=False)
    if not found.problems:
        console.print("nothing is missing" + (" to serve and bench engines" if found.needs else ""))
    for need in found.needs:
        console.print(f"{need['needs']}: {need['fix']}", soft_wrap=True, highlight=False, markup=False)
    for problem in found.problems:
        fix = f" (fix: {problem['fix']})" if problem["fix"] else ""
        console.print(f"missing: {problem['problem']}{fix}", soft_wrap=True, highlight=False, markup=False)
