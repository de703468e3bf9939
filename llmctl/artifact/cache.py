"""What llmctl keeps on this machine: engines that were built on the way, demo models, compiled kernels, hub models."""

from __future__ import annotations

import difflib
import fcntl
import fnmatch
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llmctl.artifact.loader import is_engine, read_manifest
from llmctl.artifact.manifest import MANIFEST_NAME
from llmctl.checkpoint.demo import DEMO_MODELS
from llmctl.checkpoint.resolve import cache_dir
from llmctl.errors import EngineLoadError, LlmctlError, ModelNotFoundError

ENGINE, MODEL, HUB, KERNELS, LEFTOVER = "engine", "demo model", "hub model", "kernels", "leftover"


@dataclass(frozen=True)
class CacheEntry:
    """One thing in a cache.

    Attributes:
        name: what ``rm`` and ``show`` call it. kind: one of those above. model: what was or can be named as MODEL.
        target: of an engine. size: bytes on disk. modified: when it was made, seconds since the epoch.
        path: where it lies. problem: why it cannot be used; "".
    """

    name: str
    kind: str
    model: str
    target: str
    size: int
    modified: float
    path: Path
    problem: str = ""

    def as_dict(self) -> dict[str, Any]:
        """As JSON data; times as ISO 8601 in UTC."""
        made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.modified))
        return {
            "name": self.name, "kind": self.kind, "model": self.model, "target": self.target or None,
            "bytes": self.size, "modified": made, "path": str(self.path), "problem": self.problem or None,
        }  # fmt: skip


def cache_entries(*, hub: bool = True) -> list[CacheEntry]:
    """Everything in the cache folder, the newest first within its kind; ``hub``: and in huggingface_hub's."""
    root = cache_dir()
    found = [*_engines(root / "engines"), *_demo_models(root / "demo"), *_kernels(root / "kernels")]
    return found + (_hub_models() if hub else [])


def cached_engine(name: str) -> Path | None:
    """The folder of a cached engine by its name in the list; None: there is none of that name."""
    folder = cache_dir() / "engines" / name
    return folder if Path(name).name == name and is_engine(folder) else None


def find_entries(names: Iterable[str]) -> list[CacheEntry]:
    """The entries of these names, or that these patterns (``demo-*``) match; each once.

    Raises:
        ModelNotFoundError: a name that nothing has.
    """
    entries = cache_entries()
    found: dict[Path, CacheEntry] = {}
    for name in names:
        matching = [entry for entry in entries if fnmatch.fnmatchcase(entry.name, name)]
        if not matching:
            close = difflib.get_close_matches(name, [entry.name for entry in entries], n=1, cutoff=0.4)
            raise ModelNotFoundError(
                f"nothing in the cache is called '{name}'",
                fix=f"did you mean {close[0]}?" if close else "llmctl list shows the names",
            )
        found |= {entry.path: entry for entry in matching}
    return list(found.values())


def remove_entry(entry: CacheEntry) -> None:
    """Take an entry away: out of sight in one step, then off the disk.

    Raises:
        LlmctlError: an engine that is being built now. OSError: as the system says.
    """
    if entry.kind == HUB:
        from huggingface_hub import scan_cache_dir

        scanned = scan_cache_dir()
        revisions = [r.commit_hash for repo in scanned.repos if repo.repo_path == entry.path for r in repo.revisions]
        scanned.delete_revisions(*revisions).execute()
    elif entry.kind == ENGINE:
        with _not_being_built(entry):
            _remove(entry.path)
    else:
        _remove(entry.path)


def _remove(path: Path) -> None:
    if not path.is_dir() or path.is_symlink():
        path.unlink()
        return
    aside = path.with_name(f".{path.name}.tmp-{os.getpid()}")  # what is left of it, a later build clears away
    os.rename(path, aside)
    shutil.rmtree(aside)


@contextmanager
def _not_being_built(entry: CacheEntry) -> Iterator[None]:
    with entry.path.with_name(f"{entry.path.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LlmctlError(f"{entry.name} is being built now", fix="try again when that is done") from None
        yield


def _engines(folder: Path) -> list[CacheEntry]:
    found = []
    for path in _children(folder):
        if not path.is_dir():
            continue
        if path.name.startswith("."):
            found.append(_entry(path, path.name, LEFTOVER, problem="half written, by a build that ended or runs now"))
        elif (path / MANIFEST_NAME).is_file():
            try:
                manifest = read_manifest(path)
                found.append(_entry(path, path.name, ENGINE, manifest.source.name, str(manifest.target)))
            except EngineLoadError as error:
                found.append(_entry(path, path.name, ENGINE, problem=error.message))
    return _newest_first(found)


def _demo_models(folder: Path) -> list[CacheEntry]:
    names = {model.file: name for name, model in DEMO_MODELS.items()}
    found = []
    for path in _children(folder):
        if path.name in names:
            found.append(_entry(path, names[path.name], MODEL, names[path.name]))
        elif path.name.startswith("."):
            found.append(_entry(path, path.name, LEFTOVER, problem="half fetched, by a process that ended or runs now"))
    return _newest_first(found)


def _kernels(folder: Path) -> list[CacheEntry]:
    """All compiled kernels as one entry: nobody can tell them apart by their names."""
    return [_entry(folder, KERNELS, KERNELS)] if _children(folder) else []


def _hub_models() -> list[CacheEntry]:
    """The models in huggingface_hub's own cache, which other programs use too."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        scanned = scan_cache_dir()
    except (CacheNotFound, OSError):
        return []
    return _newest_first([
        CacheEntry(r.repo_id, HUB, r.repo_id, "", r.size_on_disk, r.last_modified, Path(r.repo_path))
        for r in scanned.repos
        if r.repo_type == "model"
    ])  # fmt: skip


def _entry(path: Path, name: str, kind: str, model: str = "", target: str = "", problem: str = "") -> CacheEntry:
    return CacheEntry(name, kind, model, target, _size(path), path.stat().st_mtime, path, problem)


def _children(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _size(path: Path) -> int:
    files = [path] if path.is_file() else (Path(root, name) for root, _, names in os.walk(path) for name in names)
    return sum(file.lstat().st_size for file in files)


_newest_first: Callable[[list[CacheEntry]], list[CacheEntry]] = partial(sorted, key=lambda entry: -entry.modified)
