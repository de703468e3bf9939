"""NVRTC without a GPU: every kernel compiles for every architecture, errors point at our source, the cache is sound."""

from __future__ import annotations

import importlib.machinery
import importlib.util
from pathlib import Path

import pytest

from llmctl.errors import CompileError, UsageError
from llmctl.extras import install_command
from llmctl.targets.cuda import compile as kernel_compile
from llmctl.targets.cuda import nvrtc
from llmctl.targets.cuda.compile import (
    ARCHITECTURES,
    PTX_FALLBACK,
    SOURCE_DIR,
    compile_module,
    compile_modules,
    parse_resources,
    source_files,
    source_hash,
)
from llmctl.targets.kernel_cache import write_entry

SOURCES = tuple(sorted(path.name for path in SOURCE_DIR.glob("*.cu")))
SMALL = "norm.cu"


def has_nvrtc() -> bool:
    try:
        nvrtc.load_nvrtc()
    except CompileError:
        return False
    return True


needs_nvrtc = pytest.mark.skipif(not has_nvrtc(), reason="NVRTC, of the extra cuda, is not installed")


@needs_nvrtc
@pytest.mark.parametrize(
    ("arch", "source"),
    [
        pytest.param(arch, source, marks=() if (arch, source) == ("sm_90", SMALL) else pytest.mark.slow)
        for arch in ARCHITECTURES
        for source in SOURCES
    ],
)
def test_every_kernel_compiles_without_spills(arch: str, source: str) -> None:
    if arch not in nvrtc.load_nvrtc().supported_archs():
        pytest.skip(f"NVRTC {nvrtc.load_nvrtc().version} does not know {arch}")
    module = compile_module(source, arch)
    assert module.code[:4] == b"\x7fELF"
    assert module.filename == f"{arch}/{source.removesuffix('.cu')}.cubin"
    assert module.resources
    for kernel in module.resources:
        assert 0 < kernel.registers <= 255, kernel
        assert kernel.stack_bytes == kernel.spill_store_bytes == kernel.spill_load_bytes == 0, kernel


@needs_nvrtc
def test_ptx_is_the_fallback() -> None:
    module = compile_module(SMALL, PTX_FALLBACK)
    assert module.filename == "compute_80/norm.ptx"
    assert b".target sm_80" in module.code
    assert b".visible .entry rms_norm_bf16" in module.code


@needs_nvrtc
def test_same_source_same_bytes() -> None:
    assert compile_module(SMALL, "sm_80") == compile_module(SMALL, "sm_80")


@needs_nvrtc
def test_many_modules_come_in_order(tmp_path: Path) -> None:
    write_sources(tmp_path)
    (tmp_path / "a.cu").write_text('extern "C" __global__ void a(float* p) { p[0] = 1.0f; }')
    modules = compile_modules(["k.cu", "a.cu"], ["sm_90", PTX_FALLBACK], source_dir=tmp_path)
    assert [m.filename for m in modules] == ["sm_90/k.cubin", "compute_80/k.ptx", "sm_90/a.cubin", "compute_80/a.ptx"]
    assert modules[2] == compile_module("a.cu", "sm_90", source_dir=tmp_path)
    assert compile_modules([], ["sm_90"]) == []


def write_sources(folder: Path, header: str = "", body: str = "") -> Path:
    (folder / "h.cuh").write_text(f"#pragma once\n{header}\n")
    (folder / "k.cu").write_text(
        f'#include "h.cuh"\nextern "C" __global__ void k(float* p) {{\n    p[0] = 1.0f;\n{body}\n}}\n'
    )
    return folder


@needs_nvrtc
@pytest.mark.parametrize(
    ("header", "body", "where"),
    [("", "    p[1] = missing;", "k.cu:4: identifier"), ("int f( { }", "", "h.cuh:2: ")],
)
def test_errors_name_file_and_line(tmp_path: Path, header: str, body: str, where: str) -> None:
    write_sources(tmp_path, header, body)
    with pytest.raises(CompileError) as error:
        compile_module("k.cu", "sm_80", source_dir=tmp_path)
    assert f"{tmp_path}/{where}" in str(error.value)
    assert "\n" not in str(error.value)


