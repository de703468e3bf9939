"""Tests leave nothing in the user's cache, and compile no kernel that is there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from llmctl.checkpoint.user_folders import cache_dir


def test_the_cache_is_this_runs_in_what_tests_start_too(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from llmctl.checkpoint.user_folders import cache_dir\nprint(cache_dir())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    mine = cache_dir()
    assert Path(done.stdout.strip()) == mine
    assert all((mine / shared).is_symlink() for shared in ("kernels", "demo"))
    monkeypatch.delenv("LLMCTL_CACHE")
    assert cache_dir() != mine
    assert not (mine / "engines").is_symlink()
