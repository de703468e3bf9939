"""What scripts that try many things, each in an environment of its own, are told: which of them, and where."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def chosen(names: str | None, known: Mapping[str, T]) -> list[T]:
    """Those that ``--only`` names, comma-separated, each once; all of ``known`` without it.

    Raises:
        ValueError: a name that is not known.
    """
    if names is None:
        return list(known.values())
    for name in (wanted := names.split(",")):
        if name not in known:
            raise ValueError(f"--only: unknown '{name}': expected some of {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(wanted)]


@contextmanager
def work_folder(kept: Path | None, prefix: str) -> Iterator[Path]:
    """``--keep``, made where it is not there; without it a temporary folder that is removed at the end."""
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept.resolve()
        return
    with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as folder:
        yield Path(folder)
