"""docs/families.md has the code's table."""

from __future__ import annotations

from pathlib import Path

import pytest
from family_table import PAGE, with_table

from llmctl.graph.family_table import FAMILIES


def test_the_page_has_the_table_of_the_code() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_table(page), "write it again: python scripts/family_table.py"


def test_every_family_says_which_models_are_of_it() -> None:
    assert all(family.models for family in FAMILIES.values())


@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md", "docs/guide.md"])
def test_documents_that_count_the_families_count_right(name: str) -> None:
    text = (Path(__file__).parents[2] / name).read_text(encoding="utf-8")
    assert f" {len(FAMILIES)} families of models" in text
