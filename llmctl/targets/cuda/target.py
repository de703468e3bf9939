"""The cuda target: engines of cubins, one module a kernel file and architecture, cross-built without a GPU."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from llmctl.config import BuildConfig
from llmctl.engine.step import Runtime
from llmctl.errors import CompileError, UsageError
from llmctl.graph.dtypes import COMPUTE_DTYPES, KV_DTYPES
from llmctl.graph.graph import Graph
from llmctl.graph.passes import DEFAULT_PASSES, PASSES
from llmctl.targets.base import (
    BuildOptions,
    CompileProgress,
    KernelChoice,
    KernelFile,
    Module,
    PlaneContent,
    Read,
    Refuse,
    RuntimeEngine,
    Target,
    TargetName,
)
from llmctl.targets.cuda.compile import ARCHITECTURES, PTX_FALLBACK, compile_modules, source_hash
from llmctl.targets.cuda.device import best_arch, cuda_device
from llmctl.targets.cuda.packing import cuda_planes, pack_cuda
from llmctl.targets.cuda.registry import choose_all, sources_of
from llmctl.targets.machine import host_budget
from llmctl.targets.options import (
    check_kv_cache_dtype,
    check_lm_head,
    check_passes,
    max_model_len,
    plain_rebuild_options,
)
from llmctl.targets.planes import Describe, Plane, total_bytes
from llmctl.targets.step_memory import activation_bytes, kv_bytes_per_token

SPELLINGS = ("cuda:sm_XX[,sm_YY…]",)
CUDA_PASSES: tuple[str, ...] = (*DEFAULT_PASSES, "fuse_linear_add")
"""The graph passes by default: the kernels add residuals as they store."""
DEVICE_SHARE = 0.9
"""Share of a GPU's memory that an engine plans to use."""

_ELF = b"\x7fELF"


