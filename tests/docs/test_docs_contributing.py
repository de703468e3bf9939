"""What CONTRIBUTING.md asks for is what CI does."""

from __future__ import annotations

import yaml
from docs.documents import ROOT


def test_commits_are_linted_as_ci_lints() -> None:
    """The hooks run what ``make lint`` runs."""
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    makefile = (ROOT / "Makefile").read_text()
    linted = makefile.split("\nlint:")[1].split("\n\n")[0]
    commands = [line.strip().replace("$(BIN)/", "") for line in linted.splitlines()[1:]]
    assert [hook["entry"].removeprefix(".venv/bin/") for hook in hooks] == commands
