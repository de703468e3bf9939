"""What an engine was made from, by its manifest's word alone: for who needs a name at once, and no loader."""

from __future__ import annotations

from pathlib import Path

import msgspec

MANIFEST_NAME = "engine.json"


class _Source(msgspec.Struct):
    name: str


class _Manifest(msgspec.Struct):
    source: _Source


_decode = msgspec.json.Decoder(_Manifest).decode


def source_name(engine: Path) -> str | None:
    """The source's name; the manifest is checked where the engine is opened. None: it does not say it."""
    try:
        return _decode((engine / MANIFEST_NAME).read_bytes()).source.name
    except (OSError, ValueError, RecursionError):
        return None
