"""The cuda target: engines of cubins, one module a kernel file and architecture, cross-built without a GPU."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from llmctl.config import GPU_MEMORY_UTILIZATION, BuildConfig
from llmctl.engine.step import LoraLimits, Runtime
from llmctl.errors import CompileError, DeviceError, UsageError
from llmctl.graph.dtypes import COMPUTE_DTYPES, DTYPES, KV_DTYPES
from llmctl.graph.graph import Graph
from llmctl.graph.kv_groups import KVGroup, kv_groups
from llmctl.graph.passes import DEFAULT_PASSES, PASSES
from llmctl.targets.base import (
    BuildOptions,
    CompileProgress,
    KernelChoice,
    KernelFile,
    MemoryBudget,
    Module,
    PlaneContent,
    ProfilePlaces,
    Read,
    Refuse,
    RuntimeEngine,
    RuntimeSizes,
    StepLimits,
    Target,
    TargetName,
)
from llmctl.targets.cuda.buffers import step_bytes
from llmctl.targets.cuda.compile import ARCHITECTURES, PTX_FALLBACK, compile_modules, source_hash
from llmctl.targets.cuda.device import best_arch, cuda_device, held_bytes, why_no_device
from llmctl.targets.cuda.experts import most_tokens
from llmctl.targets.cuda.lora import LORA_SOURCE, MAX_RANK
from llmctl.targets.cuda.packing import cuda_format, cuda_planes, dequantized_bytes, pack_cuda
from llmctl.targets.cuda.readiness import GIB, arch_here, missing_here, unknown_arch
from llmctl.targets.cuda.registry import choose_all, sources_of
from llmctl.targets.lora import slot_elements
from llmctl.targets.machine import host_budget
from llmctl.targets.options import (
    check_kv_cache_dtype,
    check_lm_head,
    check_passes,
    check_range,
    max_model_len,
    plain_rebuild_options,
)
from llmctl.targets.plain import plain_code_bits
from llmctl.targets.planes import Describe, Plane, total_bytes
from llmctl.targets.step_memory import kv_bytes_per_token
from llmctl.targets.step_work import StepProfiler

SPELLINGS = ("cuda", "cuda:sm_XX[,sm_YY…]")
CUDA_PASSES: tuple[str, ...] = (*DEFAULT_PASSES, "fuse_linear_add")
"""The graph passes by default: the kernels add residuals as they store."""
DEVICE_STEP = StepLimits(max_num_batched_tokens=2048, max_num_seqs=256)
"""The largest step by default: a GPU needs many tokens at once to be busy."""
CONTEXT_BYTES = 768 * 2**20
"""What a plan leaves for the CUDA context, loaded modules and the libraries' own workspaces; the runtime measures what
they really take (719 MiB on an H100 after the first product, CUDA 13.0, torch 2.11)."""

_ELF = b"\x7fELF"


@dataclass(frozen=True)
class CudaTarget:
    """Implements ``base.Target`` for the architectures that ``name.archs`` lists."""

    name: TargetName
    run_options: ClassVar[frozenset[str]] = frozenset({"gpu_memory_utilization", "enforce_eager"})
    step_limits: ClassVar[StepLimits] = DEVICE_STEP
    niceness: ClassVar[int] = 0

    def graph_passes(self, names: tuple[str, ...] | None, activations: str) -> tuple[str, ...]:
        """Any; by default residuals are added by the linears before them."""
        return check_passes(names, activations, CUDA_PASSES, tuple(PASSES))

    def options(self, config: BuildConfig, graph: Graph, checkpoint_dtype: str) -> BuildOptions:
        """float16 where the checkpoint is, else bfloat16; a KV cache of the same, int8 or fp8."""
        dtype = config.dtype
        if dtype == "auto":
            dtype = "float16" if checkpoint_dtype == "float16" else "bfloat16"
        dtype = check_range(dtype, graph, checkpoint_dtype, auto=config.dtype == "auto")
        if dtype == "float32":
            raise UsageError("--dtype: expected float16 or bfloat16 for a cuda target, found 'float32'", param="dtype")
        return BuildOptions(
            dtype,
            max_model_len(config, graph),
            config.block_size,
            check_kv_cache_dtype(config.kv_cache_dtype, "cuda", dtype, _caches(dtype)),
            graph.passes,
            check_lm_head(config.lm_head, "a cuda target"),
        )

    def rebuild_options(self, built: BuildOptions) -> dict[str, Any]:
        """All but the head's."""
        return plain_rebuild_options(built, CUDA_PASSES)

    def choose_kernels(self, graph: Graph, options: BuildOptions) -> tuple[KernelChoice, ...]:
        """See ``registry.py``."""
        return choose_all(graph, options.dtype, options.kv_cache_dtype, options.block_size)

    def kv_cache_dtypes(self, options: BuildOptions) -> tuple[str, ...]:
        """The compute dtype, int8, fp8: a module has the entries of all."""
        return _caches(options.dtype)

    def code_bits(self, name: str, graph: Graph, options: BuildOptions) -> int | None:
        """What the kernels read, of a weight that they take; of others the checkpoint's own."""
        fmt = cuda_format(name, graph)
        return plain_code_bits(graph.weights[name]) if fmt is None else fmt.bits

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
        """The planes as they are stored, and dense beside them what no kernel reads packed."""
        return total_bytes(planes) + dequantized_bytes(graph, options.dtype)

    def kv_bytes_per_token(self, graph: Graph, options: BuildOptions) -> int:
        """As the cache's dtype has it."""
        return kv_bytes_per_token(graph, options.kv_cache_dtype)

    def kv_groups(self, graph: Graph) -> tuple[KVGroup, ...]:
        """By window: sliding layers let go of blocks."""
        return kv_groups(graph)

    def activation_bytes(self, graph: Graph, options: BuildOptions, tokens: int, rows: int) -> int:
        """What the runtime plans: activations, the kernels' scratch, logits.

        Raises:
            UsageError: more tokens than the kernels of a mixture's experts take in a step.
        """
        _check_slots(graph, tokens)
        sizes = RuntimeSizes(0, options.block_size, options.max_model_len, tokens, rows)
        return step_bytes(graph, options.dtype, sizes)

    def compile(
        self, choices: Sequence[KernelChoice], cache: Path, progress: CompileProgress | None = None
    ) -> list[Module]:
        """Per source file one cubin for each architecture, and PTX for the oldest; that of adapters is always there."""
        modules = compile_modules(_sources(choices), (*self.name.archs, PTX_FALLBACK), cache=cache, progress=progress)
        return [
            Module(m.filename, m.code, KernelFile(m.arch, m.compiler, m.flags, (m.source,), m.resources))
            for m in modules
        ]

    def source_hashes(self, choices: Sequence[KernelChoice]) -> dict[str, str]:
        """Of the chosen kernels' files, and the adapters'."""
        return {name: source_hash(name) for name in _sources(choices)}

    def try_modules(self, paths: Sequence[Path]) -> None:
        """Cubins are ELF files, PTX is text: a driver, which could tell more, is not needed to build."""
        for path in paths:
            start = path.read_bytes()[: len(_ELF)]
            if start != _ELF if path.suffix == ".cubin" else not start.strip():
                raise CompileError(f"{path.name}: expected a compiled module, found {start!r}")

    def check_runs_here(self) -> None:
        """A device that takes one of the modules, a torch with CUDA, cupy."""
        device = cuda_device()
        reason = missing_here(device)
        if device is not None and best_arch((*self.name.archs, PTX_FALLBACK), device.capability) is None:
            reason = f"expected a GPU of {', '.join(self.name.archs)}, found {device.arch}"
        if reason is not None:
            raise UsageError(f"--target {self.name}: {reason}", fix="--target cpu", param="target")

    def check_machine(self, modules: Mapping[str, KernelFile], refuse: Refuse) -> None:
        """A device of one of the architectures, and a driver that takes the modules."""
        device = cuda_device()
        if device is None:
            found = f"none on this machine ({why_no_device()})"
            refuse(f"target {self.name}", "an NVIDIA device and driver", found, target="cpu", dtype=None)
        archs = tuple(module.arch for module in modules.values())
        if not archs:
            return
        best = best_arch(archs, device.capability)
        if best is None:
            arch = arch_here(device)
            mend = {"target": "cpu", "dtype": None} if arch is None else {"target": f"cuda:{arch}"}
            refuse("target.archs", f"a device of {', '.join(archs)}", device.arch, **mend)
        module = next(m for m in modules.values() if m.arch == best)
        needed = _version_number(module.compiler)
        # A cubin runs under any driver of its CUDA major version; PTX needs a driver as new as its compiler.
        enough = device.driver >= needed if best.startswith("compute_") else device.driver[0] >= needed[0]
        if not enough:
            refuse("driver", f"CUDA {needed[0]}.{needed[1]} or newer", f"CUDA {device.driver[0]}.{device.driver[1]}")

    def kernel_build(self) -> str:
        """The target says it."""
        return ""

    def covers(self, archs: Iterable[str]) -> bool:
        """By architecture."""
        return set(archs) <= set(self.name.archs)

    def adapter_bytes(self, graph: Graph, options: BuildOptions, lora: LoraLimits) -> int:
        """Matrices in the compute dtype.

        Raises:
            UsageError: a rank that the kernels do not take.
        """
        if lora.rank > MAX_RANK:
            raise UsageError(
                f"--max-lora-rank: expected at most {MAX_RANK} for a cuda target, found {lora.rank}",
                fix=f"--max-lora-rank {MAX_RANK}; an adapter of a larger one can be merged",
                param="max_lora_rank",
            )
        return lora.slots * slot_elements(graph) * DTYPES[options.dtype].nbytes

    def context_bytes(self) -> int:
        """See ``CONTEXT_BYTES``."""
        return CONTEXT_BYTES

    def memory_budget(self, utilization: float | None = None) -> MemoryBudget:
        """A share of the GPU's memory, less what processes hold of it now; the machine's memory where there is none."""
        device = cuda_device()
        if device is None:
            return host_budget("no GPU here: --memory-budget of build says what yours has")
        share, held = GPU_MEMORY_UTILIZATION if utilization is None else utilization, held_bytes(device)
        source = f"{share:g} of the GPU's {device.memory / GIB:.1f} GiB"
        if held:
            source += f", less {held / GIB:.1f} GiB that others hold"
        return MemoryBudget(max(0, int(device.memory * share) - held), source, shared=False)

    def open_runtime(self, engine: RuntimeEngine, threads: int | None = None) -> Runtime:
        """See ``opening.py``."""
        missing = missing_here(cuda_device())
        if missing is not None:
            fix = "mend that, or build the model with --target cpu"
            raise DeviceError(f"{engine.path}: target {self.name}: {missing}", fix=fix)
        from llmctl.targets.cuda.errors import device_errors
        from llmctl.targets.cuda.opening import open_cuda_runtime

        with device_errors():
            return open_cuda_runtime(engine)

    def open_profiler(
        self, engine: RuntimeEngine, places: ProfilePlaces, threads: int | None = None, *, from_source: bool = False
    ) -> StepProfiler:
        """Kernels as torch's profiler sees them; see ``profiling.py``."""
        if from_source:
            raise UsageError(
                "--from-source: a cuda engine runs the kernels that it was built with",
                fix="build it again",
                param="from_source",
            )
        runtime = self.open_runtime(engine, threads)
        from llmctl.targets.cuda.profiling import CudaProfiler
        from llmctl.targets.cuda.runtime import CudaRuntime

        assert isinstance(runtime, CudaRuntime)
        chosen = {choice.op: choice.kernel for choice in self.choose_kernels(engine.graph, engine.options)}
        integer = frozenset(op.weights[0] for op in engine.graph.products() if chosen[op.name] == "w8a8")
        return CudaProfiler(engine, runtime, self.planes(engine.graph, engine.options), integer)


