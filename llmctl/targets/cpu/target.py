"""The cpu target: weights packed for native C++ kernels, which ``build`` compiles and one call a step runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from llmctl.config import BuildConfig
from llmctl.engine.step import LoraLimits, Runtime
from llmctl.errors import UsageError
from llmctl.graph.dtypes import DTYPES
from llmctl.graph.graph import Graph
from llmctl.graph.kv_groups import KVGroup, kv_groups
from llmctl.graph.passes import DEFAULT_PASSES
from llmctl.targets.base import (
    LM_HEADS,
    BuildOptions,
    CompileProgress,
    KernelChoice,
    KernelFile,
    MemoryBudget,
    Module,
    Offer,
    PlaneContent,
    ProfilePlaces,
    Read,
    Refuse,
    RuntimeEngine,
    StepLimits,
    Target,
    TargetName,
)
from llmctl.targets.cpu.abi import WEIGHT_BITS, current_digest
from llmctl.targets.cpu.adapters import slots_bytes
from llmctl.targets.cpu.features import cpu_features
from llmctl.targets.cpu.layout import kv_layer_bytes
from llmctl.targets.cpu.options import KV_DTYPES, cpu_options, cpu_passes, head_is_free
from llmctl.targets.cpu.packing import cpu_choices, cpu_planes, linear_format, linear_formats, pack_planes
from llmctl.targets.cpu.tiles import NEXT, tile_refusal
from llmctl.targets.cpu.toolchain import (
    SOURCE,
    VARIANTS,
    compile_library,
    find_compiler,
    kernel_sources,
    library_name,
    supported_variants,
)
from llmctl.targets.cpu.trial import try_library
from llmctl.targets.cpu.uncompiled import UncompiledCpu
from llmctl.targets.machine import HOST_NICENESS, HOST_STEP, host_budget, physical_cores
from llmctl.targets.options import plain_rebuild_options
from llmctl.targets.planes import Describe, Plane, total_bytes
from llmctl.targets.step_memory import activation_bytes
from llmctl.targets.step_work import StepProfiler

SPELLINGS = ("cpu", "cpu:VARIANT[,VARIANT…]")


@dataclass(frozen=True)
class CpuTarget:
    """Implements ``base.Target`` for the variants of the native kernels that ``name.archs`` lists, fastest first."""

    name: TargetName
    run_options: ClassVar[frozenset[str]] = frozenset({"threads"})
    step_limits: ClassVar[StepLimits] = HOST_STEP
    niceness: ClassVar[int] = HOST_NICENESS

    def graph_passes(self, names: tuple[str, ...] | None, activations: str) -> tuple[str, ...]:
        """The default passes, or some of them."""
        return cpu_passes(names, activations)

    def options(self, config: BuildConfig, graph: Graph, checkpoint_dtype: str) -> BuildOptions:
        """bfloat16 unless asked otherwise; a quantized model's dense head at 8 bits."""
        return cpu_options(config, graph)

    def rebuild_options(self, built: BuildOptions) -> dict[str, Any]:
        """All, the head's included."""
        return plain_rebuild_options(built, DEFAULT_PASSES) | {"lm_head": built.lm_head}

    def choose_kernels(self, graph: Graph, options: BuildOptions) -> tuple[KernelChoice, ...]:
        """See ``packing.cpu_choices``."""
        return cpu_choices(graph, options)

    def kv_cache_dtypes(self, options: BuildOptions) -> tuple[str, ...]:
        """Any: one library has the kernels of all."""
        return KV_DTYPES

    def code_bits(self, name: str, graph: Graph, options: BuildOptions) -> int | None:
        """The checkpoint's own, unless rows are not whole units."""
        fmt = linear_format(name, graph, options)
        if fmt is None or not (fmt.integer or fmt.book):
            return None
        return fmt.code_bits or WEIGHT_BITS[fmt.dtype]

    def lm_heads(self, graph: Graph, options: BuildOptions) -> tuple[str, ...]:
        """All, unless the engine is exact or the checkpoint quantizes the head."""
        return LM_HEADS if head_is_free(options.dtype, graph) else ()

    def planes(
        self,
        graph: Graph,
        options: BuildOptions,
        describe: Describe | None = None,
    ) -> dict[str, tuple[Plane, ...]]:
        """See ``packing.cpu_planes``: nothing is left open."""
        return cpu_planes(graph, options)

    def pack(
        self,
        name: str,
        read: Read,
        planes: Sequence[Plane],
        graph: Graph,
        options: BuildOptions,
    ) -> dict[str, PlaneContent]:
        """See ``packing.pack_planes``."""
        return pack_planes(read(), name, graph, options)

    def resident_bytes(self, graph: Graph, options: BuildOptions, planes: Iterable[Plane]) -> int:
        """The planes as they are stored: kernels read them where they are mapped."""
        return total_bytes(planes)

    def kv_bytes_per_token(self, graph: Graph, options: BuildOptions) -> int:
        """See ``layout.kv_layer_bytes``."""
        return sum(kv_layer_bytes(layer, DTYPES[options.kv_cache_dtype].tag) for layer in graph.kv)

    def kv_groups(self, graph: Graph) -> tuple[KVGroup, ...]:
        """Layers with a window apart."""
        return kv_groups(graph)

    def activation_bytes(self, graph: Graph, options: BuildOptions, tokens: int, rows: int) -> int:
        """Buffers are float32, whatever the weights are."""
        return activation_bytes(graph, "float32", tokens, rows)

    def compile(
        self,
        choices: Sequence[KernelChoice],
        cache: Path,
        progress: CompileProgress | None = None,
    ) -> list[Module]:
        """One shared library per variant."""
        variants = [v for v in VARIANTS if library_name(v) in self.name.archs]
        modules: list[Module] = []
        if progress is not None:
            progress(f"compiling {variants[0].name}, up to a minute the first time", 0, len(variants))
        with ThreadPoolExecutor() as pool:
            for library in pool.map(lambda variant: compile_library(variant, cache=cache), variants):
                arch = library_name(library.variant)
                record = KernelFile(arch, library.compiler, library.flags, (SOURCE,), (), current_digest())
                modules.append(Module(library.filename, library.code, record))
                if progress is not None:
                    progress(library.filename, len(modules), len(variants))
        return modules

    def source_hashes(self, choices: Sequence[KernelChoice]) -> dict[str, str]:
        """One translation unit has all kernels."""
        return kernel_sources()

    def try_modules(self, paths: Sequence[Path]) -> None:
        """Open every library that this CPU runs, in a process of its own."""
        here = {f"{library_name(v)}.so" for v in supported_variants(cpu_features())}
        for path in paths:
            if path.name in here:
                try_library(path)

    def check_runs_here(self) -> None:
        """This CPU runs one of the variants."""
        if self._library() is None:
            raise UsageError(
                f"--target {self.name}: expected a CPU that runs it, found one that runs {_variants_here()}",
                fix="--target cpu",
                param="target",
            )

    def check_machine(self, modules: Mapping[str, KernelFile], refuse: Refuse) -> None:
        """This CPU runs one of the variants, and the libraries agree with this version about everything they share."""
        if self._library() is None:
            expected = f"a CPU that runs {', '.join(self.name.archs)}"
            refuse("target", expected, f"one that runs {_variants_here()}", target="cpu")
        library = f"kernels/{self._library()}.so"
        if library not in modules:  # it would be opened unchecked
            refuse("kernel_files", library, ", ".join(modules) or "none")
        expected = current_digest()
        for path, module in modules.items():
            if module.abi != expected:
                refuse(f"kernel_files.{path}.abi", expected, module.abi or "none")

    def kernel_build(self) -> str:
        """Another variant than the library's, where the system refuses what that needs."""
        if self._library() != library_name(VARIANTS[0]) or not (refusal := tile_refusal()):
            return ""
        return f"{NEXT} ({refusal})"

    def covers(self, archs: Iterable[str]) -> bool:
        """A variant goes by its short name as well: avx2 for x86_64-avx2."""
        return set(archs) <= {name for arch in self.name.archs for name in (arch, arch.rpartition("-")[2])}

    def adapter_bytes(self, graph: Graph, options: BuildOptions, lora: LoraLimits) -> int:
        """See ``adapters.slots_bytes``."""
        return slots_bytes(graph, linear_formats(graph, options), lora.slots, _lora_dtype(options))

    def context_bytes(self) -> int:
        """Nothing."""
        return 0

    def memory_budget(self, utilization: float | None = None) -> MemoryBudget:
        """A share of the machine's memory."""
        return host_budget()

    def open_runtime(self, engine: RuntimeEngine, threads: int | None = None) -> Runtime:
        """A CpuRuntime on the fastest library that this CPU runs; by default a thread a physical core."""
        from llmctl.targets.cpu.packing import engine_weights
        from llmctl.targets.cpu.runtime import CpuRuntime

        return CpuRuntime(
            engine.graph,
            engine_weights(engine.graph, engine.options, engine.weights),
            self.library(engine.path),
            engine.sizes,
            kv_dtype=DTYPES[engine.options.kv_cache_dtype].tag,
            threads=threads or physical_cores(),
            lora_dtype=_lora_dtype(engine.options),
        )

    def open_profiler(
        self, engine: RuntimeEngine, places: ProfilePlaces, threads: int | None = None, *, from_source: bool = False
    ) -> StepProfiler:
        """On the library that the engine would run; see ``profiling.py``."""
        from llmctl.targets.cpu.profiling import open_profiler

        library = self.library(engine.path)
        return open_profiler(
            engine, library, places.scratch, places.cache, threads or physical_cores(), from_source=from_source
        )

    def library(self, engine: Path) -> Path:
        """The fastest of an engine's libraries that this CPU runs; the machine has been checked."""
        name = self._library()
        assert name is not None, "check_machine came before"
        return engine / "kernels" / f"{name}.so"

    def _library(self) -> str | None:
        return next((n for v in supported_variants(cpu_features()) if (n := library_name(v)) in self.name.archs), None)


