"""A Graph's weights out of a checkpoint: parts sliced, turned and concatenated; dense or quantized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

from llmctl.checkpoint.quantized import QuantizedWeight
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
    scheme = found.scheme if isinstance(found, QuantizedWeight) else None
    if scheme != weight.quant:
        raise CheckpointError(
            f"checkpoint: tensor '{part.tensor}': expected {_describe(weight.quant)}, found {_describe(scheme)}"
        )
    if isinstance(found, QuantizedWeight):
        return found if part.rows is None else _quantized_rows(found, part.rows)
    found = found.T if part.transpose else found
    return found if part.rows is None else found[part.rows[0] : part.rows[1]]


def _describe(scheme: Any) -> str:
    return "a dense weight" if scheme is None else str(scheme)


def _quantized_rows(weight: QuantizedWeight, rows: tuple[int, int]) -> QuantizedWeight:
    take = slice(*rows)
    return QuantizedWeight(weight.codes[take], weight.scales[take], weight.zeros[take], weight.scheme, weight.g_idx)


def _concat_dense(parts: Sequence[Tensor]) -> Tensor:
    import torch

    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _concat_quantized(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    import torch

    first = parts[0]
    if len(parts) == 1:
        return first
    if any(p.scheme != first.scheme or p.g_idx is not None for p in parts):
        raise CheckpointError("checkpoint: quantized weights of different schemes, or with act-order, cannot be merged")
    planes: Mapping[str, Tensor] = {
        name: torch.cat([getattr(p, name) for p in parts]) for name in ("codes", "scales", "zeros")
    }
    return QuantizedWeight(planes["codes"], planes["scales"], planes["zeros"], first.scheme)


def _all_quantized(parts: Sequence[Any]) -> TypeGuard[Sequence[QuantizedWeight]]:
    return all(isinstance(p, QuantizedWeight) for p in parts)