@dataclass(frozen=True)
class CudaTarget:
    """Implements ``base.Target`` for the architectures that ``name.archs`` lists."""

    name: TargetName
    no_runtime: ClassVar[str | None] = "this version builds cuda engines but has no runtime for them yet"
    memory_note: ClassVar[str] = "--memory-budget says what your GPU has"

    def graph_passes(self, names: tuple[str, ...] | None, activations: str) -> tuple[str, ...]:
        """Any; by default residuals are added by the linears before them."""
        return check_passes(names, activations, CUDA_PASSES, tuple(PASSES))

    def options(self, config: BuildConfig, graph: Graph, checkpoint_dtype: str) -> BuildOptions:
        """float16 where the checkpoint is, else bfloat16; a KV cache of the same, int8 or fp8."""
        dtype = config.dtype
        if dtype == "auto":
            dtype = "float16" if checkpoint_dtype == "float16" else "bfloat16"
        if dtype == "float32":
            raise UsageError("--dtype: expected float16 or bfloat16 for a cuda target, found 'float32'", param="dtype")
        caches = (dtype, *(name for name in KV_DTYPES if name not in COMPUTE_DTYPES))
        return BuildOptions(
            dtype,
            max_model_len(config, graph),
            config.block_size,
            check_kv_cache_dtype(config.kv_cache_dtype, "cuda", dtype, caches),
            graph.passes,
            check_lm_head(config.lm_head, "a cuda target"),
        )

    def rebuild_options(self, built: BuildOptions) -> dict[str, Any]:
        """All but the head's."""
        return plain_rebuild_options(built, CUDA_PASSES)

    def choose_kernels(self, graph: Graph, options: BuildOptions) -> tuple[KernelChoice, ...]:
        """See ``registry.py``."""
        return choose_all(graph, options.dtype, options.kv_cache_dtype, options.block_size)

    def lm_heads(self, graph: Graph, options: BuildOptions) -> tuple[str, ...]:
        """None: a dense head stays dense."""
        return ()

    def planes(
        self, graph: Graph, options: BuildOptions, describe: Describe | None = None
    ) -> dict[str, tuple[Plane, ...]]:
        """See ``packing.cuda_planes``."""
        return cuda_planes(graph, options, describe)

    def pack(
        self,
        name: str,
        read: Read,
        planes: Sequence[Plane],
        graph: Graph,
        options: BuildOptions,
    ) -> dict[str, PlaneContent]:
        """See ``packing.pack_cuda``."""
        return pack_cuda(name, read, planes, graph)

    def resident_bytes(self, graph: Graph, options: BuildOptions, planes: Iterable[Plane]) -> int:
        """The planes as they are stored."""
        return total_bytes(planes)

    def kv_bytes_per_token(self, graph: Graph, options: BuildOptions) -> int:
        """As the cache's dtype has it."""
        return kv_bytes_per_token(graph, options.kv_cache_dtype)

    def activation_bytes(self, graph: Graph, options: BuildOptions, tokens: int, rows: int) -> int:
        """Buffers in the compute dtype."""
        return activation_bytes(graph, options.dtype, tokens, rows)

    def compile(
        self, choices: Sequence[KernelChoice], cache: Path, progress: CompileProgress | None = None
    ) -> list[Module]:
        """Per source file one cubin for each architecture, and PTX for the oldest."""
        modules = compile_modules(sources_of(choices), (*self.name.archs, PTX_FALLBACK), cache=cache, progress=progress)
        return [
            Module(m.filename, m.code, KernelFile(m.arch, m.compiler, m.flags, (m.source,), m.resources))
            for m in modules
        ]

    def source_hashes(self, choices: Sequence[KernelChoice]) -> dict[str, str]:
        """Of the chosen kernels' files."""
        return {name: source_hash(name) for name in sources_of(choices)}

    def try_modules(self, paths: Sequence[Path]) -> None:
        """Cubins are ELF files, PTX is text: a driver, which could tell more, is not needed to build."""
        for path in paths:
            start = path.read_bytes()[: len(_ELF)]
            if start != _ELF if path.suffix == ".cubin" else not start.strip():
                raise CompileError(f"{path.name}: expected a compiled module, found {start!r}")

    def check_runs_here(self) -> None:
        """No machine does yet."""
        raise UsageError(f"--target {self.name}: {self.no_runtime}", fix="--target cpu", param="target")

    def check_machine(self, modules: Mapping[str, KernelFile], refuse: Refuse) -> None:
        """A device of one of the architectures, and a driver that takes the modules."""
        device = cuda_device()
        if device is None:
            refuse(f"target {self.name}", "an NVIDIA device and driver", "none on this machine", target="cpu",
                   dtype=None)  # fmt: skip
        archs = tuple(module.arch for module in modules.values())
        if not archs:
            return
        best = best_arch(archs, device.capability)
        if best is None:
            refuse("target.archs", f"a device of {', '.join(archs)}", device.arch, target=f"cuda:{device.arch}")
        module = next(m for m in modules.values() if m.arch == best)
        needed = _version_number(module.compiler)
        # A cubin runs under any driver of its CUDA major version; PTX needs a driver as new as its compiler.
        enough = device.driver >= needed if best.startswith("compute_") else device.driver[0] >= needed[0]
        if not enough:
            refuse("driver", f"CUDA {needed[0]}.{needed[1]} or newer", f"CUDA {device.driver[0]}.{device.driver[1]}")

    def covers(self, archs: Iterable[str]) -> bool:
        """By architecture."""
        return set(archs) <= set(self.name.archs)

    def memory_budget(self) -> tuple[int, bool]:
        """A share of the GPU's memory; of the machine's where there is none."""
        device = cuda_device()
        if device is not None:
            return int(device.memory * DEVICE_SHARE), False
        return host_budget(), True

    def open_runtime(self, engine: RuntimeEngine, threads: int | None = None) -> Runtime:
        """A CudaRuntime on the first GPU; ``threads`` means nothing to it."""
        from llmctl.targets.cuda.opening import open_cuda_runtime

        return open_cuda_runtime(engine)


def parse(archs: str) -> Target:
    """The target of a ``--target cuda:sm_80,sm_90``.

    Raises:
        UsageError: no architecture, or one that the kernels are not compiled for.
    """
    names = tuple(sorted(set(archs.split(",")), key=lambda a: (len(a), a))) if archs else ()
    unknown = [name for name in names if name not in ARCHITECTURES]
    if unknown or not names:
        found = f"'{unknown[0]}'" if unknown else "none"
        raise UsageError(
            f"--target cuda: expected some of {', '.join(ARCHITECTURES)}, found {found}",
            fix=f"--target cuda:{ARCHITECTURES[0]}",
            param="target",
        )
    return CudaTarget(TargetName("cuda", names))


def named(name: TargetName) -> Target:
    """The target that a manifest records."""
    return CudaTarget(name)


def _version_number(compiler: str) -> tuple[int, int]:
    found = re.search(r"(\d+)\.(\d+)", compiler)
    return (int(found[1]), int(found[2])) if found else (0, 0)
