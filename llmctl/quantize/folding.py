"""Where AWQ's channel scales go: found by following the Graph's dataflow backwards, never by names.

Linears that read buffer X may have their columns multiplied by ``s`` if whatever produces X can be divided by ``s``:
a norm (its weight and bias), or another linear (its rows and bias), reached through ops that a positive scale per
channel passes through: ``mul`` (one factor suffices), ReLU, and attention (from its values; query heads that share a kv
head share its scales).
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llmctl.graph.experts import as_linears
from llmctl.graph.graph import PRODUCTS, Graph, Op


@dataclass(frozen=True)
class FoldPoint:
    """A buffer whose channels may be scaled.

    Attributes:
        buffer: the buffer X.
        linears: all its readers.
        source: the norm or linear that takes ``1/s``.
        columns: for each channel of X, the channel (row) of the source behind it; None when they are the same.
    """

    buffer: str
    linears: tuple[Op, ...]
    source: Op
    columns: tuple[int, ...] | None = None

    def column_index(self, device: torch.device | str = "cpu") -> Tensor | None:
        """``columns`` as an i64 tensor."""
        return None if self.columns is None else torch.tensor(self.columns, device=device)


def find_fold(graph: Graph, buffer: str) -> FoldPoint | None:
    """The fold point of a buffer in a plain Graph (experts apart), None where scales cannot be folded."""
    consumers = graph.consumers(buffer)
    readers = tuple(linear for op in consumers for linear in as_linears(op))
    width = graph.buffers[buffer].width
    if not readers or any(op.kind not in PRODUCTS for op in consumers):
        return None
    if any(graph.weights[op.weights[0]].shape[1] != width for op in readers):
        return None  # a row an expert, each of which has its own scales: see experts.expert_layer
    found = _trace(graph, buffer)
    if found is None:
        return None
    source, columns = found
    used = [w for op in graph.ops for w in op.weights if w]
    if any(used.count(w) > 1 for w in source.weights if w):
        return None  # shared with another op, which must not change
    return FoldPoint(buffer, readers, source, None if columns == list(range(width)) else tuple(columns))


def _trace(graph: Graph, buffer: str) -> tuple[Op, list[int]] | None:
    """The op that can take a scale of ``buffer``, and its channel behind each channel of ``buffer``."""
    op = graph.producer(buffer)
    if op is None:
        return None
    if op.kind in ("rms_norm", "layer_norm", "linear"):
        return op, list(range(graph.buffers[buffer].width))
    if op.kind == "act" and op.attrs["fn"] == "relu":
        return _trace_private(graph, op.inputs[0], op)
    if op.kind == "mul" and op.inputs[0] != op.inputs[1]:  # a square would square the scale
        paths = (_trace_private(graph, factor, op) for factor in op.inputs)
        return next((path for path in paths if path is not None), None)
    if op.kind == "attention":
        return _trace_values(graph, op)
    return None


def _trace_private(graph: Graph, buffer: str, reader: Op) -> tuple[Op, list[int]] | None:
    """``_trace``, if nobody but ``reader`` sees the buffer and only a linear can take its scale."""
    if graph.consumers(buffer) != (reader,):
        return None
    found = _trace(graph, buffer)
    return found if found is not None and found[0].kind == "linear" else None


def _trace_values(graph: Graph, attention: Op) -> tuple[Op, list[int]] | None:
    layer = attention.attrs["layer"]
    writers = [op for op in graph.ops if op.kind == "kv_write" and op.attrs["layer"] == layer]
    readers = [op for op in graph.ops if op.kind == "attention" and op.attrs["layer"] == layer]
    if len(writers) != 1 or len(readers) != 1:
        return None
    found = _trace_private(graph, writers[0].inputs[1], writers[0])
    if found is None:
        return None
    source, value_channels = found
    heads, kv_heads, dim = (int(attention.attrs[key]) for key in ("heads", "kv_heads", "head_dim"))
    per_head = [(h // (heads // kv_heads)) * dim + d for h in range(heads) for d in range(dim)]
    return source, [value_channels[c] for c in per_head]


def fold_scales(point: FoldPoint, scales: Tensor, weights: MutableMapping[str, Tensor]) -> set[str]:
    """Multiply the readers' columns by ``scales`` and divide the source by them; names of the weights changed.

    Args:
        scales: f32 ``[width of the buffer]``, positive, equal where ``point.columns`` are.
        weights: graph weight name -> f32 tensor; changed entries are replaced.
    """
    for op in point.linears:
        weights[op.weights[0]] = weights[op.weights[0]] * scales
    divisor = scales
    columns = point.column_index(scales.device)
    if columns is not None:
        divisor = scales.new_ones(int(columns.max()) + 1).index_copy_(0, columns, scales)
    weight, *bias = point.source.weights
    if point.source.kind == "linear":
        weights[weight] = weights[weight] / divisor.unsqueeze(1)
    elif point.source.attrs.get("plus_one"):
        weights[weight] = (weights[weight] + 1) / divisor - 1
    else:
        weights[weight] = weights[weight] / divisor
    for name in filter(None, bias):
        weights[name] = weights[name] / divisor
    return {*(op.weights[0] for op in point.linears), weight, *filter(None, bias)}
