"""Engines for the native CPU kernels: what is stored, what is refused, reproducible bytes."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmctl.artifact.builder import build_engine
from llmctl.artifact.loader import load_engine, read_manifest
from llmctl.artifact.manifest import MANIFEST_NAME, manifest_to_bytes
from llmctl.artifact.request import EngineRequest
from llmctl.artifact.start import open_runtime
from llmctl.config import BuildConfig
from llmctl.errors import CompileError, EngineLoadError, UsageError
from llmctl.targets.base import TargetName
from llmctl.targets.cpu import abi, target
from llmctl.targets.cpu.layout import row_order
from llmctl.targets.cpu.packing import packed_linears
from llmctl.targets.cpu.toolchain import CompiledLibrary

pytestmark = pytest.mark.usefixtures("native")


def test_manifest(native: Path) -> None:
    manifest = read_manifest(native)
    assert len(manifest.target.archs) == 1
    assert manifest.options.dtype == "bfloat16"
    assert manifest.options.lm_head == "int8"
    assert set(manifest.kernel_sources) == {"program.cpp"}
    (path,) = manifest.kernel_files
    assert path == f"kernels/{manifest.target.archs[0]}.so"
    assert {c.op: c.kernel for c in manifest.kernels}["layers.0.qkv_proj"] == "w4a8"
    assert {c.op: c.kernel for c in manifest.kernels}["lm_head"] == "w8a8"


def test_the_same_inputs_give_the_same_bytes(native: Path, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    again = build_engine(BuildConfig(model=str(checkpoints["gptq"]), output=str(tmp_path / "again"), target="cpu"))

    def hashes(folder: Path) -> dict[str, str]:
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    assert hashes(native) == hashes(again)


def test_packed_codes_are_the_checkpoints(native: Path, built: Path) -> None:
    """Unpack a gated w4 weight by the layout's definition and compare with the plain planes."""
    engine, plain = load_engine(native), load_engine(built)
    name = "layers.0.gate_up_proj.weight"
    arrays = {k: np.asarray(v.data).reshape(v.shape) for k, v in engine.weights.items()}
    packed = packed_linears(engine.graph, engine.manifest.options, arrays)[name]
    rows, columns = engine.graph.weights[name].shape
    nibbles = np.asarray(plain.weights[f"{name}.codes"].data).reshape(rows, columns // 2)
    codes = np.stack([nibbles & 15, nibbles >> 4], -1).reshape(rows, columns)
    lines = packed.data.reshape(packed.rows // 32, columns // 4, 16, 4)
    for at, source in enumerate(row_order(rows, gated=True)):
        tile, lane = divmod(at, 32)
        line = lines[tile, :, lane % 16].reshape(-1)
        found = line & 15 if lane < 16 else line >> 4
        assert found.tolist() == codes[source].tolist()
        assert packed.scales is not None
        scales = packed.scales[tile, :, lane].view(np.float16)
        assert scales.tolist() == np.asarray(plain.weights[f"{name}.scales"].data).reshape(rows, -1)[source].tolist()


@pytest.fixture
def engine(native: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(native, tmp_path / "engine"))


def test_a_changed_library_is_refused(engine: Path) -> None:
    library = next((engine / "kernels").iterdir())
    raw = bytearray(library.read_bytes())
    raw[len(raw) // 2] ^= 1
    library.write_bytes(raw)
    with pytest.raises(EngineLoadError, match=r"kernels/.*\.so: expected sha256"):
        load_engine(engine)


def test_an_engine_of_another_version_is_refused(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels would take one activation for another: the manifest says so before anything is loaded, and the
    library itself, should the manifest be silent."""
    loaded = load_engine(engine, EngineRequest(kv_cache_bytes=1 << 20))
    monkeypatch.setitem(abi.ACT, "silu", 2)
    monkeypatch.setitem(abi.ACT, "gelu", 1)
    with pytest.raises(
        EngineLoadError, match=r"kernel_files\.kernels/.*\.so\.abi: expected [0-9a-f]{16}, found"
    ) as error:
        load_engine(engine)
    assert str(error.value.fix).startswith("llmctl build --model MODEL --target cpu:")
    with pytest.raises(
        EngineLoadError, match=r"another version of llmctl: act\.silu: expected 2, found 1 .*llmctl build"
    ):
        open_runtime(loaded)


def test_a_library_that_does_not_load_is_not_published(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = target.compile_library

    def cut(*arguments: Any, **options: Any) -> CompiledLibrary:
        library = compiled(*arguments, **options)
        return replace(library, code=library.code[: len(library.code) // 2])

    monkeypatch.setattr(target, "compile_library", cut)
    with pytest.raises(CompileError, match=r"kernel library .*\.so"):
        build_engine(BuildConfig(model=str(checkpoints["gptq"]), output=str(tmp_path / "e"), target="cpu"))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_library_is_refused(engine: Path) -> None:
    next((engine / "kernels").iterdir()).unlink()
    with pytest.raises(EngineLoadError, match=r"expected a file of \d+ bytes, found no file"):
        load_engine(engine)


def test_another_cpu_is_refused(engine: Path) -> None:
    manifest = replace(read_manifest(engine), target=TargetName("cpu", ("made-up",)))
    (engine / MANIFEST_NAME).write_bytes(manifest_to_bytes(manifest))
    with pytest.raises(
        EngineLoadError, match=r"target: expected a CPU that runs made-up, found one that runs .*--target cpu "
    ):
        load_engine(engine)


def test_lm_head_is_an_option(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    sizes = {}
    for head in ("dense", "int8", "int4"):
        output = tmp_path / head
        build_engine(BuildConfig(model=str(checkpoints["gptq"]), output=str(output), target="cpu", lm_head=head))
        sizes[head] = load_engine(output).weights["lm_head.weight.tiles"].shape[0]
    assert sizes["dense"] == 2 * sizes["int8"] == 4 * sizes["int4"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "float16"}, "--dtype: expected bfloat16 or float32"),
        (
            {"kv_cache_dtype": "float16"},
            "--kv-cache-dtype: expected one of auto, bfloat16, float32, int8 for a cpu target",
        ),
        ({"block_size": 8}, "--block-size: expected a multiple of 16"),
        ({"lm_head": "int3"}, "--lm-head: expected auto, dense, int8, int4"),
    ],
)
def test_options_the_kernels_cannot_honour(
    checkpoints: dict[str, Path], tmp_path: Path, options: dict[str, object], said: str
) -> None:
    config = BuildConfig(model=str(checkpoints["gptq"]), output=str(tmp_path / "e"), target="cpu", **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=said):
        build_engine(config)
    assert not (tmp_path / "e").exists()
