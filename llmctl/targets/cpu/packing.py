"""How a Graph's weights lie in an engine for the native CPU kernels: formats, planes, packing, kernel choices.

A linear weight ``W`` is stored as ``W.tiles`` and, for integer formats, ``W.tile_scales``, ``W.tile_zeros`` or
``W.tile_minimums`` (nested: ``W.tile_scale_codes``, ``W.tile_scale_supers``, of a code book ``W.tile_scale_starts``;
``layout.PackedLinear``), and (only with act-order)
``W.permutation``; see ``layout.py``. Norm weights and biases are F32.
Embedding tables are F32, or BF16 in a bfloat16 engine; one that is also the output head is stored both ways, unless the
checkpoint has it quantized: then its rows are looked up in the tiles.

In a ``float32`` engine every linear is dense float32 (for exactness), but for weights of a code book, which meet
float32 activations anyway. In a ``bfloat16`` engine quantized linears multiply their integer codes with int8
activations, dense ones are bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmctl.checkpoint.nested import MappedFloats, NestedFloats
from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.errors import CheckpointError
from llmctl.graph.dtypes import BY_SAFETENSORS, DTYPES
from llmctl.graph.graph import LOGITS, PRODUCTS, Graph, Op, Weight
from llmctl.targets.base import BuildOptions, KernelChoice, Refusal
from llmctl.targets.cpu.layout import (
    BOOK_DTYPES,
    MappedPlane,
    NestedPlane,
    PackedLinear,
    ScaleRangeError,
    int_dtype,
    pack_book,
    pack_dense,
    pack_int,
    padded_columns,
    quantize_symmetric,
    scale_rows,
)
from llmctl.targets.cpu.linear_format import LinearFormat, to_planes
from llmctl.targets.planes import Plane, WeightPlane

if TYPE_CHECKING:
    from torch import Tensor

_HEAD_GROUP = 64
_KERNEL = {
    **{"w4": "w4a8", "w8": "w8a8", "w4_min": "w4a8", "w8_min": "w8a8"},
    **{"bf16": "bf16", "f32": "f32", "e4m3": "e4m3", "book4": "book4"},
}
LM_HEAD_BITS = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class CpuWeights:
    """Weights as the native kernels read them.

    Attributes:
        linears: packed weight by weight name, for every linear op and every packed embedding.
        tables: embeddings by weight name, [V, H]: f32, or u16 with ``table_dtypes`` "bf16" or "f16".
        vectors: norm weights and biases by weight name, f32.
    """

    linears: Mapping[str, PackedLinear]
    tables: Mapping[str, NDArray[Any]]
    table_dtypes: Mapping[str, str]
    vectors: Mapping[str, NDArray[Any]]


def linear_formats(graph: Graph, options: BuildOptions) -> dict[str, LinearFormat]:
    """Stored format by weight name, for every weight that a linear op reads or that is looked up packed."""
    formats = {op.weights[0]: _format(graph.weights[op.weights[0]], op, options) for op in graph.products()}
    lookups = sorted(graph.tables() - formats.keys())
    return formats | {n: _format(graph.weights[n], None, options) for n in lookups if _packs_table(n, graph, options)}


def linear_format(name: str, graph: Graph, options: BuildOptions) -> LinearFormat | None:
    """The format of one weight; None when it is not packed."""
    op = next((op for op in graph.products() if op.weights[0] == name), None)
    if op is None and not (name in graph.tables() and _packs_table(name, graph, options)):
        return None
    return _format(graph.weights[name], op, options)


def dense_tables(graph: Graph, options: BuildOptions) -> set[str]:
    """Weights that are looked up by row and stored so."""
    return {name for name in graph.tables() if not _packs_table(name, graph, options)}


def _packs_table(name: str, graph: Graph, options: BuildOptions) -> bool:
    """Whether rows are looked up in a weight's tiles: integers of the checkpoint's own, columns in order."""
    if graph.weights[name].quant is None:
        return False
    fmt = _format(graph.weights[name], None, options)
    return fmt.integer and not fmt.permuted


def cpu_planes(graph: Graph, options: BuildOptions) -> dict[str, tuple[Plane, ...]]:
    """Planes by weight name."""
    formats = linear_formats(graph, options)
    tables = dense_tables(graph, options)
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
        if op.kind in PRODUCTS
        else KernelChoice(op.name, op.kind)
        for op in graph.ops
    )


def pack_planes(weight: Tensor | QuantizedWeight, name: str, graph: Graph, options: BuildOptions) -> dict[str, Any]:
    """The planes of one weight, by plane name: arrays, or a tensor where the stored dtype is BF16.

    Raises:
        CheckpointError: scales that the target cannot store.
    """
    fmt = linear_format(name, graph, options)
    planes: dict[str, Any] = {}
    if name in dense_tables(graph, options):
        planes[name] = _dense(weight) if options.dtype == "float32" else _dense(weight).bfloat16()
    if fmt is not None:
        try:
            packed = pack_linear(weight, fmt)
        except ScaleRangeError as error:
            raise CheckpointError(f"tensor '{name}': {error}", fix="--target reference") from None
        planes |= {f"{name}.{suffix}": array for suffix, array in to_planes(packed).items()}
    return planes or {name: _dense(weight)}


def pack_linear(weight: Tensor | QuantizedWeight, fmt: LinearFormat) -> PackedLinear:
    """One linear weight in its stored format."""
    if fmt.dtype in ("f32", "bf16"):
        dense = _dense(weight).contiguous()
        if fmt.dtype == "f32":
            return pack_dense(dense.numpy(), "f32", gated=fmt.gated, experts=fmt.experts)
        import torch

        bits: NDArray[Any] = dense.bfloat16().view(torch.int16).numpy().view(np.uint16)
        return pack_dense(bits, "bf16", gated=fmt.gated, experts=fmt.experts)
    if not isinstance(weight, QuantizedWeight):
        bits_wanted = 8 if fmt.dtype == "w8" else 4
        codes, scales = quantize_symmetric(_dense(weight).numpy(), bits_wanted, fmt.group)
        return pack_int(codes, scales, None, bits=bits_wanted, group=fmt.group, gated=fmt.gated)
    weight = weight.by_row()
    codes = weight.codes.numpy()
    if fmt.book:
        return pack_book(
            codes, _book_scales(weight, fmt), book=fmt.book, group=fmt.group, gated=fmt.gated, experts=fmt.experts,
            shared=fmt.scale_rows,
        )  # fmt: skip
    zeros = weight.zeros.numpy()
    assert not fmt.one_zero or (zeros == 1 << (weight.scheme.bits - 1)).all(), "symmetric weights have one zero"
    floats, minimums = _int_scales(weight)
    return pack_int(
        codes, floats, None if fmt.one_zero else zeros, bits=weight.scheme.bits, group=fmt.group,
        gated=fmt.gated, experts=fmt.experts, minimums=minimums,
        g_idx=None if weight.g_idx is None else weight.g_idx.numpy(),
    )  # fmt: skip


def engine_weights(graph: Graph, options: BuildOptions, planes: Mapping[str, WeightPlane]) -> CpuWeights:
    """An engine's planes by the role they play, as they lie in the mapped files: no linear weight is copied."""
    arrays = {name: np.asarray(plane.data).reshape(plane.shape) for name, plane in planes.items()}
    tables = dense_tables(graph, options)
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
    return graph.weights[graph.head].quant is None


