"""Where a step of the reference runtime spends its time: every op timed, and torch's own reads and products."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from math import prod

import torch

from llmctl.engine.step import SamplingBatch, StepPlan
from llmctl.graph.graph import Op
from llmctl.targets.base import RuntimeEngine
from llmctl.targets.reference.context import Env, StepContext
from llmctl.targets.reference.interpreter import Bound
from llmctl.targets.reference.runtime import ReferenceRuntime
from llmctl.targets.step_work import Bounds, Span, Storage, Work, least_work

BIG = 2**28
"""Bytes that no cache holds."""
_LEAST = 2**16
_SIDE = 512
"""Rows and columns of the matrices whose product is timed."""


class ReferenceProfiler:
    """A ``StepProfiler`` on a ReferenceRuntime. ``parts`` are kinds of op. Experts count as all read."""

    parts = "op"

    def __init__(self, engine: RuntimeEngine, runtime: ReferenceRuntime) -> None:
        self.engine, self.runtime = engine, runtime
        interpreter = runtime.interpreter
        self._dtype = interpreter.dtype
        self._times: dict[str, float] = {}
        for op in interpreter.graph.ops:
            interpreter.override(op.name, self._timed(op, interpreter.bound(op.name)))
        self.facts: Mapping[str, object] = {
            "variant": f"torch {torch.__version__}, {engine.options.dtype}",
            "threads": torch.get_num_threads(),
        }
        size = self._dtype.itemsize
        weights = {op.weights[0]: prod(engine.graph.weights[op.weights[0]].shape) * size for op in _products(engine)}
        self._storage = Storage(weights, frozenset(), lambda layer: 2 * layer.kv_heads * layer.head_dim * size)

    def work(self, spans: Sequence[Span], plan: StepPlan, sampling: SamplingBatch) -> Work:  # noqa: ARG002
        """See ``StepProfiler``: dense weights in the compute dtype."""
        return least_work(self.engine.graph, self._storage, spans)

    def bounds(self, work: Work) -> Bounds:
        """By a sum over as many bytes, and a product of square matrices in the compute dtype."""
        return Bounds(_read(work.bytes), float_macs=self._products_a_second())

    def big_read(self) -> float:
        """Over ``BIG`` bytes."""
        return _read(BIG)

    def step(self, plan: StepPlan, sampling: SamplingBatch) -> tuple[float, dict[str, float]]:
        """See ``StepProfiler``; what is in no kind is sampling and Python between ops."""
        self._times.clear()
        start = time.perf_counter()
        self.runtime.execute(plan, sampling)
        return (time.perf_counter() - start) * 1e6, dict(self._times)

    def close(self) -> None:
        """Drop weights and cache."""
        self.runtime.close()

    def _timed(self, op: Op, run: Bound) -> Bound:
        def timed(env: Env, ctx: StepContext) -> None:
            start = time.perf_counter()
            run(env, ctx)
            self._times[op.kind] = self._times.get(op.kind, 0.0) + (time.perf_counter() - start) * 1e6

        return timed

    def _products_a_second(self) -> float:
        matrix = torch.ones(_SIDE, _SIDE, dtype=self._dtype)
        return _SIDE**3 / _best_seconds(lambda: matrix @ matrix)


def _products(engine: RuntimeEngine) -> list[Op]:
    return list(engine.graph.products())


def _read(size: int) -> float:
    data = torch.ones(max(_LEAST, size) // 4, dtype=torch.float32)
    return data.nbytes / _best_seconds(data.sum)


def _best_seconds(run: Callable[[], object], times: int = 3) -> float:
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best
