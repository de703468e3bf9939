"""A kernel library is tried in a process of its own: whatever it does there is one line here."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cpu_graphs import VARIANTS, library

from llmctl.errors import CompileError
from llmctl.targets.cpu import trial
from llmctl.targets.cpu.toolchain import Variant, find_compiler
from llmctl.targets.cpu.trial import try_library

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler on this machine")


def refusal(path: Path) -> str:
    with pytest.raises(CompileError) as error:
        try_library(path)
    assert error.value.fix
    assert "\n" not in str(error.value)
    return error.value.message


def compiled(folder: Path, on_load: str) -> Path:
    """A library that runs a statement when it is loaded."""
    compiler, source, path = find_compiler(), folder / "odd.cpp", folder / "odd.so"
    assert compiler
    source.write_text(
        "#include <cstdio>\n#include <cstdlib>\n#include <unistd.h>\n"
        f"__attribute__((constructor)) static void on_load() {{ {on_load} }}\n"
    )
    subprocess.run([*compiler, "-shared", "-fPIC", str(source), "-o", str(path)], check=True)
    return path


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_a_good_library_passes(variant: Variant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Whatever lies in the working folder is not imported.
    (tmp_path / "ctypes.py").write_text("raise SystemExit(3)\n")
    monkeypatch.chdir(tmp_path)
    began = time.perf_counter()
    try_library(library(variant))
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize("percent", [0, 1, 50])
def test_a_truncated_library_is_refused(tmp_path: Path, percent: int) -> None:
    whole = library(VARIANTS[0]).read_bytes()
    short = tmp_path / "short.so"
    short.write_bytes(whole[: len(whole) * percent // 100])
    assert refusal(short).startswith("kernel library short.so: ")


def test_what_is_no_library_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.so"
    text.write_text("not a library\n")
    assert refusal(text).startswith("kernel library text.so: ")
    assert refusal(tmp_path / "nothing.so").startswith("kernel library nothing.so: ")


@pytest.mark.parametrize(
    ("on_load", "said"),
    [
        ("std::abort();", r"opening it ended with SIGABRT \(Aborted\)"),
        ("__builtin_trap();", r"opening it ended with SIG(ILL|TRAP) \(.*\)"),
        ("_exit(0);", "opening it ended the process"),
        ("_exit(7);", "opening it ended with exit code 7"),
        ("", "built for another version of llmctl: llmctl_abi_digest: expected a function, found none"),
    ],
)
def test_a_library_that_does_something_else_is_refused(tmp_path: Path, on_load: str, said: str) -> None:
    assert re.fullmatch(rf"kernel library odd\.so: {said}", refusal(compiled(tmp_path, on_load)))


def test_a_library_that_hangs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_SECONDS", 1.0)
    assert refusal(compiled(tmp_path, "for (;;) pause();")) == "kernel library odd.so: not open after 1 s"


def test_the_child_imports_neither_torch_nor_numpy() -> None:
    code = "import sys, llmctl.targets.cpu.abi; print(*sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
