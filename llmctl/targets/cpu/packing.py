"""How a Graph's weights lie in an engine for the native CPU kernels: formats, planes, packing, kernel choices.

A linear weight ``W`` is stored as ``W.tiles`` and, for integer formats, ``W.tile_scales``, ``W.tile_zeros`` and (only
with act-order) ``W.permutation``; see ``layout.py``. Norm weights and biases are F32. Embedding tables are F32, or BF16
in a bfloat16 engine; a table that is also the output head is stored both ways.

In a ``float32`` engine every linear is dense float32 (for exactness). In a ``bfloat16`` engine quantized linears
multiply their integer codes with int8 activations, dense ones are bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.graph.dtypes import BY_SAFETENSORS, DTYPES
from llmctl.graph.graph import LOGITS, Graph, Op, Weight
from llmctl.targets.base import BuildOptions, KernelChoice, Refusal
from llmctl.targets.cpu.layout import (
    LinearFormat,
    PackedLinear,
    pack_dense,
    pack_int,
    padded_columns,
    quantize_symmetric,
    to_planes,
)
from llmctl.targets.planes import Plane, WeightPlane

if TYPE_CHECKING:
    from torch import Tensor

_TABLES = frozenset({"embed", "pos_embed"})
_HEAD_GROUP = 64
_KERNEL = {"w4": "w4a8", "w8": "w8a8", "bf16": "bf16", "f32": "f32"}
LM_HEAD_BITS = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class CpuWeights:
    """Weights as the native kernels read them.

    Attributes:
        linears: packed weight by weight name, for every linear op.
        tables: embeddings by weight name, [V, H]: f32, or u16 with ``table_dtypes`` "bf16" or "f16".
        vectors: norm weights and biases by weight name, f32.
    """

    linears: Mapping[str, PackedLinear]
    tables: Mapping[str, NDArray[Any]]
    table_dtypes: Mapping[str, str]
    vectors: Mapping[str, NDArray[Any]]


def linear_formats(graph: Graph, options: BuildOptions) -> dict[str, LinearFormat]:
    """Stored format by weight name, for every weight that a linear op reads."""
    return {op.weights[0]: _format(graph.weights[op.weights[0]], op, options) for op in graph.linears()}


def linear_format(name: str, graph: Graph, options: BuildOptions) -> LinearFormat | None:
    """The format of one weight; None when no linear reads it."""
    op = next((op for op in graph.linears() if op.weights[0] == name), None)
    return None if op is None else _format(graph.weights[name], op, options)


def table_names(graph: Graph) -> set[str]:
    """Weights that are looked up by row."""
    return {op.weights[0] for op in graph.ops if op.kind in _TABLES}


def cpu_planes(graph: Graph, options: BuildOptions) -> dict[str, tuple[Plane, ...]]:
    """Planes by weight name."""
    formats = linear_formats(graph, options)
    tables = table_names(graph)
    planes: dict[str, tuple[Plane, ...]] = {}
    for name, weight in graph.weights.items():
        found: list[Plane] = []
        if name in tables:
            found.append(Plane(name, weight.shape, (DTYPES[options.dtype].safetensors,)))
        if name in formats:
            found += [Plane(f"{name}.{s}", shape, (d,)) for s, (d, shape) in formats[name].planes().items()]
        planes[name] = tuple(found) or (Plane(name, weight.shape, ("F32",)),)
    return planes


def cpu_choices(graph: Graph, options: BuildOptions) -> tuple[KernelChoice, ...]:
    """What executes each op: all run in one native call; a linear's kernel follows from its stored format."""
    formats = linear_formats(graph, options)
    return tuple(
        KernelChoice(op.name, _KERNEL[formats[op.weights[0]].dtype], refused=_refusals(graph, op, options))
        if op.kind == "linear"
        else KernelChoice(op.name, op.kind)
        for op in graph.ops
    )


def pack_planes(weight: Tensor | QuantizedWeight, name: str, graph: Graph, options: BuildOptions) -> dict[str, Any]:
    """The planes of one weight, by plane name: arrays, or a tensor where the stored dtype is BF16."""
    fmt = linear_format(name, graph, options)
    planes: dict[str, Any] = {}
    if name in table_names(graph):
        planes[name] = _dense(weight) if options.dtype == "float32" else _dense(weight).bfloat16()
    if fmt is not None:
        packed = pack_linear(weight, fmt)
        planes |= {f"{name}.{suffix}": array for suffix, array in to_planes(packed).items()}
    return planes or {name: _dense(weight)}


