"""The user's folders are where the XDG specification says, for all that is kept there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from llmctl.checkpoint.user_folders import cache_dir, state_dir


@pytest.mark.parametrize(
    ("folder", "variable", "of_home"),
    [(cache_dir, "XDG_CACHE_HOME", ".cache"), (state_dir, "XDG_STATE_HOME", ".local/state")],
)
def test_only_an_absolute_path_counts(
    folder: Callable[[], Path], variable: str, of_home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("LLMCTL_CACHE", raising=False)
    monkeypatch.setenv(variable, "/elsewhere")
    assert folder() == Path("/elsewhere/llmctl")
    for ignored in ("rel", ""):
        monkeypatch.setenv(variable, ignored)
        assert folder() == tmp_path / of_home / "llmctl"
