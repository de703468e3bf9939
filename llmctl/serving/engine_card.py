"""The manifest's part of ``GET /engine``."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from llmctl.errors import EngineLoadError, ModelNotFoundError


class EngineCard:
    """What an engine's manifest says of it. Read once, in a thread: it is large, and does not change."""

    def __init__(self) -> None:
        self._reading: asyncio.Task[dict[str, Any]] | None = None

    async def read(self, path: Path) -> dict[str, Any]:
        """What the engine at ``path`` is.

        Raises:
            EngineLoadError: its folder is no longer there, or was changed.
        """
        if self._reading is None:
            self._reading = asyncio.create_task(asyncio.to_thread(_described, path))
        reading = self._reading
        try:
            return await asyncio.shield(reading)
        except BaseException:
            if reading.done() and self._reading is reading:  # failed: the next one tries again
                self._reading = None
            raise


def _described(path: Path) -> dict[str, Any]:
    from llmctl.artifact.describe import describe_manifest
    from llmctl.artifact.loader import read_manifest

    try:
        document = describe_manifest(read_manifest(path))
    except ModelNotFoundError as error:  # 404 is the answer to a client's name
        raise EngineLoadError(error.message) from error
    document["ops"] = [{name: op[name] for name in ("layer", "name", "kind", "kernel")} for op in document["ops"]]
    return document
