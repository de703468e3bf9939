"""The Target protocol: the whole of what the rest of the house may ask of a device, and the records that go with it.

A target is a kind (``cpu``) and what it is built for there (``x86_64-avx2``). ``table.py`` makes one of a ``--target``
or of what an engine's manifest names; nobody asks which one he has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from llmctl.config import GPU_MEMORY_UTILIZATION, BuildConfig
from llmctl.engine.step import LoraLimits, Runtime
from llmctl.graph.graph import Graph
from llmctl.graph.kv_groups import KVGroup
from llmctl.targets.planes import Describe, Plane, PlanesByWeight, WeightPlane
from llmctl.targets.step_work import StepProfiler

if TYPE_CHECKING:
    from torch import Tensor

    from llmctl.checkpoint.quantized import QuantizedWeight

FALLBACK = "torch"
"""The kernel name of an op that a runtime executes with torch's own operators."""
LM_HEADS = ("dense", "int8", "int4")
"""The ways to store an output head that ``--lm-head`` names."""
RUN_OPTIONS = ("threads", "gpu_memory_utilization", "enforce_eager")
"""The options of a run that mean something to some targets only; fields of EngineRequest."""


@dataclass(frozen=True)
class TargetName:
    """A target as a manifest records it and ``--target`` spells it: ``cpu:x86_64-avx2``, ``cuda:sm_80,sm_90``."""

    kind: str
    archs: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind}:{','.join(self.archs)}" if self.archs else self.kind

    def has_kind_of(self, text: str) -> bool:
        """Whether a ``--target`` names one of the same kind."""
        return text.partition(":")[0] == self.kind


@dataclass(frozen=True)
class BuildOptions:
    """What an engine was built for.

    Attributes:
        dtype: dtype the model computes in. max_model_len: longest sequence, tokens.
        block_size: tokens a KV block. kv_cache_dtype: dtype of the KV cache.
        passes: graph passes, in order. lm_head: how a dense output head is stored, one of ``LM_HEADS``.
    """

    dtype: str
    max_model_len: int
    block_size: int
    kv_cache_dtype: str
    passes: tuple[str, ...]
    lm_head: str = "dense"


@dataclass(frozen=True)
class Refusal:
    """A candidate that did not take an op, and why."""

    kernel: str
    reason: str


@dataclass(frozen=True)
class KernelChoice:
    """What executes one op.

    Attributes:
        op: the op's name.
        kernel: candidate that took it, or ``FALLBACK``.
        entries: entry points in the compiled modules. sources: files those are compiled from.
        max_rows: rows of input up to which the kernel serves, beyond which ``FALLBACK`` does; 0 means any number.
        refused: the other candidates for this kind of op.
    """

    op: str
    kernel: str
    entries: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    max_rows: int = 0
    refused: tuple[Refusal, ...] = ()


@dataclass(frozen=True)
class KernelResources:
    """What one kernel uses on one architecture, as its compiler reports it: registers a thread, bytes a block or
    thread."""

    name: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int


@dataclass(frozen=True)
class KernelFile:
    """One compiled module: what made it, for which architecture, and what each of its kernels uses.

    ``abi``: digest of what host code and module must agree on; "" where the sources' hashes stand for that.
    """

    arch: str
    compiler: str
    flags: tuple[str, ...]
    sources: tuple[str, ...]
    resources: tuple[KernelResources, ...]
    abi: str = ""


@dataclass(frozen=True)
class Module:
    """A compiled module: its path below ``kernels/``, its bytes, its record."""

    path: str
    code: bytes
    record: KernelFile


@dataclass(frozen=True)
class RuntimeSizes:
    """What a runtime is sized for.

    Attributes:
        num_blocks: KV blocks. block_size: tokens a block. max_model_len: longest sequence, tokens.
        max_num_batched_tokens, max_num_seqs: tokens and sampled rows of the largest step.
        enforce_eager: launch every kernel by itself, record no step for replay.
        gpu_memory_utilization: share of the device's memory that the engine may take in all.
        lora: adapters that requests may run with; None: none.
        kv_groups: which layers share a block table; none given: all.
    """

    num_blocks: int
    block_size: int
    max_model_len: int
    max_num_batched_tokens: int
    max_num_seqs: int
    enforce_eager: bool = False
    gpu_memory_utilization: float = GPU_MEMORY_UTILIZATION
    lora: LoraLimits | None = None
    kv_groups: tuple[KVGroup, ...] = ()


