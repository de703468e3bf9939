"""The native CPU kernels -> shared libraries, with the system's C++ compiler and a cache.

One translation unit (``native/program.cpp``) is compiled once per variant; flags alone choose the instructions. Without
a compiler on PATH, the ``ziglang`` wheel's ``zig c++`` serves.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from llmctl.errors import CompileError
from llmctl.targets.kernel_cache import read_entry, write_entry
from llmctl.targets.sources import digest, included_files

SOURCE_DIR = Path(__file__).parent / "native"
SOURCE = "program.cpp"
FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-fno-math-errno", "-Wall", "-Wextra", "-Wno-psabi",
)  # fmt: skip
INSTALL_HINT = "install a C++ compiler (apt install g++, or pip install ziglang)"


@dataclass(frozen=True)
class Variant:
    """One build of the kernels. ``features``: what the CPU must have, as /proc/cpuinfo names it."""

    name: str
    flags: tuple[str, ...]
    features: tuple[str, ...]
    machine: str | None = None


_AVX2 = ("avx2", "fma", "f16c", "bmi2")
_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni")
_AVX512_FLAGS = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mfma", "-mf16c")
_BF16 = (*_AVX512, "avx512_bf16")
_BF16_FLAGS = (*_AVX512_FLAGS, "-mavx512bf16")
VARIANTS = (
    Variant("x86_64-amx", (*_BF16_FLAGS, "-mamx-tile", "-mamx-int8"), (*_BF16, "amx_tile", "amx_int8"), "x86_64"),
    Variant("x86_64-avx512bf16", _BF16_FLAGS, _BF16, "x86_64"),
    Variant("x86_64-avx512vnni", _AVX512_FLAGS, _AVX512, "x86_64"),
    # -O2: what is hot is written in vectors; -O3 doubles the time to compile.
    Variant("x86_64-avx2", ("-O2", "-mavx2", "-mfma", "-mf16c", "-mbmi2"), _AVX2, "x86_64"),
    Variant("portable", ("-O2",), ()),
)
"""From the fastest down."""

_EMULATED_BF16_FLAGS = (*_AVX512_FLAGS, "-DLLMCTL_EMULATE_BF16")
EMULATED_BF16 = Variant("x86_64-avx512bf16-emulated", _EMULATED_BF16_FLAGS, _AVX512, "x86_64")
"""The code of avx512bf16 with its one further instruction in software: for tests only, in no engine."""
EMULATED_AMX = Variant("x86_64-amx-emulated", (*_EMULATED_BF16_FLAGS, "-DLLMCTL_EMULATE_AMX"), _AVX512, "x86_64")
"""The code of amx on a CPU that has no more than avx512vnni: likewise."""


@dataclass(frozen=True)
class CompiledLibrary:
    """One shared library: its variant, bytes, and what made it."""

    variant: Variant
    code: bytes
    compiler: str
    flags: tuple[str, ...]

    @property
    def filename(self) -> str:
        """``x86_64-avx512bf16.so``; the portable one is named for the machine it was compiled on."""
        return f"{library_name(self.variant)}.so"


def library_name(variant: Variant) -> str:
    """The file's stem: the variant's name, with the machine in front of ``portable``."""
    return variant.name if variant.machine else f"{platform.machine()}-{variant.name}"


def supported_variants(features: Iterable[str]) -> tuple[Variant, ...]:
    """The variants that a CPU with these features (and this machine's architecture) can run, fastest first."""
    have = set(features)
    return tuple(
        v for v in VARIANTS if set(v.features) <= have and (v.machine is None or v.machine == platform.machine())
    )


def variants_to_test(features: Iterable[str]) -> tuple[Variant, ...]:
    """The supported variants; before them avx512bf16 emulated, where the CPU lacks nothing else for it."""
    have = set(features)
    supported = supported_variants(have)
    emulate = "avx512_bf16" not in have and any(v.features == EMULATED_BF16.features for v in supported)
    return (EMULATED_BF16, *supported) if emulate else supported


def amx_to_test(features: Iterable[str]) -> tuple[Variant, ...]:
    """amx emulated, where the CPU lacks nothing else for it, and amx itself where it has that too."""
    supported = supported_variants(features)
    emulated = (EMULATED_AMX,) if any(v.features == EMULATED_AMX.features for v in supported) else ()
    return (*emulated, *(v for v in supported if v.name == "x86_64-amx"))


def find_compiler() -> tuple[str, ...] | None:
    """The C++ compiler's command: $CXX, or c++, g++ or clang++ on PATH, or the ziglang wheel; None without any.

    Raises:
        CompileError: $CXX names a compiler that is not there.
    """
    wanted = os.environ.get("CXX")
    if wanted and not shutil.which(wanted):
        raise CompileError(f"CXX={wanted}: no such compiler", fix="unset CXX, or set it to a C++ compiler's command")
    for name in (wanted, "c++", "g++", "clang++"):
        if name and shutil.which(name):
            return (name,)
    if importlib.util.find_spec("ziglang") is not None:
        return (sys.executable, "-m", "ziglang", "c++")
    return None


def compile_library(
    variant: Variant,
    *,
    cache: Path | None = None,
    extra_flags: tuple[str, ...] = (),
    source: Path = SOURCE_DIR / SOURCE,
) -> CompiledLibrary:
    """Compile the kernels for one variant.

    Args:
        cache: folder that keeps libraries, keyed by sources, flags, compiler version and this machine's architecture; a
            damaged one is compiled afresh.
        extra_flags: appended, e.g. sanitizers.
        source: what to compile; it may include the kernels' headers wherever it lies.

    Raises:
        CompileError: no compiler, or the sources do not compile (the compiler's first error is named).
    """
    command = find_compiler()
    if command is None:
        raise CompileError("no C++ compiler found for the CPU kernels", fix=INSTALL_HINT)
    version = compiler_version(command)
    flags = (*FLAGS, *variant.flags, *extra_flags)
    # The machine: a compiler names itself alike on every architecture, and a home folder may be shared.
    made_for = {"machine": platform.machine(), "compiler": version, "flags": " ".join(flags)}
    key = digest({**made_for, **_source_files(source)})
    cached = read_entry(cache, key)
    if cached is not None:
        return CompiledLibrary(variant, cached[1], version, flags)
    code = _compile(command, flags, source)
    write_entry(cache, key, {}, code)
    return CompiledLibrary(variant, code, version, flags)


def kernel_sources() -> dict[str, str]:
    """What a library is made of: source file -> sha256 of it and all it includes."""
    return {SOURCE: digest(_source_files(SOURCE_DIR / SOURCE))}


def _source_files(source: Path) -> dict[str, str]:
    return included_files([source.name], (source.parent, SOURCE_DIR))


def _compile(command: tuple[str, ...], flags: tuple[str, ...], source: Path) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "kernels.so"
        # A relative source path and no build id: the same sources give the same bytes wherever they lie.
        linker = ("-Wl,--build-id=none",) if sys.platform.startswith("linux") else ()
        result = subprocess.run(
            [*command, *flags, *linker, f"-I{SOURCE_DIR}", source.name, "-o", str(output)],
            cwd=source.parent,
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode or not output.is_file():
            lines = result.stderr.splitlines()
            first = next((line for line in lines if "error" in line), lines[0] if lines else "no message")
            raise CompileError(f"{source}: {command[0]} failed: {first.strip()}", fix=_fix_of(first))
        return output.read_bytes()


def _fix_of(message: str) -> str | None:
    """For a full disk, and a compiler that does not know a variant's flags."""
    if os.strerror(errno.ENOSPC) in message:
        return f"free space in {tempfile.gettempdir()}, or name another folder: TMPDIR=DIR"
    if not re.search(r"(unrecognized|unknown|unsupported).*-m(amx|avx)", message):
        return None
    return "take a newer compiler (for amx GCC 11 or clang 12), or name another variant: --target cpu:avx512vnni"


def compiler_version(command: tuple[str, ...]) -> str:
    """The first line of what a compiler says of itself.

    Raises:
        CompileError: it does not run.
    """
    result = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    if result.returncode or not result.stdout.strip():
        said = next((line.strip() for line in result.stderr.splitlines() if line.strip()), "it said nothing")
        raise CompileError(
            f"{' '.join(command)} --version failed: {said}", fix=f"set CXX to another compiler, or {INSTALL_HINT}"
        )
    return result.stdout.splitlines()[0].strip()
