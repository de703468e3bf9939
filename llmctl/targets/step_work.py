"""The least that a step must do on any device: bytes read, multiply-adds. What profiles hold its time against."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from llmctl.engine.step import Runtime, SamplingBatch, StepPlan
from llmctl.graph.experts import multiplications
from llmctl.graph.graph import PRODUCTS, Graph, KVLayer

Span = tuple[int, int]
"""Tokens of a sequence before a step, and tokens that the step adds."""


@dataclass(frozen=True)
class Work:
    """What one step must do at least.

    Attributes:
        weight_bytes: weights read once. kv_bytes: keys and values read.
        int_macs: multiply-adds of linears with integer weights and of attention over an int8 cache.
        float_macs: the others.
    """

    weight_bytes: int
    kv_bytes: int
    int_macs: int
    float_macs: int

    @property
    def bytes(self) -> int:
        """Everything read."""
        return self.weight_bytes + self.kv_bytes


@dataclass(frozen=True)
class Storage:
    """How a runtime stores what a step reads.

    Attributes:
        weights: bytes of a product's weight by its name. integer: those whose products are of integers.
        kv_bytes: of one token's keys and values in a layer. kv_integer: whether attention multiplies integers.
    """

    weights: Mapping[str, int]
    integer: frozenset[str]
    kv_bytes: Callable[[KVLayer], int]
    kv_integer: bool = False


def least_work(graph: Graph, storage: Storage, spans: Sequence[Span], experts: float = 1.0) -> Work:
    """The least work of a step of sequences that add ``spans[i][1]`` tokens to ``spans[i][0]``; each samples once.

    Args:
        experts: share of the experts' weights that are of experts that some token chose.
    """
    tokens = sum(added for _, added in spans)
    weight_bytes = int_macs = float_macs = kv_bytes = 0
    on_rows = False
    for op in graph.ops:
        on_rows = on_rows or op.kind == "gather_rows"
        if op.kind in PRODUCTS:
            name = op.weights[0]
            stored = storage.weights[name]
            weight_bytes += stored if op.kind == "linear" else round(experts * stored)
            macs = multiplications(graph, op) * (len(spans) if on_rows else tokens)
            if name in storage.integer:
                int_macs += macs
            else:
                float_macs += macs
        elif op.kind == "attention":
            layer, window = graph.kv[int(op.attrs["layer"])], int(op.attrs.get("window", 0))
            for before, added in spans:
                first = max(0, before + 1 - window) if window else 0
                kv_bytes += (before + added - first) * storage.kv_bytes(layer)
                seen = [min(before + i + 1, window or before + i + 1) for i in range(added)]
                macs = 2 * sum(seen) * int(op.attrs["heads"]) * layer.head_dim
                if storage.kv_integer:
                    int_macs += macs
                else:
                    float_macs += macs
    return Work(weight_bytes, kv_bytes, int_macs, float_macs)


@dataclass(frozen=True)
class Bounds:
    """What the machine can do, measured: bytes read a second, multiply-adds a second of integers and of floats.

    None: not measured on this target.
    """

    read: float
    int_macs: float | None = None
    float_macs: float | None = None

    def microseconds(self, work: Work) -> dict[str, float]:
        """The least time by bound: ``read``, ``int8``, ``float``; those that are measured and not zero."""
        found = {"read": work.bytes / self.read * 1e6}
        for name, macs, rate in (("int8", work.int_macs, self.int_macs), ("float", work.float_macs, self.float_macs)):
            if rate is not None and macs:
                found[name] = macs / rate * 1e6
        return found


class StepProfiler(Protocol):
    """A runtime whose steps can be taken apart, and what the machine under it can do."""

    @property
    def runtime(self) -> Runtime:
        """What runs the steps."""
        ...

    @property
    def facts(self) -> Mapping[str, object]:
        """What ran, for the result: the variant of the kernels, threads, the device."""
        ...

    @property
    def parts(self) -> str:
        """What ``step`` tells the time of: ``op`` (kinds of op) or ``kernel``."""
        ...

    def work(self, spans: Sequence[Span], plan: StepPlan, sampling: SamplingBatch) -> Work:
        """The least work of a step. May run it."""
        ...

    def bounds(self, work: Work) -> Bounds:
        """Measure the machine on as many bytes as a step reads."""
        ...

    def big_read(self) -> float:
        """Bytes a second of reading what no cache holds."""
        ...

    def step(self, plan: StepPlan, sampling: SamplingBatch) -> tuple[float, dict[str, float]]:
        """Run a step to its end: microseconds of all of it, and of its parts."""
        ...

    def close(self) -> None:
        """Close the runtime."""
        ...
