"""Markdown: tables, and sections of documents that a command writes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], align: str = "---") -> str:
    """``align``: the rule below every column's head, ``---:`` for figures to the right."""
    return "\n".join([_row(head), "|" + f"{align}|" * len(head), *map(_row, rows)])


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]], align: str = "---") -> None:
    """``markdown_table`` on stdout, each row as it comes."""
    print(markdown_table(head, (), align), flush=True)
    for row in rows:
        print(_row(row), flush=True)
    print(flush=True)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def with_section(name: str, document: str, markers: tuple[str, str], section: str) -> str:
    """The document ``name`` with the section between its markers.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    begin, end = markers
    if document.count(begin) != 1 or document.count(end) != 1 or document.index(begin) > document.index(end):
        raise ValueError(f"{name}: expected '{begin}' and '{end}' once each, in this order")
    return f"{document.partition(begin)[0]}{begin}\n\n{section}\n\n{end}{document.partition(end)[2]}"