def parse(archs: str) -> Target:
    """The target of a ``--target cpu[:…]``: the variants named, or the best one here; without a C++ compiler, none.

    Raises:
        UsageError: a variant that does not exist.
    """
    if not archs:
        if find_compiler() is None:
            return UncompiledCpu(TargetName("cpu"))
        return CpuTarget(TargetName("cpu", (library_name(supported_variants(cpu_features())[0]),)))
    known = {alias: library_name(v) for v in VARIANTS for alias in (v.name.rpartition("-")[2], library_name(v))}
    wanted = archs.split(",")
    unknown = [name for name in wanted if name not in known]
    if unknown:
        short = ", ".join(v.name.rpartition("-")[2] for v in VARIANTS)
        raise UsageError(f"--target cpu: expected some of {short}, found '{unknown[0]}'", param="target")
    chosen = {known[name] for name in wanted}
    return CpuTarget(TargetName("cpu", tuple(library_name(v) for v in VARIANTS if library_name(v) in chosen)))


def offer() -> Offer:
    """Every machine has a CPU."""
    return Offer("cpu")


def named(name: TargetName) -> Target:
    """The target that a manifest records."""
    return CpuTarget(name) if name.archs else UncompiledCpu(name)


def _lora_dtype(options: BuildOptions) -> str:
    """Of adapters' matrices where operands are floats: exact in an exact engine."""
    return "f32" if options.dtype == "float32" else "bf16"


def _variants_here() -> str:
    return ", ".join(library_name(v) for v in supported_variants(cpu_features()))