def _format(weight: Weight, op: Op | None, options: BuildOptions) -> LinearFormat:
    """``op``: the linear that reads the weight, None where there is none."""
    rows, columns = weight.shape
    gated = op is not None and "epilogue" in op.attrs
    experts = 1 if op is None else int(op.attrs.get("count", 1))
    dense = LinearFormat(DTYPES[options.dtype].tag, (rows, columns), gated, experts=experts)
    scheme = weight.quant
    if scheme is not None and scheme.book and not scheme.act_order:
        kind, parts = BOOK_DTYPES[scheme.bits], len(weight.parts)
        of_book = replace(dense, dtype=kind, group=scheme.group_size, book=scheme.book)
        shared = scale_rows(scheme.block_rows, rows, gated, experts)
        return replace(of_book, nested=scheme.nested, parts=parts, scale_rows=shared)
    if options.dtype == "float32":
        return dense
    if scheme is not None:
        if scheme.book or _group_refusal(columns, scheme.group_size):
            return dense
        kind = int_dtype(scheme.bits, minimum=scheme.minimum)
        order = scheme.act_order
        of_codes = replace(dense, dtype=kind, bits=scheme.bits, nested=scheme.nested, nested_bits=scheme.nested_bits)
        return replace(of_codes, group=scheme.group_size, permuted=order, one_zero=scheme.symmetric)
    if op is not None and LOGITS in op.outputs and options.lm_head in LM_HEAD_BITS:
        kind = "w8" if options.lm_head == "int8" else "w4"
        group = _HEAD_GROUP if columns % _HEAD_GROUP == 0 else -1
        return LinearFormat(kind, (rows, columns), gated, group, one_zero=True)
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
    if scheme.book:
        refused = Refusal(BOOK_DTYPES[scheme.bits], "its columns are out of order: weights are dequantized")
        return (refused,) if scheme.act_order else ()
    kernel = _KERNEL[int_dtype(scheme.bits, minimum=False)]
    if options.dtype == "float32":
        return (Refusal(kernel, "the engine computes in float32: weights are dequantized"),)
    reason = _group_refusal(graph.weights[op.weights[0]].shape[1], scheme.group_size)
    return (Refusal(kernel, f"{reason}: weights are dequantized"),) if reason else ()


def _int_scales(weight: QuantizedWeight) -> tuple[NDArray[Any] | NestedPlane, NDArray[Any] | NestedPlane | None]:
    """Scales and minimums, as they are stored."""
    if weight.nested is None:
        return weight.scales.numpy(), None if weight.minimums is None else weight.minimums.numpy()
    parts = [p for p in weight.nested if isinstance(p, NestedFloats)]
    bits = weight.scheme.nested_bits
    planes = [NestedPlane(part.codes.numpy(), part.supers.numpy(), part.zero, bits) for part in parts]
    return planes[0], planes[1] if weight.scheme.minimum else None


def _book_scales(weight: QuantizedWeight, fmt: LinearFormat) -> NDArray[np.float32] | MappedPlane:
    """Scales of a code book, as they are stored."""
    for part in weight.nested or ():
        if isinstance(part, MappedFloats):
            supers, offsets, starts = part.supers.numpy(), part.offsets.numpy(), part.starts.numpy()
            return MappedPlane(part.codes.numpy(), supers, offsets, starts, part.shared, fmt.room(part.codes.shape[1]))
    return weight.scales.numpy().astype(np.float32)


def _dense(weight: Tensor | QuantizedWeight) -> Tensor:
    return weight.dequantize() if isinstance(weight, QuantizedWeight) else weight.float()
