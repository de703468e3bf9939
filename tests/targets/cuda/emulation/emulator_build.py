"""Builds the emulator and the kernels under test with the system's C++ compiler, into a cache in the temp folder."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmctl.targets.cuda.compile import SOURCE_DIR

HERE = Path(__file__).parent
_KEPT_LIBRARIES = 100
_PARTS = ("fibre.cpp", "scheduler.cpp", "memory.cpp", "device.cpp")
_COMMON = (
    "-std=c++17",
    "-fPIC",
    "-DLLMCTL_EMULATE",
    "-Wno-unknown-pragmas",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
)
_KERNEL_FLAGS = (
    "-O1", "-g1", "-fsanitize=thread", "-fsanitize=bounds,shift,integer-divide-by-zero",
    "-ftrivial-auto-var-init=pattern",
)  # fmt: skip
_ENTRY = re.compile(
    r'extern "C" __attribute__\(\(llmctl_entry\((?P<bound>[^;{]*?)\)\)\) void\s+(?P<name>\w+)\s*'
    r"\((?P<parameters>[^)]*)\)"
)
_THUNK = """
extern "C" __attribute__((no_sanitize("thread"))) void emulator_call_{name}(void** args) {{
    emulator_thunks::call({name}, args);
}}
extern "C" int emulator_kind_{name}(int i) {{ return emulator_thunks::kind({name}, i); }}
extern "C" int emulator_bound_{name}() {{ return {bound}; }}
"""


class EmulationError(AssertionError):
    """What a kernel did wrong, and where."""


def _compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++")


def missing() -> str | None:
    """Why kernels cannot be emulated here; None when they can."""
    for tool in (_compiler() or "g++", "nm", "addr2line"):
        if shutil.which(tool) is None:
            return f"the emulator needs {tool}"
    return None


def _build(name: str, key: Sequence[str], commands: Any) -> Path:
    """A shared library from the cache, else made by ``commands(folder, target)``."""
    digest = hashlib.sha256("\0".join(key).encode()).hexdigest()[:24]
    cache = Path(tempfile.gettempdir()) / f"llmctl-emulator-{os.getuid()}"
    target = cache / f"{name}-{digest}.so"
    if not target.exists():
        cache.mkdir(mode=0o700, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            commands(Path(folder), Path(folder) / "made.so")
            os.replace(Path(folder) / "made.so", target)
        newest_first = sorted(cache.glob("*.so"), key=_modified, reverse=True)
        for old in newest_first[_KEPT_LIBRARIES:]:
            if not old.name.startswith("emulator-"):
                old.unlink(missing_ok=True)
    return target


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # another test process has just removed it
        return 0.0


def _execute(command: Sequence[str | Path], source: str | None = None) -> str:
    done = subprocess.run([str(c) for c in command], input=source, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EmulationError(f"compilation failed: {done.stderr[:1500]}")
    return done.stdout


@functools.cache
def _version() -> str:
    return _execute([str(_compiler()), "--version"])


@functools.cache
def build_runtime() -> Path:
    """The emulator itself, as a shared library that the kernels' libraries link to."""
    sources = [(HERE / part).read_text() for part in (*_PARTS, "runtime.h", "emulation.h")]
    device = [(SOURCE_DIR / name).read_text() for name in ("device.cuh", "numeric.cuh", "collective.cuh")]
    command = [str(_compiler()), *_COMMON, "-O2", "-shared", f"-I{HERE}", f"-I{SOURCE_DIR}"]
    parts = [str(HERE / part) for part in _PARTS]
    return _build(
        "emulator", [*sources, *device, *command, _version()],
        lambda _, target: _execute([*command, *parts, "-o", target, "-ldl"]),
    )  # fmt: skip


def shared_variables(library: Path) -> list[tuple[str, int, int]]:
    """Static ``__shared__`` variables: (``function::variable``, offset in the library, bytes)."""
    found = []
    for line in _execute(["nm", "-C", "-S", "--defined-only", str(library)]).splitlines():
        match = re.match(r"([0-9a-f]+) ([0-9a-f]+) [bBdDuvV] (.*::.*)$", line)
        if match:
            found.append((match[3], int(match[1], 16), int(match[2], 16)))
    return found


def build_kernels(text: str, name: str) -> tuple[Path, dict[str, tuple[str, ...]]]:
    """Compile a source text: the library, and the parameter names of every entry point in it."""
    entry_file = f'#line 1 "{name}"\n{text}'
    command = [str(_compiler()), *_COMMON, f"-I{HERE}", f"-I{SOURCE_DIR}"]
    expanded = _execute([*command, "-E", "-x", "c++", "-"], entry_file).replace('"<stdin>"', f'"{name}"')
    entries = {m["name"]: (m["parameters"], m["bound"]) for m in _ENTRY.finditer(expanded)}
    if not entries:
        raise EmulationError(f"{name}: no LLMCTL_KERNEL")
    unit = (
        _ENTRY.sub(r'extern "C" void \g<name>(\g<parameters>)', expanded)
        + '\n# 1 "thunks.h"\n'
        + (HERE / "thunks.h").read_text()
    )
    unit += "".join(_THUNK.format(name=name, bound=bound) for name, (_, bound) in entries.items())

    def commands(folder: Path, target: Path) -> None:
        (folder / "unit.ii").write_text(unit)
        _execute([*command, *_KERNEL_FLAGS, "-c", folder / "unit.ii", "-o", folder / "unit.o"])
        runtime = build_runtime()
        _execute(
            [str(_compiler()), "-shared", folder / "unit.o", runtime, f"-Wl,-rpath,{runtime.parent}", "-o", target]
        )

    library = _build(Path(name).stem, [unit, *command, *_KERNEL_FLAGS, str(build_runtime()), _version()], commands)
    return library, {entry: _parameter_names(text) for entry, (text, _) in entries.items()}


def _parameter_names(parameters: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", p)[-1] for p in parameters.split(",") if p.strip() not in ("", "void"))
