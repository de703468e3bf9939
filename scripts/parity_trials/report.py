"""What is said of the trials: lines for a terminal, tables for the documentation."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from md_table import markdown_table

from parity_trials.trials import Trial, said

_WIDTH = 80


def to_text(trials: Sequence[Trial]) -> str:
    """A line for each, at most 80 columns wide."""
    lines = []
    for trial in trials:
        made, read = _ends(trial)
        lines += textwrap.wrap(
            f"{'ok ' if trial.equal else 'ERR'} {made} -> {read}, {trial.kind}: {said(trial)}",
            _WIDTH, subsequent_indent="    ",
        )  # fmt: skip
    return "\n".join(lines)


def to_markdown(versions: Mapping[str, Mapping[str, str]], trials: Sequence[Trial]) -> str:
    """Versions, and a table of who made what and who read it how."""
    head = ("made by", "read by", "checkpoint", "weights")
    rows = [(*_ends(trial), trial.kind, said(trial).replace("|", "\\|")) for trial in trials]
    found = "; ".join(
        f"{name}: {', '.join(f'{package} {version}' for package, version in packages.items()) or 'not installed'}"
        for name, packages in versions.items()
    )
    return f"Versions: {found}.\n\n{markdown_table(head, rows)}"


def _ends(trial: Trial) -> tuple[str, str]:
    return ("llmctl", trial.tool) if trial.maker == "llmctl" else (trial.tool, "llmctl")
