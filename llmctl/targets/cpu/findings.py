"""What this machine has for cpu engines, for ``llmctl doctor``."""

from __future__ import annotations

from collections.abc import Iterator

from llmctl.errors import CompileError
from llmctl.targets.base import Finding
from llmctl.targets.cpu.features import cpu_features
from llmctl.targets.cpu.tiles import NEXT, tile_refusal
from llmctl.targets.cpu.toolchain import (
    INSTALL_HINT,
    VARIANTS,
    compiler_version,
    find_compiler,
    library_name,
    supported_variants,
)


def findings() -> tuple[Finding, ...]:
    """The kernels that this CPU runs, the instructions that decide it, the compiler."""
    return tuple(_findings())


def _findings() -> Iterator[Finding]:
    here = cpu_features()
    supported = supported_variants(here)
    yield Finding("kernels that run here", ", ".join(library_name(v) for v in supported))
    if VARIANTS[0] in supported and (refusal := tile_refusal()):
        yield Finding("AMX tiles", f"{refusal}; engines for them run the code of {NEXT}")
    wanted = sorted({feature for variant in VARIANTS for feature in variant.features})
    absent = [feature for feature in wanted if feature not in here]
    yield Finding(
        "instructions", " ".join(feature for feature in wanted if feature in here) or "none of these kernels'"
    )
    if absent:
        yield Finding("not on this CPU", " ".join(absent))
    yield _compiler()


def _compiler() -> Finding:
    name = "C++ compiler"
    try:
        command = find_compiler()
        if command is not None:
            return Finding(name, f"{' '.join(command)}: {compiler_version(command)}")
    except CompileError as error:
        return Finding(name, "none that works", error.message, error.fix or "")
    return Finding(name, "none", "cpu engines that are built here run on torch, slowly", INSTALL_HINT)