def pack_linear(weight: Tensor | QuantizedWeight, fmt: LinearFormat) -> PackedLinear:
    """One linear weight in its stored format."""
    if not fmt.integer:
        dense = _dense(weight).contiguous()
        if fmt.dtype == "f32":
            return pack_dense(dense.numpy(), "f32", gated=fmt.gated)
        import torch

        bits: NDArray[Any] = dense.bfloat16().view(torch.int16).numpy().view(np.uint16)
        return pack_dense(bits, "bf16", gated=fmt.gated)
    if not isinstance(weight, QuantizedWeight):
        bits_wanted = 8 if fmt.dtype == "w8" else 4
        codes, scales, zeros = quantize_symmetric(_dense(weight).numpy(), bits_wanted, fmt.group)
        return pack_int(codes, scales, zeros, bits=bits_wanted, group=fmt.group, gated=fmt.gated)
    g_idx = weight.g_idx.numpy() if weight.g_idx is not None else None
    return pack_int(
        weight.codes.numpy(), weight.scales.numpy(), weight.zeros.numpy(),
        bits=weight.scheme.bits, group=fmt.group, gated=fmt.gated, g_idx=g_idx,
    )  # fmt: skip


def engine_weights(graph: Graph, options: BuildOptions, planes: Mapping[str, WeightPlane]) -> CpuWeights:
    """An engine's planes by the role they play, as they lie in the mapped files: no linear weight is copied."""
    arrays = {name: np.asarray(plane.data).reshape(plane.shape) for name, plane in planes.items()}
    tables = table_names(graph)
    return CpuWeights(
        linears=packed_linears(graph, options, arrays),
        tables={name: arrays[name] for name in tables},
        table_dtypes={name: BY_SAFETENSORS[planes[name].dtype].tag for name in tables},
        vectors={name: arrays[name] for name in graph.weights if name in arrays and name not in tables},
    )


def packed_linears(graph: Graph, options: BuildOptions, planes: Mapping[str, NDArray[Any]]) -> dict[str, PackedLinear]:
    """Every linear's packed weight over an engine's planes (plane name -> array)."""
    result = {}
    for name, fmt in linear_formats(graph, options).items():
        result[name] = fmt.from_planes({suffix: planes[f"{name}.{suffix}"] for suffix in fmt.planes()})
    return result


def has_dense_head(graph: Graph) -> bool:
    """Whether the checkpoint leaves the output head dense."""
    head = next(op.weights[0] for op in graph.linears() if LOGITS in op.outputs)
    return graph.weights[head].quant is None


def _format(weight: Weight, op: Op, options: BuildOptions) -> LinearFormat:
    rows, columns = weight.shape
    gated = "epilogue" in op.attrs
    dense = LinearFormat(DTYPES[options.dtype].tag, (rows, columns), gated)
    if options.dtype == "float32":
        return dense
    scheme = weight.quant
    if scheme is not None:
        if _group_refusal(columns, scheme.group_size):
            return dense
        kind = "w8" if scheme.bits == 8 else "w4"
        return LinearFormat(kind, (rows, columns), gated, scheme.group_size, scheme.act_order)
    if LOGITS in op.outputs and options.lm_head in LM_HEAD_BITS:
        kind = "w8" if options.lm_head == "int8" else "w4"
        return LinearFormat(kind, (rows, columns), gated, _HEAD_GROUP if columns % _HEAD_GROUP == 0 else -1)
    return dense


def _group_refusal(columns: int, group: int) -> str | None:
    try:
        padded_columns(columns, group)
    except ValueError as error:
        return str(error)
    return None


def _refusals(graph: Graph, op: Op, options: BuildOptions) -> tuple[Refusal, ...]:
    scheme = graph.weights[op.weights[0]].quant
    if scheme is None:
        return ()
    kernel = "w8a8" if scheme.bits == 8 else "w4a8"
    if options.dtype == "float32":
        return (Refusal(kernel, "the engine computes in float32: weights are dequantized"),)
    reason = _group_refusal(graph.weights[op.weights[0]].shape[1], scheme.group_size)
    return (Refusal(kernel, f"{reason}: weights are dequantized"),) if reason else ()


def _dense(weight: Tensor | QuantizedWeight) -> Tensor:
    return weight.dequantize() if isinstance(weight, QuantizedWeight) else weight.float()
