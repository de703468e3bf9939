"""CUDA sources -> cubins and PTX, with NVRTC and a cache. Needs no GPU, driver or toolkit.

One ``.cu`` file and one architecture make one module, compiled and cached alone: an engine takes only the files that
its ops need, and a change to one kernel compiles one file. A cubin runs on its own architecture (and later ones of the
same major version); PTX for the oldest is the fall-back that a driver can finish for newer devices.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from llmctl.errors import CompileError, UsageError
from llmctl.targets.base import CompileProgress, KernelResources
from llmctl.targets.cuda.nvrtc import load_nvrtc
from llmctl.targets.kernel_cache import read_entry, write_entry
from llmctl.targets.sources import digest, included_files

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
PTX_FALLBACK = "compute_80"
SOURCE_DIR = Path(__file__).parent / "native"
FLAGS = ("--std=c++17",)

_HOST_ONLY = ("emulation.h",)  # for C++ builds: a device build never reaches that include
_ERROR = re.compile(r"^(?P<file>[^\s(]+)\((?P<line>\d+)\): (?:catastrophic )?error:? ?(?P<text>.*)$", re.MULTILINE)
_ENTRY = re.compile(r"Compiling entry function '(?P<name>\w+)'")
_FRAME = re.compile(
    r"(?P<stack>\d+) bytes stack frame, (?P<store>\d+) bytes spill stores, (?P<load>\d+) bytes spill loads"
)
_USED = re.compile(r"Used (?P<registers>\d+) registers")
_SHARED = re.compile(r"(?P<bytes>\d+) bytes smem")


@dataclass(frozen=True)
class CompiledModule:
    """One module. ``resources`` is empty for PTX, which has no registers assigned yet."""

    source: str
    arch: str
    code: bytes
    resources: tuple[KernelResources, ...]
    compiler: str
    flags: tuple[str, ...]

    @property
    def filename(self) -> str:
        """``sm_90/norm.cubin`` or ``compute_80/norm.ptx``."""
        return f"{self.arch}/{Path(self.source).stem}.{'ptx' if self.arch.startswith('compute_') else 'cubin'}"

    @property
    def digest(self) -> str:
        """sha256 of the code."""
        return hashlib.sha256(self.code).hexdigest()


def source_files(names: Iterable[str], source_dir: Path = SOURCE_DIR) -> dict[str, str]:
    """The named files and every file they include, by name, sorted.

    Raises:
        CompileError: a file that is not there.
    """
    return included_files(names, (source_dir,), absent=_HOST_ONLY)


def source_hash(source: str, source_dir: Path = SOURCE_DIR) -> str:
    """sha256 of one kernel file together with everything it includes."""
    return digest(source_files([source], source_dir))


def compile_modules(
    sources: Iterable[str],
    archs: Iterable[str],
    *,
    cache: Path | None = None,
    source_dir: Path = SOURCE_DIR,
    progress: CompileProgress | None = None,
) -> list[CompiledModule]:
    """``compile_module`` for every file and architecture, several at a time; in the order of files, then archs."""
    archs = tuple(archs)
    jobs = [(source, arch) for source in sources for arch in archs]
    modules: list[CompiledModule] = []
    if progress is not None and jobs:
        progress(f"compiling {jobs[0][0]}", 0, len(jobs))
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for module in pool.map(lambda job: compile_module(*job, cache=cache, source_dir=source_dir), jobs):
            modules.append(module)
            if progress is not None:
                progress(module.filename, len(modules), len(jobs))
    return modules


def compile_module(
    source: str, arch: str, *, cache: Path | None = None, source_dir: Path = SOURCE_DIR
) -> CompiledModule:
    """Compile one kernel file for one architecture: ``sm_XX`` to a cubin, ``compute_XX`` to PTX.

    Args:
        source: a file name under ``source_dir``.
        cache: folder that keeps modules, keyed by source, included headers, flags, architecture and NVRTC version.

    Raises:
        UsageError: an architecture that is not one of ``ARCHITECTURES``.
        CompileError: NVRTC is missing or too old for ``arch``, or a source has an error (its file and line are named).
    """
    if arch not in (*ARCHITECTURES, PTX_FALLBACK):
        raise UsageError(
            f"CUDA architecture: expected one of {', '.join(ARCHITECTURES)}, found '{arch}'", param="target"
        )
    nvrtc = load_nvrtc()
    texts = source_files([source], source_dir)
    flags = (*FLAGS, f"--gpu-architecture={arch}", *(() if arch == PTX_FALLBACK else ("--ptxas-options=-v",)))
    unit = f'#include "{source}"\n'
    key = digest({**texts, "unit": unit, "flags": " ".join(flags), "nvrtc": nvrtc.version})
    cached = _cached(cache, key)
    if cached is not None:
        return cached
    if arch != PTX_FALLBACK and arch not in nvrtc.supported_archs():
        raise CompileError(
            f"target {arch}: NVRTC {nvrtc.version} compiles only for {', '.join(nvrtc.supported_archs())}",
            fix="pip install --upgrade nvidia-cuda-nvrtc",
        )
    result = nvrtc.compile(unit, "module.cu", texts, flags)
    if not result.ok:
        raise CompileError(_first_error(result.log, source_dir))
    module = CompiledModule(
        source, arch, result.code.rstrip(b"\0") if arch == PTX_FALLBACK else result.code,
        parse_resources(result.log), f"NVRTC {nvrtc.version}", flags,
    )  # fmt: skip
    fields = {name: value for name, value in asdict(module).items() if name != "code"}
    write_entry(cache, key, fields, module.code)
    return module


def parse_resources(log: str) -> tuple[KernelResources, ...]:
    """Resource usage of every kernel in a ``ptxas -v`` log, sorted by name."""
    found = []
    for section in log.split("Compiling entry function")[1:]:
        section = "Compiling entry function" + section
        entry, frame, used = _ENTRY.search(section), _FRAME.search(section), _USED.search(section)
        if not (entry and frame and used):
            continue
        shared = _SHARED.search(section)
        found.append(
            KernelResources(
                name=entry["name"],
                registers=int(used["registers"]),
                shared_bytes=int(shared["bytes"]) if shared else 0,
                stack_bytes=int(frame["stack"]),
                spill_store_bytes=int(frame["store"]),
                spill_load_bytes=int(frame["load"]),
            )
        )
    return tuple(sorted(found, key=lambda r: r.name))


def _first_error(log: str, source_dir: Path) -> str:
    """The first error of a compiler log as ``path:line: text``, with how many there are."""
    errors = list(_ERROR.finditer(log))
    if not errors:
        return "NVRTC: " + (" ".join(log.split()) or "compilation failed without a message")
    first = errors[0]
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return f"{source_dir / first['file']}:{first['line']}: {first['text']}{more}"


def _cached(cache: Path | None, key: str) -> CompiledModule | None:
    """A module that the cache holds whole, with the fields that a module has in this version."""
    entry = read_entry(cache, key)
    if entry is None:
        return None
    fields, code = entry
    try:
        resources = tuple(KernelResources(**r) for r in fields.pop("resources"))
        return CompiledModule(code=code, resources=resources, flags=tuple(fields.pop("flags")), **fields)
    except (KeyError, TypeError):
        return None
