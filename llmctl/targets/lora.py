"""LoRA adapters as every target takes them: where in a graph they act, and what of an adapter is whose.

An engine is built without adapters. Who opens it to serve some inserts an op behind every linear that PEFT can name,
for adapters of the largest rank: on which of them a given adapter acts is then a matter of its weights alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmctl.checkpoint.adapters.adapter import Adapter, LowRank
from llmctl.engine.step import LoraLimits
from llmctl.errors import UnsupportedModelError, UsageError
from llmctl.graph.graph import Graph, Op
from llmctl.graph.lora import insert_lora

if TYPE_CHECKING:
    from torch import Tensor

_RANK_MULTIPLE = 8
"""Slots are padded to it: what a vector of every target's kernels holds."""


@dataclass(frozen=True)
class AdapterPart:
    """What an adapter adds in one op: ``scale * (x @ a.T) @ b.T``; a float32 [rank, in], b float32 [rows, rank]."""

    a: Tensor
    b: Tensor
    scale: float


def lora_graph(graph: Graph, lora: LoraLimits) -> Graph:
    """A built graph with an op for adapters behind every linear of its layers.

    Raises:
        UsageError: linears that take int8 activations, which adapters could not read.
    """
    try:
        return insert_lora(graph, None, padded_rank(lora))
    except ValueError as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(
            "--enable-lora: expected an engine with float activations, found one with int8 activations",
            fix="build it without --activations int8",
            param="enable_lora",
        ) from error


def padded_rank(lora: LoraLimits) -> int:
    """Rank of a slot."""
    return -(-lora.rank // _RANK_MULTIPLE) * _RANK_MULTIPLE


def lora_ops(graph: Graph) -> list[Op]:
    """The ops of adapters, in execution order."""
    return [op for op in graph.ops if op.kind == "lora"]


def slot_elements(graph: Graph) -> int:
    """Elements of the matrices of one slot over all ops of a ``lora_graph``."""
    return sum(op.attrs["rank"] * (graph.buffers[op.inputs[0]].width + op.attrs["rows"]) for op in lora_ops(graph))


def parts_of(graph: Graph, adapter: Adapter, lora: LoraLimits) -> Mapping[str, AdapterPart]:
    """What an adapter adds in each op of a ``lora_graph``, by the op's name; ops that it leaves alone are not there.

    Raises:
        UnsupportedModelError: it does more than that, has a larger rank, or acts on a module that no op holds.
    """
    adapter.check_unmerged()
    by_module = {part.module: part for part in adapter.parts}
    found: dict[str, AdapterPart] = {}
    acted: set[str] = set()
    for op in lora_ops(graph):
        part = by_module.get(op.attrs["module"])
        if part is not None:
            _check_rank(adapter, part, lora)
            first = op.attrs["first_row"]
            found[op.name] = AdapterPart(part.a, part.b[first : first + op.attrs["rows"]], part.scale)
            acted.add(part.module)
    if by_module.keys() - acted:
        raise UnsupportedModelError(
            f"adapter {adapter.path}: acts on '{min(by_module.keys() - acted)}', which is no linear of a layer; only "
            "when it is merged",
            fix=adapter.merge_fix,
        )
    return found


def check_representable(adapter: Adapter, module: str, *matrices: Tensor) -> None:
    """Refuse an adapter whose matrices, in the dtype that they are served in, are not finite.

    Raises:
        UnsupportedModelError: naming the dtype.
    """
    for matrix in matrices:
        if not bool(matrix.isfinite().all()):
            dtype = str(matrix.dtype).removeprefix("torch.")
            raise UnsupportedModelError(
                f"adapter {adapter.path}: '{module}' has values too large for {dtype}, which the engine computes in",
                fix=adapter.merge_fix if dtype == "float32" else "build the engine with --dtype float32",
            )


def _check_rank(adapter: Adapter, part: LowRank, lora: LoraLimits) -> None:
    if part.rank > lora.rank:
        raise UnsupportedModelError(
            f"adapter {adapter.path}: expected a rank of at most {lora.rank}, found {part.rank} of '{part.module}'",
            fix=f"--max-lora-rank {adapter.rank}",
        )