@dataclass(frozen=True)
class StepLimits:
    """The largest step: tokens computed, requests that run at once (and rows that are sampled)."""

    max_num_batched_tokens: int
    max_num_seqs: int


@dataclass(frozen=True)
class MemoryBudget:
    """What an engine may plan with.

    Attributes:
        size: bytes. source: where they come from, for people. shared: other programs live in that memory too.
    """

    size: int
    source: str
    shared: bool


@dataclass(frozen=True)
class Offer:
    """A room's answer to whether a model should be built for it on this machine.

    Attributes:
        spelling: the ``--target``. said: a line for the terminal; "" where there is nothing to say.
        missing: what keeps a device that is there from being used; "" when it can be.
    """

    spelling: str
    said: str = ""
    missing: str = ""


@dataclass(frozen=True)
class ProfilePlaces:
    """Folders of a profiler: ``scratch`` for its own files, ``cache`` of compiled kernels."""

    scratch: Path
    cache: Path


@dataclass(frozen=True)
class Finding:
    """What a room says of this machine, for ``llmctl doctor``.

    Attributes:
        name: of what. found: what there is of it. problem: what does not work for want of it; "": nothing.
        fix: what to do about a problem.
    """

    name: str
    found: str
    problem: str = ""
    fix: str = ""


class RuntimeEngine(Protocol):
    """What a runtime is opened from; ``artifact.loader.LoadedEngine`` is one."""

    @property
    def path(self) -> Path:
        """The engine's folder."""
        ...

    @property
    def graph(self) -> Graph:
        """The operator graph."""
        ...

    @property
    def options(self) -> BuildOptions:
        """What it was built for."""
        ...

    @property
    def weights(self) -> Mapping[str, WeightPlane]:
        """Planes by name."""
        ...

    @property
    def sizes(self) -> RuntimeSizes:
        """What it is to run with."""
        ...


class Refuse(Protocol):
    """How a check refuses an engine: the field, what was expected and found, the build options that mend it."""

    def __call__(self, field: str, expected: object, found: object, **changes: Any) -> NoReturn: ...


Read = Callable[[], "Tensor | QuantizedWeight"]
"""Reads a weight out of the checkpoint."""
PlaneContent = Any
"""An array, a torch tensor, or a function that makes one when its turn to be written comes."""
CompileProgress = Callable[[str, int, int], None]
"""Called when compiling begins and after each module: (module, done, in all)."""


