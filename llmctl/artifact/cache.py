"""What llmctl keeps on this machine: engines that were built on the way, demo models, compiled kernels, hub models."""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llmctl.artifact.build_lock import build_lock, is_locked
from llmctl.artifact.loader import is_engine, read_manifest
from llmctl.artifact.manifest import MANIFEST_NAME
from llmctl.checkpoint.demo import DEMO_MODELS
from llmctl.checkpoint.folder import writer_lives
from llmctl.checkpoint.resolve import cache_dir
from llmctl.errors import EngineLoadError, LlmctlError, ModelNotFoundError

ENGINE, MODEL, HUB, KERNELS, LEFTOVER = "engine", "demo model", "hub model", "kernels", "leftover"
_ENGINES = "engines"


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
    found = [
        *_engines(root / _ENGINES),
        *_demo_models(root / "demo"),
        *_kernels(root / "kernels"),
        *_leftovers(root, ".*kernels.tmp-*"),
    ]
    return found + (_hub_models() if hub else [])


def cached_engine(name: str) -> Path | None:
    """The folder of a cached engine by its name in the list; None: there is none of that name."""
    folder = cache_dir() / _ENGINES / name
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
        LlmctlError: an engine that is being built now, or what that left. OSError: as the system says.
    """
    if entry.kind == HUB:
        from huggingface_hub import scan_cache_dir

        scanned = scan_cache_dir()
        revisions = [r.commit_hash for repo in scanned.repos if repo.repo_path == entry.path for r in repo.revisions]
        scanned.delete_revisions(*revisions).execute()
    elif entry.path.parent.name == _ENGINES:
        with _not_being_built(entry):
            _remove(entry.path)
    else:
        _remove(entry.path)


def _remove(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):  # somebody else has removed it
        if not path.is_dir() or path.is_symlink():
            path.unlink()
            return
        aside = path.with_name(f".{path.name}.tmp-{os.getpid()}")  # a leftover, should this process be killed here
        os.rename(path, aside)
        shutil.rmtree(aside)


@contextmanager
def _not_being_built(entry: CacheEntry) -> Iterator[None]:
    """Hold the lock of an engine, or of the one that a leftover was to become; it goes with the engine."""
    engine = _engine_of(entry.path)
    try:
        with build_lock(engine, wait=False) as lock:
            yield
            if not engine.exists():
                lock.unlink(missing_ok=True)
    except BlockingIOError:
        raise LlmctlError(f"{entry.name} is being built now", fix="try again when that is done") from None


def _engine_of(path: Path) -> Path:
    """An engine's folder, of its own path or that of a temporary beside it (``.NAME.tmp-PID``, ``.NAME.old-PID``)."""
    found = re.fullmatch(r"\.+(.+?)\.(?:tmp|old)-\d+.*", path.name)
    return path.with_name(found[1]) if found else path


def _is_written_now(path: Path) -> bool:
    """Whether a process fills this temporary. An engine's lock says so for sure; numbers of processes come again."""
    locked = is_locked(_engine_of(path)) if path.parent.name == _ENGINES else None
    return writer_lives(path) if locked is None else locked


def _engines(folder: Path) -> list[CacheEntry]:
    found = []
    for path in _children(folder):
        if not path.name.startswith(".") and (path / MANIFEST_NAME).is_file():
            try:
                manifest = read_manifest(path)
                found += _entry(path, path.name, ENGINE, manifest.source.name, str(manifest.target))
            except EngineLoadError as error:
                found += _entry(path, path.name, ENGINE, problem=error.message)
    return _newest_first(found) + _leftovers(folder, ".*")


def _demo_models(folder: Path) -> list[CacheEntry]:
    names = {model.file: name for name, model in DEMO_MODELS.items()}
    found = [
        entry for p in _children(folder) if p.name in names for entry in _entry(p, names[p.name], MODEL, names[p.name])
    ]
    return _newest_first(found) + _leftovers(folder, ".*fetch-*")


def _kernels(folder: Path) -> list[CacheEntry]:
    """All compiled kernels as one entry: nobody can tell them apart by their names."""
    return _entry(folder, KERNELS, KERNELS) if _children(folder) else []


def _leftovers(folder: Path, pattern: str) -> list[CacheEntry]:
    """Folders that a process which was killed left half written, or half removed."""
    found = []
    for path in folder.glob(pattern):
        if path.is_dir() and not _is_written_now(path):
            found += _entry(path, path.name, LEFTOVER, problem="left half written by a process that ended")
    return _newest_first(found)


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


def _entry(path: Path, name: str, kind: str, model: str = "", target: str = "", problem: str = "") -> list[CacheEntry]:
    """The entry of what lies at ``path``; none if that has vanished by now."""
    try:
        modified = path.stat().st_mtime
    except FileNotFoundError:
        return []
    return [CacheEntry(name, kind, model, target, _size(path), modified, path, problem)]


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _size(path: Path) -> int:
    files = [path] if path.is_file() else (Path(root, name) for root, _, names in os.walk(path) for name in names)
    size = 0
    for file in files:
        with contextlib.suppress(FileNotFoundError):  # renamed or removed meanwhile
            size += file.lstat().st_size
    return size


_newest_first: Callable[[list[CacheEntry]], list[CacheEntry]] = partial(sorted, key=lambda entry: -entry.modified)
