"""Markdown: tables, and sections of documents that a command writes."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], align: str = "---") -> str:
    """``align``: the rule below every column's head, ``---:`` for figures to the right."""
    lines = ["| " + " | ".join(head) + " |", "|" + f"{align}|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], align: str = "---") -> None:
    """``markdown_table`` on stdout."""
    print(markdown_table(head, rows, align) + "\n", flush=True)


def with_section(name: str, document: str, markers: tuple[str, str], section: str) -> str:
    """The document ``name`` with the section between its markers.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    begin, end = markers
    if document.count(begin) != 1 or document.count(end) != 1 or document.index(begin) > document.index(end):
        raise ValueError(f"{name}: expected '{begin}' and '{end}' once each, in this order")
    return f"{document.partition(begin)[0]}{begin}\n\n{section}\n\n{end}{document.partition(end)[2]}"
