"""From what a user calls a model to a path: a local folder, a .gguf file, a demo model, or a hub id."""

from __future__ import annotations

import re
from pathlib import Path

from llmctl.checkpoint import hf_folder
from llmctl.checkpoint.demo import DEMO_PREFIX, demo_model
from llmctl.checkpoint.user_folders import cache_dir
from llmctl.errors import CheckpointError, ModelNotFoundError

__all__ = ["cache_dir", "resolve_model"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_CACHE_ROOT = "models--"
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
_KINDS = "a checkpoint folder, a .gguf file, demo:smollm2-135m, or a hub id such as org/name"

# By class name: the classes moved between modules of huggingface_hub's versions.
_HUB_REASONS = {
    "OfflineModeIsEnabled": "offline mode is on (HF_HUB_OFFLINE) and it is not in the hub cache",
    "LocalEntryNotFoundError": "the hub cannot be reached and it is not in the hub cache",
    "GatedRepoError": "access to it is gated",
    "RepositoryNotFoundError": "no such repository, or it is private",
    "RevisionNotFoundError": "no such revision",
    "HFValidationError": "not a valid repository id",
}


def resolve_model(name: str, *, allow_download: bool = True) -> Path:
    """The local path of a model.

    Args:
        name: a Hugging Face folder (or a hub cache's ``models--org--name``), a .gguf file, ``demo:smollm2-135m``, or a
            hub id. Anything that exists locally, or that starts with ``.``, ``/`` or ``~``, or ends in ``.gguf``, is
            never looked up on the hub.
        allow_download: False looks into the local caches only.

    Raises:
        ModelNotFoundError: nothing there; one line that says what was tried and what to do.
        CheckpointError: a folder or hub repository without safetensors (pickle weights are refused).
    """
    if not name.strip():
        raise ModelNotFoundError("no model named", fix=f"name {_KINDS}", param="model")
    if name.startswith(DEMO_PREFIX):
        return demo_model(name, allow_download=allow_download)
    if not is_fetched(name):
        return _local(name, Path(name).expanduser())
    if not _HUB_ID.fullmatch(name):
        raise ModelNotFoundError(f"'{name}' is neither a local path nor a hub id", fix=f"name {_KINDS}", param="model")
    return _from_hub(name, allow_download)


def is_fetched(name: str) -> bool:
    """Whether a name stands for a demo model or a hub id, which come from elsewhere unless they are in a cache."""
    path = Path(name).expanduser()
    local = name.startswith((".", "/", "~")) or path.suffix == ".gguf" or path.exists()
    return name.startswith(DEMO_PREFIX) or not local


def local_name(path: Path) -> str:
    """What a local path is called: its last part, or of a hub cache's snapshot the repository it was fetched from."""
    root = next((part for part in path.resolve().parts if part.startswith(_CACHE_ROOT)), None)
    return path.resolve().name if root is None else root.removeprefix(_CACHE_ROOT).replace("--", "/")


def source_name(model: str, path: Path) -> str:
    """What a model that ``model`` names is called: a hub or demo id as given, a local path as ``local_name``."""
    return local_name(path) if Path(model).expanduser().exists() else model


def _snapshot(folder: Path) -> Path:
    """The snapshot that a hub cache's root stands for: that of ``refs/main``, or the only one; else the folder itself.

    Raises:
        ModelNotFoundError: no such snapshot, or several and nothing says which.
    """
    if not (folder / "snapshots").is_dir() or (folder / "config.json").exists():
        return folder
    found = sorted(path.name for path in (folder / "snapshots").iterdir() if path.is_dir())
    main = folder / "refs" / "main"
    wanted = main.read_text(encoding="ascii", errors="replace").strip() if main.is_file() else None
    if wanted is None and len(found) == 1:
        return folder / "snapshots" / found[0]
    if wanted in found:
        return folder / "snapshots" / str(wanted)
    missing = "no refs/main" if wanted is None else f"no snapshot {wanted[:40]!r}, which refs/main names"
    raise ModelNotFoundError(
        f"{folder}: a hub cache with {missing}; snapshots: {', '.join(found) or 'none'}",
        fix=f"name {folder}/snapshots/REVISION, or fetch it again",
        param="model",
    )


def _local(name: str, path: Path) -> Path:
    if path.is_dir():
        path = _snapshot(path)
        if (path / "engine.json").is_file():
            raise ModelNotFoundError(
                f"{name} is an engine folder; a checkpoint is needed here", fix="name the model it was built from"
            )
        hf_folder.read_config(path)
        hf_folder.shard_paths(path)
        return path
    if not path.is_file():
        raise ModelNotFoundError(f"no such file or folder: {name}", fix=f"name {_KINDS}", param="model")
    if path.suffix != ".gguf":
        raise ModelNotFoundError(f"{name}: a file that is not .gguf", fix=f"name {_KINDS}", param="model")
    return path


def _from_hub(name: str, allow_download: bool) -> Path:
    try:
        from huggingface_hub import snapshot_download

        folder = snapshot_download(name, allow_patterns=_HUB_FILES, local_files_only=not allow_download)
    except ImportError as error:
        raise ModelNotFoundError(f"no local '{name}', and huggingface_hub cannot be imported: {error}") from error
    except Exception as error:  # huggingface_hub's errors share no base class with its HTTP library's
        raise ModelNotFoundError(
            f"no local file or folder '{name}', and the hub did not give it: {_reason(error)}",
            fix=f"check the name, log in with hf auth login if it is gated, or without a network name {_KINDS}",
            param="model",
        ) from error
    return _checked_snapshot(name, Path(folder))


def _checked_snapshot(name: str, folder: Path) -> Path:
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"hub model '{name}' has no safetensors files (pickle weights can run code when read and are refused)",
            fix="use a repository or revision that has safetensors",
        )
    hf_folder.read_config(folder)
    hf_folder.shard_paths(folder)
    return folder


def _reason(error: Exception) -> str:
    """Why the hub gave nothing, on one line."""
    for kind in type(error).__mro__:
        if kind.__name__ in _HUB_REASONS:
            return _HUB_REASONS[kind.__name__]
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"
