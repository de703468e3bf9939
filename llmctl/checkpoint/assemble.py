"""A Graph's weights out of a checkpoint: parts sliced, turned and concatenated; dense or quantized."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

from llmctl.checkpoint.accounting import Contents, Unused, account, name_some, refuse_foreign
from llmctl.checkpoint.quantized import QuantizedWeight, stack_rows
from llmctl.checkpoint.unknown_family import refuse_unknown_family
from llmctl.errors import CheckpointError
from llmctl.graph.families import build_graph
from llmctl.graph.graph import Graph, Weight, WeightPart

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

_LARGEST_HALF = 65504.0  # the greatest finite float16


class WeightSource(Protocol):
    """What ``assemble`` needs of a ``checkpoint.reader.Checkpoint``."""

    def weight(self, name: str) -> Tensor | QuantizedWeight: ...


class GraphSource(WeightSource, Contents, Protocol):
    """What ``checkpoint_graph`` needs of a ``checkpoint.reader.Checkpoint``."""


def checkpoint_graph(checkpoint: GraphSource) -> Graph:
    """The plain Graph of a checkpoint, its quantization included; as ``accounted_graph``."""
    return accounted_graph(checkpoint)[0]


def accounted_graph(checkpoint: GraphSource) -> tuple[Graph, tuple[Unused, ...]]:
    """The same, and the tensors of the checkpoint that it does not use: every one is accounted for.

    Raises:
        As ``unknown_family.refuse_unknown_family``, ``build_graph`` and ``accounting.account``.
    """
    refuse_foreign(checkpoint)
    refuse_unknown_family(checkpoint)
    graph = build_graph(
        checkpoint.config,
        lambda name: checkpoint.describe(name) if checkpoint.has(name) else None,
        lambda one, other: _same(checkpoint.weight(one), checkpoint.weight(other)),
    )
    unused = account(checkpoint, graph)
    for kind in unused:
        if kind.notable:
            log.warning("not used: %s: %s", kind.reason, name_some(kind.names))
    return graph, unused


def names_of(unused: Iterable[Unused]) -> list[str]:
    """What anything made from the checkpoint leaves out."""
    return [name for kind in unused for name in kind.names]


def _same(one: Tensor | QuantizedWeight, other: Tensor | QuantizedWeight) -> bool:
    """Whether two weights hold the same numbers; a quantized one is never taken to."""
    import torch

    if isinstance(one, QuantizedWeight) or isinstance(other, QuantizedWeight) or one.shape != other.shape:
        return False
    return torch.equal(one, other.to(one.dtype)) and torch.equal(one.to(other.dtype), other)


def assemble(weight: Weight, source: WeightSource, dtype: str | None = None) -> Tensor | QuantizedWeight:
    """One Weight of a Graph, in the checkpoint's dtype; it may be a view of the checkpoint's memory.

    Its values are looked at once, on the way to whoever packs or quantizes them: one that is not finite would turn
    every output into noise.

    Args:
        dtype: what it will be computed in, if that is known: values beyond it are refused, too.

    Raises:
        CheckpointError: a part is not what the Weight says: dense or quantized, scheme, shape; or it holds a value that
            is not finite, or too large for ``dtype``.
    """
    parts = [_part(part, weight, source) for part in weight.parts]
    for part, found_part in zip(weight.parts, parts, strict=True):
        check_finite(part.tensor, found_part, dtype)
    if _all_quantized(parts):
        found: Tensor | QuantizedWeight = _concat_quantized(parts)
    else:
        found = _concat_dense([p for p in parts if not isinstance(p, QuantizedWeight)])
    if tuple(found.shape) != weight.shape:
        tensors = ", ".join(p.tensor for p in weight.parts)
        raise CheckpointError(f"checkpoint: {tensors}: expected shape {list(weight.shape)}, found {list(found.shape)}")
    return found


def check_finite(name: str, weight: Tensor | QuantizedWeight, dtype: str | None = None) -> None:
    """Refuse a weight (of a quantized one, its scales and minimums) whose values are not finite, or not in ``dtype``.

    Raises:
        CheckpointError: naming the tensor.
    """
    if isinstance(weight, QuantizedWeight):
        module = name.removesuffix(".weight")
        check_finite(f"{module}.scales", weight.scales, dtype)
        if weight.minimums is not None:
            check_finite(f"{module}.minimums", weight.minimums, dtype)
        return
    if not weight.numel() or not weight.is_floating_point():
        return
    low, high = weight.aminmax()  # either is NaN if any value is; one pass, and no copy as of isfinite()
    largest = max(abs(float(low)), abs(float(high)))
    if not (low.isfinite() and high.isfinite()):
        odd = int(weight.numel() - weight.isfinite().sum())
        raise CheckpointError(
            f"checkpoint: tensor '{name}': {odd} of {weight.numel()} values are not finite (infinity or NaN)",
            fix="fetch the checkpoint again, or have it written anew",
        )
    if dtype == "float16" and largest > _LARGEST_HALF:
        raise CheckpointError(
            f"checkpoint: tensor '{name}': a value of {largest:g} is too large for float16",
            fix="use --dtype bfloat16",
        )


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
