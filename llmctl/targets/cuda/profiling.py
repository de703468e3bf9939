"""Where a cuda step's time goes: kernels as torch's profiler sees them, whoever launched them; the device's limits."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch.profiler import ProfilerActivity, profile

from llmctl.engine.step import SamplingBatch, StepPlan
from llmctl.graph.dtypes import DTYPES
from llmctl.graph.graph import Graph
from llmctl.targets.base import RuntimeEngine
from llmctl.targets.cuda.runtime import CudaRuntime
from llmctl.targets.planes import PlanesByWeight
from llmctl.targets.step_work import Bounds, Span, Storage, Work, least_work

BIG = 2**30
"""Bytes that no cache holds."""
_LEAST = 2**20
_SIDE = 8192
"""Rows and columns of the matrices whose product is timed."""
_PROFILED = 5


class CudaProfiler:
    """A ``StepProfiler`` on a CudaRuntime. ``parts`` are kernels.

    A step's time is the wall time from its start to its result; kernels are those of steps run before it under the
    profiler, which slows the host and not the device. What is in no kernel is gaps and the host.
    """

    parts = "kernel"

    def __init__(
        self, engine: RuntimeEngine, runtime: CudaRuntime, planes: PlanesByWeight, integer: frozenset[str]
    ) -> None:
        self.engine, self.runtime = engine, runtime
        self.facts: Mapping[str, object] = {"variant": torch.cuda.get_device_name(), "threads": None}
        element = DTYPES[engine.options.kv_cache_dtype].nbytes
        scale = 4 if engine.options.kv_cache_dtype == "int8" else 0
        self._storage = Storage(
            {op.weights[0]: sum(plane.nbytes for plane in planes[op.weights[0]]) for op in engine.graph.products()},
            integer,
            lambda layer: 2 * layer.kv_heads * (layer.head_dim * element + scale),
        )
        self._seen: list[tuple[StepPlan, dict[str, float]]] = []

    def work(self, spans: Sequence[Span], plan: StepPlan, sampling: SamplingBatch) -> Work:
        """See ``StepProfiler``: the engine's packed weights, the cache as it lies on the device; runs the step where
        the graph has experts."""
        share = experts_read(self.engine.graph, self._storage, self.runtime, plan, sampling)
        return least_work(self.engine.graph, self._storage, spans, share)

    def bounds(self, work: Work) -> Bounds:
        """By a sum over as many bytes, and a product of large matrices in the compute dtype on tensor cores."""
        matrix = torch.ones(_SIDE, _SIDE, dtype=getattr(torch, self.engine.options.dtype), device="cuda")
        return Bounds(_read(work.bytes), float_macs=_SIDE**3 / _seconds(lambda: matrix @ matrix))

    def big_read(self) -> float:
        """Over ``BIG`` bytes."""
        return _read(BIG)

    def step(self, plan: StepPlan, sampling: SamplingBatch) -> tuple[float, dict[str, float]]:
        """See ``StepProfiler``."""
        parts = next((parts for seen, parts in self._seen if seen is plan), None)
        if parts is None:
            parts = self._kernels(plan, sampling)
            self._seen.append((plan, parts))
        start = time.perf_counter()
        self.runtime.execute(plan, sampling).result()
        return (time.perf_counter() - start) * 1e6, parts

    def close(self) -> None:
        """Free the device's memory."""
        self.runtime.close()

    def _kernels(self, plan: StepPlan, sampling: SamplingBatch) -> dict[str, float]:
        """Microseconds of a step by kernel."""
        self.runtime.execute(plan, sampling).result()
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            for _ in range(_PROFILED):
                self.runtime.execute(plan, sampling).result()
        return {event.key: event.self_device_time_total / _PROFILED for event in found.key_averages()}


def experts_read(
    graph: Graph, storage: Storage, runtime: CudaRuntime, plan: StepPlan, sampling: SamplingBatch
) -> float:
    """The share of the experts' weights that is of experts that some token of a step chose."""
    grouped = [op for op in graph.products() if op.kind == "grouped_linear"]
    if not grouped:
        return 1.0
    met = runtime.chosen_experts(plan, sampling)
    read = sum(storage.weights[op.weights[0]] * met[op.inputs[1]] / op.attrs["count"] for op in grouped)
    return read / sum(storage.weights[op.weights[0]] for op in grouped)


def _read(size: int) -> float:
    data = torch.ones(max(_LEAST, size) // 4, dtype=torch.float32, device="cuda")
    return data.nbytes / _seconds(data.sum)


def _seconds(run: Callable[[], object], times: int = 5) -> float:
    """The best of some runs on the device; the first, in which libraries wake up, is not among them."""
    run()
    best = float("inf")
    for _ in range(times):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        run()
        ended.record()
        ended.synchronize()
        best = min(best, began.elapsed_time(ended) / 1000)
    return best
