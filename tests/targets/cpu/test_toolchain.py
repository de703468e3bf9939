"""Which compiler makes the CPU kernels, and what their cache tells apart."""

from __future__ import annotations

import ctypes
import platform
import re
import sys
from pathlib import Path

import pytest

from llmctl.errors import CompileError
from llmctl.targets.cpu.toolchain import (
    EMULATED_AMX,
    EMULATED_BF16,
    FLAGS,
    VARIANTS,
    amx_to_test,
    compile_library,
    find_compiler,
    supported_variants,
    variants_to_test,
)

PORTABLE = VARIANTS[-1]
# Answers --version; otherwise appends to a log of calls and writes the file after -o.
COMPILER = """#!/bin/sh
[ "$1" = --version ] && echo "c++ 1.0" && exit
echo call >> {log}
for a; do [ "$before" = -o ] && echo library > "$a"; before=$a; done
"""
ZIG = """import sys
assert sys.argv[1] == "c++"
if "--version" in sys.argv:
    print("zig 1.0")
else:
    open(sys.argv[sys.argv.index("-o") + 1], "w").write("from zig")
"""


@pytest.fixture
def empty_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The returned folder, empty, is PATH."""
    path = tmp_path / "path"
    path.mkdir()
    monkeypatch.setenv("PATH", str(path))
    monkeypatch.delenv("CXX", raising=False)
    return path


def install(path: Path, name: str, log: Path) -> None:
    (path / name).write_text(COMPILER.format(log=log))
    (path / name).chmod(0o755)


def test_compilers_on_the_path_go_before_the_wheel(
    empty_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda _: None)
        with pytest.raises(CompileError, match="no C\\+\\+ compiler"):
            compile_library(PORTABLE)
    (tmp_path / "site" / "ziglang").mkdir(parents=True)
    (tmp_path / "site" / "ziglang" / "__init__.py").touch()
    (tmp_path / "site" / "ziglang" / "__main__.py").write_text(ZIG)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    assert find_compiler() == (sys.executable, "-m", "ziglang", "c++")
    made = compile_library(PORTABLE)
    assert (made.code, made.compiler) == (b"from zig", "zig 1.0")
    for name in ("clang++", "g++", "c++"):
        install(empty_path, name, tmp_path / "log")
        assert find_compiler() == (name,)
    monkeypatch.setenv("CXX", "mine")
    with pytest.raises(CompileError, match=r"CXX=mine: no such compiler \(unset CXX"):
        find_compiler()
    install(empty_path, "mine", tmp_path / "log")
    assert find_compiler() == ("mine",)


def test_the_cache_tells_flags_and_machines_apart(
    empty_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    install(empty_path, "c++", log)

    def calls(*flags: str) -> int:
        compile_library(PORTABLE, cache=tmp_path / "cache", extra_flags=flags)
        return len(log.read_text().splitlines())

    assert [calls(), calls(), calls("-g"), calls("-g")] == [1, 1, 2, 2]
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert [calls(), calls()] == [3, 3]


def test_a_damaged_library_in_the_cache_is_compiled_afresh(empty_path: Path, tmp_path: Path) -> None:
    log, cache = tmp_path / "log", tmp_path / "cache"
    install(empty_path, "c++", log)
    assert compile_library(PORTABLE, cache=cache).code == b"library\n"
    (entry,) = cache.iterdir()
    whole = entry.read_bytes()
    corrupted = whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:]
    for number, damaged in enumerate((corrupted, whole[:-1], b""), start=2):
        entry.write_bytes(damaged)
        assert compile_library(PORTABLE, cache=cache).code == b"library\n"
        assert entry.read_bytes() == whole
        assert compile_library(PORTABLE, cache=cache).code == b"library\n"
        assert len(log.read_text().splitlines()) == number


def test_a_cache_that_cannot_be_written_is_no_error(empty_path: Path, tmp_path: Path) -> None:
    install(empty_path, "c++", tmp_path / "log")
    (tmp_path / "cache").write_text("a file")
    assert compile_library(PORTABLE, cache=tmp_path / "cache").code == b"library\n"


def test_another_source_may_include_the_kernels_headers(tmp_path: Path) -> None:
    if find_compiler() is None:
        pytest.skip("no C++ compiler on this machine")
    (tmp_path / "own.h").write_text("#define ANSWER llmctl::kLanes\n")
    source = tmp_path / "other.cpp"
    source.write_text('#include "own.h"\n#include "simd.h"\nextern "C" int answer() { return ANSWER; }\n')
    compiled = compile_library(PORTABLE, cache=tmp_path / "cache", source=source)
    assert compiled.flags == (*FLAGS, *PORTABLE.flags)
    (tmp_path / compiled.filename).write_bytes(compiled.code)
    assert ctypes.CDLL(str(tmp_path / compiled.filename)).answer() == 16
    # What it includes is a part of its key.
    (tmp_path / "own.h").write_text("#define ANSWER 3\n")
    compile_library(PORTABLE, cache=tmp_path / "cache", source=source)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_compiler_that_fails_is_quoted(empty_path: Path) -> None:
    (empty_path / "c++").write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo 1 && exit\necho "note\nx.h:1: error: bad" >&2\nexit 1\n'
    )
    (empty_path / "c++").chmod(0o755)
    with pytest.raises(CompileError, match=r"program\.cpp: c\+\+ failed: x\.h:1: error: bad"):
        compile_library(PORTABLE)


def test_a_compiler_too_old_for_a_variant_is_told_of_others(empty_path: Path) -> None:
    (empty_path / "c++").write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo 1 && exit\n'
        "echo \"c++: error: unrecognized command-line option '-mamx-tile'\" >&2\nexit 1\n"
    )
    (empty_path / "c++").chmod(0o755)
    with pytest.raises(CompileError) as error:
        compile_library(VARIANTS[0])
    assert error.value.fix == (
        "take a newer compiler (for amx GCC 11 or clang 12), or name another variant: --target cpu:avx512vnni"
    )


def test_a_compiler_on_a_full_disk_is_given_another(empty_path: Path) -> None:
    (empty_path / "c++").write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo 1 && exit\n'
        'echo "fatal error: error writing to /tmp/cc.s: No space left on device" >&2\nexit 1\n'
    )
    (empty_path / "c++").chmod(0o755)
    with pytest.raises(CompileError) as error:
        compile_library(PORTABLE)
    assert re.fullmatch("free space in .*, or name another folder: TMPDIR=DIR", error.value.fix or "")


def test_emulation_is_tested_and_never_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    by_name = {v.name: v for v in VARIANTS}
    amx, real, vnni = VARIANTS[0], by_name["x86_64-avx512bf16"], by_name["x86_64-avx512vnni"]
    assert {EMULATED_BF16, EMULATED_AMX}.isdisjoint(VARIANTS)
    assert amx_to_test(amx.features) == (EMULATED_AMX, amx)
    assert amx_to_test(real.features) == amx_to_test(vnni.features) == (EMULATED_AMX,)
    assert amx_to_test(by_name["x86_64-avx2"].features) == ()
    assert supported_variants(amx.features)[:2] == (amx, real)
    assert supported_variants({*amx.features} - {"amx_int8"})[0] == real
    assert EMULATED_BF16 not in supported_variants(vnni.features)
    assert variants_to_test(vnni.features) == (EMULATED_BF16, *supported_variants(vnni.features))
    assert variants_to_test(real.features) == supported_variants(real.features)
    assert variants_to_test(by_name["x86_64-avx2"].features)[0].name == "x86_64-avx2"
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert variants_to_test(vnni.features) == (PORTABLE,)