def parse(archs: str) -> Target:
    """The target of a ``--target cuda:sm_80,sm_90``, or of ``cuda``: this machine's GPU.

    Raises:
        UsageError: an architecture that the kernels are not compiled for, named or of this GPU; none named and no GPU.
    """
    if not archs:
        return CudaTarget(TargetName("cuda", (_arch_of_this_machine(),)))
    names = tuple(sorted(set(archs.split(",")), key=lambda a: (len(a), a)))
    unknown = [name for name in names if name not in ARCHITECTURES]
    if unknown:
        raise UsageError(
            f"--target cuda: expected some of {', '.join(ARCHITECTURES)}, found '{unknown[0]}'",
            fix=f"--target cuda:{ARCHITECTURES[0]}",
            param="target",
        )
    return CudaTarget(TargetName("cuda", names))


def _arch_of_this_machine() -> str:
    device = cuda_device()
    if device is None:
        raise UsageError(
            f"--target cuda: expected some of {', '.join(ARCHITECTURES)}, or a GPU whose architecture to take, found "
            f"neither: {why_no_device()}",
            fix=f"--target cpu; or, to build for another machine, --target cuda:{ARCHITECTURES[0]}",
            param="target",
        )
    arch = arch_here(device)
    if arch is None:
        raise UsageError(f"--target cuda: {unknown_arch(device)}", fix="--target cpu", param="target")
    return arch


