"""Which model the files in a work folder are made from: written down there, so that no report names another one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmctl.checkpoint.resolve import resolve_model
from peers.contest import PeerError, Setup

MARKER = "made-from.json"


def claim(setup: Setup) -> None:
    """Make ``setup.models`` the folder of ``setup.model``, unless it is that already.

    Raises:
        PeerError: it holds what was made from another model, or from nobody knows which.
        LlmctlError: no such model.
    """
    wanted, found = _identity(setup.model), _written(setup.models / MARKER)
    if found is not None and {**found, "model": setup.model} == wanted:
        return
    mend = f"take another --work or remove {setup.models}"
    if found is not None:
        raise PeerError(f"{setup.models}: expected files made from {_show(wanted)}, found {_show(found)}; {mend}")
    if setup.models.exists() and any(setup.models.iterdir()):
        raise PeerError(f"{setup.models}: expected a {MARKER} that names the model, found none; {mend}")
    setup.models.mkdir(parents=True, exist_ok=True)
    (setup.models / MARKER).write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")


def _identity(model: str) -> dict[str, Any]:
    """Its name, its path, the bytes of its files and when the newest was written; the first does not identify it."""
    path = resolve_model(model).resolve()
    files = [path] if path.is_file() else [file for file in path.iterdir() if file.is_file()]
    stats = [file.stat() for file in files]
    return {
        "model": model,
        "path": str(path),
        "size": sum(stat.st_size for stat in stats),
        "modified": max(int(stat.st_mtime) for stat in stats),
    }


def _written(marker: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(marker.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _show(identity: dict[str, Any]) -> str:
    return "{model} ({path}, {size} bytes, written at {modified})".format_map(identity)
