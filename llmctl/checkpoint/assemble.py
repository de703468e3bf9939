"""A Graph's weights out of a checkpoint: parts sliced, turned and concatenated; dense or quantized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

from llmctl.checkpoint.quantized import QuantizedWeight, stack_rows
from llmctl.errors import CheckpointError
from llmctl.graph.families import TensorInfo, build_graph
from llmctl.graph.graph import Graph, Weight, WeightPart

if TYPE_CHECKING:
    from torch import Tensor


class WeightSource(Protocol):
    """What ``assemble`` needs of a ``checkpoint.reader.Checkpoint``."""

    def weight(self, name: str) -> Tensor | QuantizedWeight: ...


class GraphSource(WeightSource, Protocol):
    """What ``checkpoint_graph`` needs of a ``checkpoint.reader.Checkpoint``."""

    config: dict[str, Any]

    def has(self, name: str) -> bool: ...

    def describe(self, name: str) -> TensorInfo: ...


def checkpoint_graph(checkpoint: GraphSource) -> Graph:
    """The plain Graph of a checkpoint, its quantization included; errors as ``build_graph``."""
    return build_graph(checkpoint.config, lambda name: checkpoint.describe(name) if checkpoint.has(name) else None)


def assemble(weight: Weight, source: WeightSource) -> Tensor | QuantizedWeight:
    """One Weight of a Graph, in the checkpoint's dtype; it may be a view of the checkpoint's memory.

    Raises:
        CheckpointError: a part is not what the Weight says: dense or quantized, scheme, shape.
    """
    parts = [_part(part, weight, source) for part in weight.parts]
    if _all_quantized(parts):
        found: Tensor | QuantizedWeight = _concat_quantized(parts)
    else:
        found = _concat_dense([p for p in parts if not isinstance(p, QuantizedWeight)])
    if tuple(found.shape) != weight.shape:
        tensors = ", ".join(p.tensor for p in weight.parts)
        raise CheckpointError(f"checkpoint: {tensors}: expected shape {list(weight.shape)}, found {list(found.shape)}")
    return found


def _part(part: WeightPart, weight: Weight, source: WeightSource) -> Tensor | QuantizedWeight:
    found = source.weight(part.tensor)
    if isinstance(found, QuantizedWeight) and weight.quant is not None and weight.quant.block_rows == 1:
        found = found.by_row()
    scheme = found.scheme if isinstance(found, QuantizedWeight) else None
    if scheme != weight.quant:
        raise CheckpointError(
            f"checkpoint: tensor '{part.tensor}': expected {_describe(weight.quant)}, found {_describe(scheme)}"
        )
    if isinstance(found, QuantizedWeight):
        return found if part.rows is None else found.take_rows(slice(*part.rows))
    found = found.T if part.transpose else found
    return found if part.rows is None else found[part.rows[0] : part.rows[1]]


def _describe(scheme: Any) -> str:
    return "a dense weight" if scheme is None else str(scheme)


def _concat_dense(parts: Sequence[Tensor]) -> Tensor:
    import torch

    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _concat_quantized(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    if len(parts) == 1:
        return parts[0]
    try:
        return stack_rows(parts)
    except ValueError as error:
        raise CheckpointError(f"checkpoint: {error}") from error


def _all_quantized(parts: Sequence[Any]) -> TypeGuard[Sequence[QuantizedWeight]]:
    return all(isinstance(p, QuantizedWeight) for p in parts)
