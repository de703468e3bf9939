"""Which linears adapters act on, and where in their tiles: in a graph adapters are ops behind a linear, the native
kernels make them inside it (``native/lora.h``)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llmctl.graph.graph import Graph, Op
from llmctl.targets.cpu.abi import LANES, MAX_SPLITS, SPLIT


@dataclass(frozen=True)
class Place:
    """Where one op adds to a linear whose packed tiles are halves of 16 outputs.

    Attributes:
        op: the op of adapters. weight: the linear's, by name. first: half that its rows begin in, ``lead`` outputs from
            the half's start.
        stride: from half to half: 2 where gate and up lie side by side.
    """

    op: Op
    weight: str
    first: int
    lead: int
    stride: int

    @property
    def rank(self) -> int:
        """Of a slot in native memory."""
        return -(-int(self.op.attrs["rank"]) // LANES) * LANES

    @property
    def panels(self) -> int:
        """Halves that it adds to."""
        return -(-(self.lead + int(self.op.attrs["rows"])) // LANES)


@dataclass(frozen=True)
class AdaptedLinear:
    """A linear that adapters act on.

    Attributes:
        built: the linear as the engine was built with it: its results are those behind the adapters and the gating.
        places: of its adapters. within: names of the ops that are part of it.
        shared: a result without its adapters is read by another op, too.
    """

    built: Op
    places: tuple[Place, ...]
    within: frozenset[str]
    shared: bool


def adapted_linears(graph: Graph) -> Iterator[AdaptedLinear]:
    """All of a graph, in execution order; none in one without adapters."""
    for index, op in enumerate(graph.ops):
        if op.kind == "linear" and index + 1 < len(graph.ops) and graph.ops[index + 1].kind == "lora":
            yield _adapted(graph, index)


def places(graph: Graph) -> Iterator[Place]:
    """Of every op for adapters."""
    for linear in adapted_linears(graph):
        yield from linear.places


def sum_bytes(columns: int, unit: int, of: tuple[Place, ...]) -> int:
    """Partial sums of one token's row of ``columns``, in whole units: ``LoraShape`` in ``native/lora_shrink.h``."""
    split = -(-max(SPLIT, -(-columns // MAX_SPLITS)) // unit) * unit
    return 4 * -(-columns // split) * sum(place.rank for place in of)


def _adapted(graph: Graph, index: int) -> AdaptedLinear:
    linear, results, adapters = graph.ops[index], list(graph.ops[index].outputs), []
    starts = [sum(graph.buffers[o].width for o in linear.outputs[:i]) for i in range(len(results))]
    shared = False
    for op in graph.ops[index + 1 :]:
        if op.kind != "lora" or op.inputs[1] not in results:
            break
        result = results.index(op.inputs[1])
        adapters.append((op, starts[result] + int(op.attrs["column"])))
        shared = shared or len(graph.consumers(op.inputs[1])) != 1
        results[result] = op.outputs[0]
    gating = _gating(graph, results)
    attrs, half = dict(linear.attrs), 0
    if gating is not None:
        half = graph.buffers[results[0]].width // 2
        attrs["epilogue"], results = f"{gating.attrs['fn']}_mul", list(gating.outputs)
    within = frozenset(op.name for op, _ in adapters) | ({gating.name} if gating else set())
    built = linear.with_(outputs=tuple(results), attrs=attrs)
    found = tuple(_place(op, linear.weights[0], column, half) for op, column in adapters)
    return AdaptedLinear(built, found, within, shared)


def _gating(graph: Graph, results: list[str]) -> Op | None:
    """What a gated linear's epilogue became as adapters came between."""
    readers = graph.consumers(results[0])
    return readers[0] if len(results) == len(readers) == 1 and readers[0].kind == "act_mul" else None


def _place(op: Op, weight: str, column: int, half: int) -> Place:
    """``half``: rows of gate, as many as of up; 0: the linear is not gated."""
    if not half:
        return Place(op, weight, column // LANES, column % LANES, 1)
    up, within = divmod(column, half)
    return Place(op, weight, 2 * (within // LANES) + up, within % LANES, 2)
