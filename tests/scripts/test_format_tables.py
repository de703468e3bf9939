"""docs/formats.md has the code's tables."""

from __future__ import annotations

from format_tables import PAGE, with_tables


def test_the_page_has_the_tables_of_the_code() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_tables(page), "write it again: python scripts/format_tables.py"
