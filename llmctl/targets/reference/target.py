"""The reference target: engines that plain torch runs, on any machine."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from llmctl.config import BuildConfig
from llmctl.engine.step import LoraLimits, Runtime
from llmctl.errors import UsageError
from llmctl.graph.dtypes import COMPUTE_DTYPES, DTYPES
from llmctl.graph.graph import Graph
from llmctl.graph.kv_groups import KVGroup, kv_groups
from llmctl.graph.passes import DEFAULT_PASSES, PASSES
from llmctl.targets.address_space import check_torch
from llmctl.targets.base import (
    FALLBACK,
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
    StepLimits,
    Target,
    TargetName,
)
from llmctl.targets.lora import slot_elements
from llmctl.targets.machine import HOST_NICENESS, HOST_STEP, host_budget
from llmctl.targets.options import (
    check_kv_cache_dtype,
    check_lm_head,
    check_passes,
    check_range,
    max_model_len,
    plain_rebuild_options,
)
from llmctl.targets.plain import pack_plain, plain_code_bits, plain_planes
from llmctl.targets.planes import Describe, Plane
from llmctl.targets.step_memory import activation_bytes, kv_bytes_per_token
from llmctl.targets.step_work import StepProfiler

SPELLINGS = ("reference",)


@dataclass(frozen=True)
class ReferenceTarget:
    """Implements ``base.Target`` with torch: no modules, dense weights in the checkpoint's own dtype (a float32 copy of
    a bfloat16 weight holds nothing more)."""

    name: TargetName
    run_options: ClassVar[frozenset[str]] = frozenset({"threads"})
    step_limits: ClassVar[StepLimits] = HOST_STEP
    niceness: ClassVar[int] = HOST_NICENESS

    def graph_passes(self, names: tuple[str, ...] | None, activations: str) -> tuple[str, ...]:
        """Any; ``int8`` activations are a pass at the end."""
        return check_passes(names, activations, DEFAULT_PASSES, tuple(PASSES))

    def options(self, config: BuildConfig, graph: Graph, checkpoint_dtype: str) -> BuildOptions:
        """float32 unless asked otherwise; a KV cache of the same, or of another float type."""
        dtype = check_range("float32" if config.dtype == "auto" else config.dtype, graph, auto=False)
        return BuildOptions(
            dtype,
            max_model_len(config, graph),
            config.block_size,
            self._kv_cache_dtype(config.kv_cache_dtype, dtype),
            graph.passes,
            self._lm_head(config.lm_head),
        )

    def rebuild_options(self, built: BuildOptions) -> dict[str, Any]:
        """All but the head's."""
        return plain_rebuild_options(built, DEFAULT_PASSES)

    def choose_kernels(self, graph: Graph, options: BuildOptions) -> tuple[KernelChoice, ...]:
        """torch, for every op."""
        return tuple(KernelChoice(op.name, FALLBACK) for op in graph.ops)

    def kv_cache_dtypes(self, options: BuildOptions) -> tuple[str, ...]:
        """The one that it was built for."""
        return (options.kv_cache_dtype,)

    def code_bits(self, name: str, graph: Graph, options: BuildOptions) -> int | None:
        """The checkpoint's own."""
        return plain_code_bits(graph.weights[name])

    def lm_heads(self, graph: Graph, options: BuildOptions) -> tuple[str, ...]:
        """None: the head is stored as the checkpoint has it."""
        return ()

    def planes(
        self, graph: Graph, options: BuildOptions, describe: Describe | None = None
    ) -> dict[str, tuple[Plane, ...]]:
        """Plain planes."""
        return plain_planes(graph, self._dense(options), describe)

    def pack(
        self,
        name: str,
        read: Read,
        planes: Sequence[Plane],
        graph: Graph,
        options: BuildOptions,
    ) -> dict[str, PlaneContent]:
        """Plain planes; dense ones when their turn comes."""
        return pack_plain(graph.weights[name], read, planes)

    def resident_bytes(self, graph: Graph, options: BuildOptions, planes: Iterable[Plane]) -> int:
        """Every weight dense in the compute dtype."""
        return sum(math.prod(weight.shape) for weight in graph.weights.values()) * DTYPES[options.dtype].nbytes

    def kv_bytes_per_token(self, graph: Graph, options: BuildOptions) -> int:
        """As the cache's dtype has it."""
        return kv_bytes_per_token(graph, options.kv_cache_dtype)

    def kv_groups(self, graph: Graph) -> tuple[KVGroup, ...]:
        """Layers with a window apart."""
        return kv_groups(graph)

    def activation_bytes(self, graph: Graph, options: BuildOptions, tokens: int, rows: int) -> int:
        """Buffers in the compute dtype."""
        return activation_bytes(graph, options.dtype, tokens, rows)

    def compile(
        self,
        choices: Sequence[KernelChoice],
        cache: Path,
        progress: CompileProgress | None = None,
    ) -> list[Module]:
        """Nothing."""
        return []

    def source_hashes(self, choices: Sequence[KernelChoice]) -> dict[str, str]:
        """None."""
        return {}

    def try_modules(self, paths: Sequence[Path]) -> None:
        """There are none."""

    def check_runs_here(self) -> None:
        """It runs anywhere."""

    def check_machine(self, modules: Mapping[str, KernelFile], refuse: Refuse) -> None:
        """Any machine will do."""

    def kernel_build(self) -> str:
        """The target says it."""
        return ""

    def covers(self, archs: Iterable[str]) -> bool:
        """It is built for no architecture in particular."""
        return not set(archs)

    def adapter_bytes(self, graph: Graph, options: BuildOptions, lora: LoraLimits) -> int:
        """Matrices in the compute dtype."""
        return lora.slots * slot_elements(graph) * DTYPES[options.dtype].nbytes

    def context_bytes(self) -> int:
        """Nothing."""
        return 0

    def memory_budget(self, utilization: float | None = None) -> MemoryBudget:
        """A share of the machine's memory."""
        return host_budget()

    def open_runtime(self, engine: RuntimeEngine, threads: int | None = None) -> Runtime:
        """A ReferenceRuntime; ``threads`` are torch's, for the whole process.

        Raises:
            MissingPackageError, HostMemoryError: no torch, or no address space for it.
        """
        check_torch(f"{engine.path}: running an engine for {self.name}")
        from llmctl.targets.reference.runtime import ReferenceRuntime
        from llmctl.targets.reference.weights import EngineWeights

        return ReferenceRuntime(
            engine.graph,
            EngineWeights(engine.graph, engine.weights),
            num_blocks=engine.sizes.num_blocks,
            block_size=engine.sizes.block_size,
            max_model_len=engine.sizes.max_model_len,
            dtype=engine.options.dtype,
            threads=threads,
            lora=engine.sizes.lora,
            kv_groups=engine.sizes.kv_groups,
        )

    def open_profiler(
        self, engine: RuntimeEngine, places: ProfilePlaces, threads: int | None = None, *, from_source: bool = False
    ) -> StepProfiler:
        """Every op timed; see ``profiling.py``."""
        if from_source:
            raise UsageError("--from-source: an engine without kernels of its own runs on torch", param="from_source")
        runtime = self.open_runtime(engine, threads)
        from llmctl.targets.reference.profiling import ReferenceProfiler
        from llmctl.targets.reference.runtime import ReferenceRuntime

        assert isinstance(runtime, ReferenceRuntime)
        return ReferenceProfiler(engine, runtime)

    def _dense(self, options: BuildOptions) -> tuple[str, ...]:
        """The safetensors dtypes a dense weight may be stored in."""
        return tuple(DTYPES[name].safetensors for name in COMPUTE_DTYPES)

    def _kv_cache_dtype(self, name: str, dtype: str) -> str:
        return check_kv_cache_dtype(name, self.name.kind, dtype, COMPUTE_DTYPES)

    def _lm_head(self, name: str) -> str:
        return check_lm_head(name, f"a {self.name.kind} target")


def parse(archs: str) -> Target:
    """The target of ``--target reference``.

    Raises:
        UsageError: architectures, of which it has none.
    """
    if archs:
        raise UsageError(f"--target reference: expected no architecture, found '{archs}'", param="target")
    return ReferenceTarget(TargetName("reference"))


def named(name: TargetName) -> Target:
    """The target that a manifest records."""
    return ReferenceTarget(name)