def _check_slots(graph: Graph, tokens: int) -> None:
    """Refuse a step whose choices of experts are more than a grid has blocks for."""
    for op in graph.products():
        if op.kind == "grouped_linear":
            chosen = graph.buffers[op.inputs[1]].width
            most = most_tokens(op.attrs["count"], chosen)
            if tokens > most:
                raise UsageError(
                    f"--max-num-batched-tokens: expected at most {most} for a cuda target and {chosen} experts a "
                    f"token, found {tokens}",
                    fix=f"--max-num-batched-tokens {most}",
                    param="max_num_batched_tokens",
                )


def _sources(choices: Sequence[KernelChoice]) -> tuple[str, ...]:
    """What is compiled: whether an engine is to serve adapters is said when it is opened."""
    return tuple(sorted({*sources_of(choices), LORA_SOURCE}))


def _caches(dtype: str) -> tuple[str, ...]:
    return (dtype, *(name for name in KV_DTYPES if name not in COMPUTE_DTYPES))


def named(name: TargetName) -> Target:
    """The target that a manifest records."""
    return CudaTarget(name)


def _version_number(compiler: str) -> tuple[int, int]:
    found = re.search(r"(\d+)\.(\d+)", compiler)
    return (int(found[1]), int(found[2])) if found else (0, 0)