@needs_nvrtc
def test_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources, cache = write_sources(tmp_path), tmp_path / "cache"
    compiled = []
    real = nvrtc.Nvrtc.compile

    def counting(self: nvrtc.Nvrtc, *arguments: object) -> nvrtc.NvrtcResult:
        compiled.append(arguments)
        return real(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(nvrtc.Nvrtc, "compile", counting)

    def build(arch: str = "sm_80") -> kernel_compile.CompiledModule:
        return compile_module("k.cu", arch, cache=cache, source_dir=sources)

    first = build()
    assert build() == first
    assert len(compiled) == 1
    (entry,) = cache.iterdir()

    whole = entry.read_bytes()
    for damaged in (b"", b"{}\n", whole[:-1], whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]):
        entry.write_bytes(damaged)
        assert build() == first
        assert entry.read_bytes() == whole
    assert len(compiled) == 5
    # Whole, but not of this version's fields.
    write_entry(cache, entry.name, {"source": "k.cu"}, b"code")
    assert build() == first
    assert len(compiled) == 6

    build("sm_90")
    assert len(compiled) == 7
    write_sources(tmp_path, header="// another header")
    build()
    assert len(compiled) == 8
    monkeypatch.setattr(kernel_compile, "FLAGS", ("--std=c++17", "--use_fast_math"))
    build()
    assert len(compiled) == 9
    assert len(list(cache.iterdir())) == 4


@needs_nvrtc
def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    sources = write_sources(tmp_path)
    (tmp_path / "cache").write_text("a file")
    assert compile_module("k.cu", "sm_80", cache=tmp_path / "cache", source_dir=sources).code


def test_unknown_architecture() -> None:
    with pytest.raises(UsageError, match="expected one of sm_80"):
        compile_module(SMALL, "sm_61")


def test_missing_source(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=r"nothing\.cu: No such file"):
        source_hash("nothing.cu", tmp_path)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "_wheel_libraries", list)
    monkeypatch.setattr(nvrtc.ctypes.util, "find_library", lambda _name: None)
    nvrtc.load_nvrtc.cache_clear()
    try:
        with pytest.raises(CompileError, match="NVRTC is not installed") as caught:
            compile_module(SMALL, "sm_80")
        assert caught.value.fix == install_command("cuda")
    finally:
        nvrtc.load_nvrtc.cache_clear()


def test_no_nvidia_wheels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    assert nvrtc._wheel_libraries() == []


def test_the_first_on_the_path_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``make test-kernels NVRTC=…`` puts another compiler in front of the installed one."""
    names = (
        "one/nvidia/cu13/lib/libnvrtc.so.13",
        "two/nvidia/cu14/lib/libnvrtc.so.14",
        "two/nvidia/x/lib/libnvrtc.so.9",
    )
    for name in (*names, "one/nvidia/cu13/lib/libnvrtc.so.13.0.48"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    spec = importlib.machinery.ModuleSpec("nvidia", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path / root / "nvidia") for root in ("one", "two")]
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: spec)
    assert nvrtc._wheel_libraries() == [str(tmp_path / name) for name in names]


def test_hash_covers_included_headers(tmp_path: Path) -> None:
    write_sources(tmp_path)
    before = source_hash("k.cu", tmp_path)
    assert set(source_files(["k.cu"], tmp_path)) == {"k.cu", "h.cuh"}
    write_sources(tmp_path, header="// changed")
    assert source_hash("k.cu", tmp_path) != before


def test_every_source_is_hermetic() -> None:
    """A kernel includes only files of its own folder: NVRTC needs no toolkit headers."""
    for source in SOURCES:
        assert set(source_files([source])) <= {path.name for path in SOURCE_DIR.iterdir()}


def test_resources_of_a_ptxas_log() -> None:
    log = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'b' for 'sm_90'
ptxas info    : Function properties for b
ptxas         .     160 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 160 bytes cumulative stack size, 256 bytes smem
ptxas info    : Compile time = 25.285 ms
ptxas info    : Compiling entry function 'a' for 'sm_90'
ptxas info    : Function properties for a
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 7 registers, used 0 barriers
"""
    a, b = parse_resources(log)
    assert (a.name, a.registers, a.shared_bytes, a.stack_bytes) == ("a", 7, 0, 0)
    assert (b.name, b.registers, b.shared_bytes, b.stack_bytes) == ("b", 32, 256, 160)
    assert (b.spill_store_bytes, b.spill_load_bytes) == (12, 8)
    assert parse_resources("") == ()
