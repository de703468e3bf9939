"""Where a cpu step's time goes: kinds of op as the first thread saw them, and loops that measure the machine."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmctl.engine.step import SamplingBatch, StepPlan
from llmctl.graph.dtypes import DTYPES
from llmctl.graph.graph import PRODUCTS, Graph
from llmctl.targets.base import RuntimeEngine
from llmctl.targets.cpu.layout import PackedLinear, kv_layer_bytes
from llmctl.targets.cpu.packing import engine_weights
from llmctl.targets.cpu.runtime import CpuRuntime
from llmctl.targets.cpu.toolchain import SOURCE_DIR, VARIANTS, Variant, compile_library, library_name
from llmctl.targets.step_work import Bounds, Span, Storage, Work, least_work

PROBES = SOURCE_DIR / "probe.cpp"
BIG = 2**30
"""Bytes that no cache holds."""
_INT8_ROUNDS = 1 << 17


def step_work(
    graph: Graph, linears: Mapping[str, PackedLinear], kv_dtype: str, spans: Sequence[Span], experts: float = 1.0
) -> Work:
    """The least work of a step on packed weights; see ``least_work``."""
    storage = Storage(
        {name: packed.nbytes for name, packed in linears.items()},
        frozenset(name for name, packed in linears.items() if packed.integer),
        lambda layer: kv_layer_bytes(layer, DTYPES[kv_dtype].tag),
        kv_dtype == "int8",
    )
    return least_work(graph, storage, spans, experts)


class Probes:
    """The machine's limits, measured by the loops of ``native/probe.cpp``, compiled for a variant."""

    def __init__(self, library: ctypes.CDLL, threads: int) -> None:
        self._read, self._int8 = library.probe_read, library.probe_int8
        self._read.restype = self._int8.restype = ctypes.c_double
        self._read.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int)
        self._int8.argtypes = (ctypes.c_int64, ctypes.c_int)
        self._threads = threads
        self._buffer: NDArray[np.uint8] = np.zeros(0, np.uint8)

    def read(self, size: int) -> float:
        """Bytes a second of one pass over ``size`` bytes: the best of 1, 2, 4 and 8 streams a thread."""
        if self._buffer.nbytes < size:
            self._buffer = np.ones(size, np.uint8)
        address = self._buffer.ctypes.data
        return max(float(self._read(address, size, self._threads, streams)) for streams in (1, 2, 4, 8))

    def int8(self) -> float:
        """int8 multiply-adds a second."""
        return float(self._int8(_INT8_ROUNDS, self._threads))


def compile_probes(variant: Variant, scratch: Path, cache: Path) -> ctypes.CDLL:
    """The probes' library, compiled with a variant's flags into ``scratch``."""
    path = scratch / "probe.so"
    path.write_bytes(compile_library(variant, cache=cache, source=PROBES).code)
    return ctypes.CDLL(str(path))


class CpuProfiler:
    """A ``StepProfiler`` on a CpuRuntime. ``parts`` are kinds of op."""

    parts = "op"

    def __init__(self, engine: RuntimeEngine, runtime: CpuRuntime, probes: Probes) -> None:
        self.engine, self.runtime, self.probes = engine, runtime, probes
        self.linears = dict(engine_weights(engine.graph, engine.options, engine.weights).linears)
        self.facts: Mapping[str, object] = {"variant": runtime.variant, "threads": runtime.threads}

    def work(self, spans: Sequence[Span], plan: StepPlan, sampling: SamplingBatch) -> Work:
        """See ``StepProfiler``; runs the step where the graph has experts."""
        experts = self.experts_read(plan, sampling)
        return step_work(self.engine.graph, self.linears, self.engine.options.kv_cache_dtype, spans, experts)

    def bounds(self, work: Work) -> Bounds:
        """By loops that only read, and that only multiply int8 in registers."""
        return Bounds(self.probes.read(work.bytes), self.probes.int8())

    def big_read(self) -> float:
        """Over ``BIG`` bytes."""
        return self.probes.read(BIG)

    def step(self, plan: StepPlan, sampling: SamplingBatch) -> tuple[float, dict[str, float]]:
        """See ``StepProfiler``; what is in no kind is sampling and Python."""
        self.runtime.profile()
        start = time.perf_counter()
        self.runtime.execute(plan, sampling)
        return (time.perf_counter() - start) * 1e6, self.runtime.profile()

    def close(self) -> None:
        """Stop the threads."""
        self.runtime.close()

    def experts_read(self, plan: StepPlan, sampling: SamplingBatch) -> float:
        """The share of the experts' weights that a step reads, as the kernels count."""
        sizes = dict.fromkeys(PRODUCTS, 0)
        for op in self.engine.graph.products():
            sizes[op.kind] += self.linears[op.weights[0]].data.nbytes
        if not sizes["grouped_linear"]:
            return 1.0
        self.runtime.weight_bytes()
        self.runtime.execute(plan, sampling)
        return (self.runtime.weight_bytes() - sizes["linear"]) / sizes["grouped_linear"]


def open_profiler(
    engine: RuntimeEngine, library: Path, scratch: Path, cache: Path, threads: int, *, from_source: bool
) -> CpuProfiler:
    """A profiler on the library that the engine would run, or on this version's kernels, compiled.

    Raises:
        CompileError: no compiler for the probes, or sources that do not compile.
    """
    variant = next(v for v in VARIANTS if library_name(v) == library.stem)
    if from_source:
        library = scratch / f"{library_name(variant)}.so"
        library.write_bytes(compile_library(variant, cache=cache).code)
    runtime = CpuRuntime(
        engine.graph,
        engine_weights(engine.graph, engine.options, engine.weights),
        library,
        replace(engine.sizes, lora=None),
        kv_dtype=DTYPES[engine.options.kv_cache_dtype].tag,
        threads=threads,
    )
    return CpuProfiler(engine, runtime, Probes(compile_probes(variant, scratch, cache), runtime.threads))
