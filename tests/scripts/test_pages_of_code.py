"""docs/api.md and docs/cli.md are what the code says."""

from __future__ import annotations

from typing import Any

import api_page
import cli_page
import pytest


@pytest.mark.parametrize("module", [api_page, cli_page], ids=["api", "cli"])
def test_the_page_is_what_the_code_says(module: Any) -> None:
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), "write it again: make docs"


def test_a_default_of_zero_is_said() -> None:
    (row,) = [line for line in cli_page.page().split("## llmctl bench serve")[1].splitlines() if "`--seed " in line][:1]
    assert row.split("|")[2].strip() == "`0`"
