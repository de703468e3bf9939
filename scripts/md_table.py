"""Markdown tables on stdout."""

from __future__ import annotations

from collections.abc import Sequence


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], align: str = "---") -> None:
    """``align``: the rule below every column's head, ``---:`` for figures to the right."""
    print("| " + " | ".join(head) + " |\n|" + f"{align}|" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(flush=True)
