"""A mixture's experts one by one, for what treats each as a linear of its own: quantization, and counts of work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod

from llmctl.graph.graph import Buffer, Graph, Op, Weight


def apart(graph: Graph) -> Graph:
    """A plain graph with a weight an expert in place of every stack of them."""
    weights = dict(graph.weights)
    ops = []
    for op in graph.ops:
        if op.kind != "grouped_linear":
            ops.append(op)
            continue
        stack = weights.pop(op.weights[0])
        shape = (stack.shape[0] // op.attrs["count"], stack.shape[1])
        own = [Weight(f"{op.name}.{e}.weight", shape, (part,), stack.quant) for e, part in enumerate(stack.parts)]
        weights |= {weight.name: weight for weight in own}
        names = tuple(weight.name for weight in own)
        ops.append(op.with_(weights=names, attrs={**op.attrs, "apart": True}))
    return replace(graph, weights=weights, ops=tuple(ops))


def as_linears(op: Op) -> tuple[Op, ...]:
    """A product's linears: itself, or one an expert whose weights are apart, each reading and making a row alone."""
    if op.kind == "linear":
        return (op,)
    if op.kind != "grouped_linear":
        return ()
    return tuple(
        Op("linear", f"{op.name}.{e}", op.inputs[:1], op.outputs, (weight, ""), {}, op.layer)
        for e, weight in enumerate(op.weights)
    )


def linears(graph: Graph) -> Iterator[Op]:
    """All linears of a graph whose experts are apart, each expert's among them, in execution order."""
    return (linear for op in graph.ops for linear in as_linears(op))


def expert_layer(graph: Graph, layer: int, expert: int) -> Graph:
    """A layer as one expert's rows go through it: its grouped linears are that expert's, buffers are one row wide."""
    ops, buffers = [], dict(graph.buffers)
    for op in graph.layer_ops(layer):
        if op.kind == "grouped_linear":
            op = as_linears(op)[expert]
            (made,) = op.outputs
            buffers[made] = Buffer(made, graph.weights[op.weights[0]].shape[0])
        elif op.kind in ("act", "mul"):
            buffers |= {made: Buffer(made, buffers[op.inputs[0]].width) for made in op.outputs}
        ops.append(op)
    return replace(graph, ops=tuple(ops), buffers=buffers)


def multiplications(graph: Graph, op: Op) -> int:
    """Multiplications and additions that a product takes for one token: of experts, those of the ones it chooses."""
    size = sum(prod(graph.weights[name].shape) for name in op.matrices)
    return size if op.kind == "linear" else size * graph.buffers[op.inputs[1]].width // op.attrs["count"]
