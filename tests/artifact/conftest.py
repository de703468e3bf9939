"""Engines of a tiny model, built once a session; a test that damages one copies it first."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_checkpoint import write_dense, write_gptq

from llmctl.artifact.builder import build_engine
from llmctl.config import BuildConfig
from llmctl.targets.cpu.toolchain import find_compiler


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {"dense": write_dense(root / "dense"), "gptq": write_gptq(root / "gptq")}


@pytest.fixture(scope="session")
def built(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cpu engine of the quantized checkpoint, planes as for torch; not to be changed."""
    output = tmp_path_factory.mktemp("engines") / "engine"
    config = BuildConfig(
        model=str(checkpoints["gptq"]), output=str(output), target="cpu", dtype="float32", max_model_len=256
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmctl.targets.cpu.target.find_compiler", lambda: None)
        return build_engine(config)


@pytest.fixture(scope="session")
def native(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine of the quantized checkpoint for the native CPU kernels; not to be changed."""
    if find_compiler() is None:
        pytest.skip("no C++ compiler on this machine")
    output = tmp_path_factory.mktemp("engines") / "native"
    return build_engine(BuildConfig(model=str(checkpoints["gptq"]), output=str(output), target="cpu"))


@pytest.fixture
def engine(built: Path, tmp_path: Path) -> Path:
    """A copy of ``built`` to damage."""
    return Path(shutil.copytree(built, tmp_path / "engine"))


@pytest.fixture
def edit_manifest() -> Callable[..., None]:
    """Change an engine's manifest as if it had been built so (checksum included)."""
    from dataclasses import replace

    from llmctl.artifact.loader import read_manifest
    from llmctl.artifact.manifest import MANIFEST_NAME, manifest_to_bytes

    def edit(engine: Path, **changes: object) -> None:
        (engine / MANIFEST_NAME).write_bytes(manifest_to_bytes(replace(read_manifest(engine), **changes)))

    return edit
