"""The parts that a model's size is told by: embeddings, attention, MLP, output head, and the little that is left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from llmctl.checkpoint.reader import Checkpoint
from llmctl.graph.experts import linears
from llmctl.graph.graph import Graph, Op

PARTS = ("embeddings", "attention", "mlp", "head", "norms and biases")


@dataclass(frozen=True)
class PartSize:
    """Bytes of one part: at 16 bits a weight, and as they are stored now."""

    size_16bit: int
    size_after: int


def part_sizes(graph: Graph, written: Checkpoint) -> dict[str, PartSize]:
    """The size of each part that a model has, in the order of ``PARTS``.

    A tensor counts once, by its first use: a head that is tied to the embeddings is no part of its own, and one that no
    longer is was nothing before.

    Args:
        graph: of the model before. written: the checkpoint made of it.
    """
    part_of = _parts(graph)
    tensors: dict[str, str] = {}
    sizes = {name: [0, 0] for name in PARTS}
    for weight in graph.weights.values():
        for part in weight.parts:
            tensors.setdefault(part.tensor, part_of.get(weight.name, PARTS[-1]))
    if "lm_head.weight" not in tensors and written.has("lm_head.weight"):
        sizes["head"][1] = written.describe("lm_head.weight").nbytes
    for tensor, name in tensors.items():
        stored = written.describe(tensor)
        sizes[name][0] += 2 * prod(stored.shape)
        sizes[name][1] += stored.nbytes
    return {name: PartSize(*size) for name, size in sizes.items() if any(size)}


def _parts(graph: Graph) -> Mapping[str, str]:
    """Weight -> part, of tables and linears' matrices."""
    attention = _attention_linears(graph)
    found = dict.fromkeys(graph.tables(), "embeddings")
    for op in linears(graph):
        part = "attention" if op.name in attention else "head" if op.layer == graph.num_layers else "mlp"
        found.setdefault(op.weights[0], part)
    return found


def _attention_linears(graph: Graph) -> set[str]:
    """Linears that make queries, keys and values, or that read what attention gives; found by following buffers."""
    found: set[str] = set()
    for op in graph.ops:
        if op.kind in ("attention", "kv_write"):
            for buffer in op.inputs:
                found |= {linear.name for linear in _linears_behind(graph, graph.producer(buffer))}
        if op.kind == "attention":
            found |= {reader.name for reader in graph.consumers(op.outputs[0]) if reader.kind == "linear"}
    return found


def _linears_behind(graph: Graph, op: Op | None) -> list[Op]:
    if op is None or op.kind == "linear":
        return [] if op is None else [op]
    return [linear for buffer in op.inputs for linear in _linears_behind(graph, graph.producer(buffer))]
