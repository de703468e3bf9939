"""Native sources: a file together with everything it includes, and a digest of what a compiler is given."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from llmctl.errors import CompileError

_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


def included_files(names: Iterable[str], folders: Sequence[Path], *, absent: Collection[str] = ()) -> dict[str, str]:
    """Text of the named files and of every file they include, by name, sorted.

    Args:
        folders: where a name is looked for, in this order.
        absent: included names that a build never reaches.

    Raises:
        CompileError: a file that is in none of the folders, or cannot be read.
    """
    texts: dict[str, str] = {}
    pending = list(names)
    while pending:
        name = pending.pop()
        if name in texts:
            continue
        path = next((folder / name for folder in folders if (folder / name).exists()), folders[0] / name)
        try:
            texts[name] = path.read_text(encoding="utf-8")
        except OSError as error:
            raise CompileError(f"kernel source {path}: {error.strerror or error}") from error
        pending += [found for found in _INCLUDE.findall(texts[name]) if found not in absent]
    return dict(sorted(texts.items()))


def digest(parts: Mapping[str, str]) -> str:
    """sha256 of named texts, in hex, whatever their order."""
    total = hashlib.sha256()
    for name, text in sorted(parts.items()):
        for piece in (name.encode(), text.encode()):
            total.update(len(piece).to_bytes(8, "little") + piece)
    return total.hexdigest()
