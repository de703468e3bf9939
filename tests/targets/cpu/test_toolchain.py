"""Which compiler makes the CPU kernels, and what their cache tells apart."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import pytest

from llmctl.errors import CompileError
from llmctl.targets.cpu.toolchain import (
    EMULATED_BF16,
    VARIANTS,
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
    monkeypatch.setenv("CXX", "mine")
    for name in ("clang++", "g++", "c++", "mine"):
        install(empty_path, name, tmp_path / "log")
        assert find_compiler() == (name,)


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


def test_a_compiler_that_fails_is_quoted(empty_path: Path) -> None:
    (empty_path / "c++").write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo 1 && exit\necho "note\nx.h:1: error: bad" >&2\nexit 1\n'
    )
    (empty_path / "c++").chmod(0o755)
    with pytest.raises(CompileError, match=r"program\.cpp: c\+\+ failed: x\.h:1: error: bad"):
        compile_library(PORTABLE)


def test_emulation_is_tested_and_never_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    by_name = {v.name: v for v in VARIANTS}
    real, vnni = by_name["x86_64-avx512bf16"], by_name["x86_64-avx512vnni"]
    assert EMULATED_BF16 not in VARIANTS
    assert EMULATED_BF16 not in supported_variants(vnni.features)
    assert variants_to_test(vnni.features) == (EMULATED_BF16, *supported_variants(vnni.features))
    assert variants_to_test(real.features) == supported_variants(real.features)
    assert variants_to_test(by_name["x86_64-avx2"].features)[0].name == "x86_64-avx2"
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert variants_to_test(vnni.features) == (PORTABLE,)