class Target(Protocol):
    """One target. Options and engines that it cannot serve it refuses in words, before any work."""

    @property
    def name(self) -> TargetName:
        """Kind and architectures."""
        ...

    @property
    def run_options(self) -> frozenset[str]:
        """Those of ``RUN_OPTIONS`` that its engines honour."""
        ...

    @property
    def niceness(self) -> int:
        """How much nicer a worker is than the process that answers clients, unless its user says otherwise.

        More than 0 where it computes on the processors that both have.
        """
        ...

    @property
    def step_limits(self) -> StepLimits:
        """The largest step of a run that names none."""
        ...

    # what is built

    def graph_passes(self, names: tuple[str, ...] | None, activations: str) -> tuple[str, ...]:
        """The passes of a build.

        Args:
            names: those asked for; None: the target's own. activations: ``auto`` or ``int8``.

        Raises:
            UsageError: a pass that the target does not take.
        """
        ...

    def options(self, config: BuildConfig, graph: Graph, checkpoint_dtype: str) -> BuildOptions:
        """Every "auto" resolved. ``config.max_model_len`` is within the model's limit.

        Raises:
            UsageError: an option that the target cannot honour.
        """
        ...

    def rebuild_options(self, built: BuildOptions) -> dict[str, Any]:
        """The ``llmctl build`` options that lead to ``built`` again, by field of BuildConfig; None: leave it out."""
        ...

    def choose_kernels(self, graph: Graph, options: BuildOptions) -> tuple[KernelChoice, ...]:
        """What executes each op, in execution order, with the reasons of all that refused."""
        ...

    def kv_cache_dtypes(self, options: BuildOptions) -> tuple[str, ...]:
        """What the KV cache of an engine that was built so may be made of when it runs."""
        ...

    def lm_heads(self, graph: Graph, options: BuildOptions) -> tuple[str, ...]:
        """The ``LM_HEADS`` among which ``--lm-head`` decides for this graph; empty when it decides nothing."""
        ...

    # how weights are stored

    def planes(self, graph: Graph, options: BuildOptions, describe: Describe | None = None) -> PlanesByWeight:
        """The planes that an engine holds.

        Args:
            describe: the checkpoint's tensors, which settle what is open; None: every dtype a plane may have.
        """
        ...

    def pack(
        self, name: str, read: Read, planes: Sequence[Plane], graph: Graph, options: BuildOptions
    ) -> dict[str, PlaneContent]:
        """The planes of one weight, by plane name."""
        ...

    def code_bits(self, name: str, graph: Graph, options: BuildOptions) -> int | None:
        """What a code of a quantized weight takes in an engine; None where its numbers are stored, not its codes."""
        ...

    # what it takes to run

    def resident_bytes(self, graph: Graph, options: BuildOptions, planes: Iterable[Plane]) -> int:
        """Bytes the weights take when the engine runs."""
        ...

    def kv_bytes_per_token(self, graph: Graph, options: BuildOptions) -> int:
        """Bytes of keys and values of one token over all layers, as the runtime lays them out."""
        ...

    def kv_groups(self, graph: Graph) -> tuple[KVGroup, ...]:
        """Which layers share a block table in its runtimes; those with a window let go of blocks."""
        ...

    def activation_bytes(self, graph: Graph, options: BuildOptions, tokens: int, rows: int) -> int:
        """Peak bytes of everything else in one step of ``tokens`` tokens and ``rows`` sampled rows."""
        ...

    def adapter_bytes(self, graph: Graph, options: BuildOptions, lora: LoraLimits) -> int:
        """Bytes of the slots for adapters.

        Args:
            graph: a ``lora_graph`` of these adapters.

        Raises:
            UsageError: adapters that the target cannot add to this graph.
        """
        ...

    def context_bytes(self) -> int:
        """Bytes that the device takes for running anything at all."""
        ...

    def memory_budget(self, utilization: float | None = None) -> MemoryBudget:
        """What an engine may plan with.

        Args:
            utilization: share of the device's memory, where ``run_options`` has ``gpu_memory_utilization``; None: the
                default.
        """
        ...

    # kernels

    def compile(
        self, choices: Sequence[KernelChoice], cache: Path, progress: CompileProgress | None = None
    ) -> list[Module]:
        """The modules that the chosen kernels are in, compiled or out of the cache.

        Raises:
            CompileError: no compiler, or sources that do not compile.
        """
        ...

    def source_hashes(self, choices: Sequence[KernelChoice]) -> dict[str, str]:
        """Kernel source file -> sha256 of it and all it includes, as this version has them."""
        ...

    def try_modules(self, paths: Sequence[Path]) -> None:
        """Load modules that this machine can load, so that no broken one is published.

        Raises:
            CompileError: one that does not load.
        """
        ...

    # running

    def check_runs_here(self) -> None:
        """Refuse, before it is built, an engine that this machine could not run.

        Raises:
            UsageError: naming what is missing.
        """
        ...

    def check_machine(self, modules: Mapping[str, KernelFile], refuse: Refuse) -> None:
        """Hold an engine's modules against this machine: features, capability, driver, ABI. Loads nothing."""
        ...

    def kernel_build(self) -> str:
        """As ``Runtime.kernels``, of this machine and without a runtime; the machine has been checked."""
        ...

    def covers(self, archs: Iterable[str]) -> bool:
        """Whether it is built for every one of these."""
        ...

    def open_runtime(self, engine: RuntimeEngine, threads: int | None = None) -> Runtime:
        """The runtime of a checked engine.

        Args:
            threads: CPU threads; None: the target's default.

        Raises:
            EngineLoadError, DeviceError: it does not load here after all.
        """
        ...

    def open_profiler(
        self, engine: RuntimeEngine, places: ProfilePlaces, threads: int | None = None, *, from_source: bool = False
    ) -> StepProfiler:
        """As ``open_runtime``, with what takes its steps apart.

        Args:
            from_source: run the kernels that this version would compile in place of the engine's own.

        Raises:
            UsageError: ``from_source`` where an engine's kernels are all that there is.
            CompileError: what measures the machine does not compile.
        """
        ...
