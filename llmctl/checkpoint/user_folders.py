"""Where llmctl keeps things of a user: the folders of the XDG Base Directory Specification (0.8), below ``llmctl``."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """What it can make or fetch again: ``$LLMCTL_CACHE``, else below ``$XDG_CACHE_HOME``, else below ``~/.cache``."""
    named = os.environ.get("LLMCTL_CACHE")
    return Path(named).expanduser() if named else _below("XDG_CACHE_HOME", ".cache")


def state_dir() -> Path:
    """What it remembers from one start to the next: below ``$XDG_STATE_HOME``, else below ``~/.local/state``."""
    return _below("XDG_STATE_HOME", ".local/state")


def _below(variable: str, of_home: str) -> Path:
    """A relative path in the variable is ignored, as the specification says."""
    named = Path(os.environ.get(variable, ""))
    return (named if named.is_absolute() else Path.home() / of_home) / "llmctl"
