"""How weights lie in an engine for the CUDA kernels: of a quantized one ``W.tiles``, ``W.tile_scales``,
``W.tile_zeros`` (absent when symmetric) or ``W.tile_minimums``, ``W.tile_book`` (only of a code book of 16 values) and
``W.permutation`` (only with act-order); see ``layout.py``.

Every quantized linear, and stack of experts, is stored so, unless the kernels cannot take its format: then its planes
are plain ones (``targets/plain.py``), as those of dense weights are, in the compute dtype; the biases that correct a
router's scores are float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.errors import CheckpointError
from llmctl.graph.dtypes import DTYPES
from llmctl.graph.graph import Graph, QuantScheme
from llmctl.targets.base import BuildOptions, PlaneContent, Read
from llmctl.targets.cuda.gemm import product_format
from llmctl.targets.cuda.layout import CudaFormat, CudaLinear, from_planes, pack
from llmctl.targets.plain import pack_plain, plain_planes
from llmctl.targets.planes import Describe, Plane


def cuda_format(name: str, graph: Graph) -> CudaFormat | None:
    """The packed format of a weight; None where the kernels do not take it (the registry records why)."""
    weight = graph.weights[name]
    op = next((op for op in graph.products() if op.weights[0] == name), None)
    if op is None or weight.quant is None:
        return None
    try:
        return product_format(op, graph)
    except ValueError:
        return None


def cuda_formats(graph: Graph) -> dict[str, CudaFormat]:
    """Stored format by weight name, for every quantized weight that the kernels take."""
    names = dict.fromkeys(op.weights[0] for op in graph.products())
    return {name: fmt for name in names if (fmt := cuda_format(name, graph)) is not None}


def dequantized_bytes(graph: Graph, dtype: str) -> int:
    """What ``fallback.dequantized`` makes at the start of the quantized weights that the kernels do not take."""
    formats, element = cuda_formats(graph), DTYPES[dtype].nbytes
    packed = (w for name, w in graph.weights.items() if w.quant is not None and name not in formats)
    return sum(math.prod(weight.shape) * element for weight in packed)


def cuda_planes(graph: Graph, options: BuildOptions, describe: Describe | None) -> dict[str, tuple[Plane, ...]]:
    """Planes by weight name; ``describe`` as for ``plain_planes``."""
    formats, biases = cuda_formats(graph), _router_biases(graph)
    found = plain_planes(graph, (DTYPES[options.dtype].safetensors,), describe)
    for name, fmt in formats.items():
        found[name] = tuple(Plane(f"{name}.{s}", shape, (dtype,)) for s, (dtype, shape) in fmt.planes().items())
    for name in biases:
        found[name] = tuple(replace(plane, dtypes=("F32",)) for plane in found[name])
    return found


def _router_biases(graph: Graph) -> set[str]:
    """What corrects a router's scores: in 16 bits it would make ties, which the first expert wins."""
    return {op.weights[0] for op in graph.ops if op.kind == "route" and op.weights[0]}


def pack_cuda(name: str, read: Read, planes: Sequence[Plane], graph: Graph) -> dict[str, PlaneContent]:
    """The planes of one weight, by plane name.

    Raises:
        CheckpointError: scales, or groups of act-order, that the kernels cannot take.
    """
    fmt = cuda_format(name, graph)
    if fmt is None:
        return pack_plain(graph.weights[name], read, planes)
    weight = read()
    assert isinstance(weight, QuantizedWeight)
    try:
        return {f"{name}.{suffix}": array for suffix, array in pack_weight(weight, fmt).items()}
    except ValueError as error:
        raise CheckpointError(f"tensor '{name}': {error}", fix="--target reference") from None


def pack_weight(weight: QuantizedWeight, fmt: CudaFormat) -> dict[str, NDArray[Any]]:
    """The packed planes of one weight, by suffix."""
    weight = weight.by_row()
    g_idx = None if weight.g_idx is None else weight.g_idx.numpy()
    minimums = None if weight.minimums is None else weight.minimums.numpy()
    codes, added = weight.codes.numpy(), codes_added(fmt, weight.scheme)
    if added:
        codes = codes + np.uint8(added)
    return pack(codes, weight.scales.numpy(), weight.zeros.numpy(), fmt, g_idx, minimums).planes()


def codes_added(fmt: CudaFormat, scheme: QuantScheme) -> int:
    """What is added to symmetric codes of fewer bits than they are stored in: the kernels know one zero a width."""
    return (1 << (fmt.bits - 1)) - (1 << (scheme.bits - 1)) if fmt.symmetric and not fmt.book else 0


def packed_linears(graph: Graph, planes: Mapping[str, NDArray[Any]]) -> dict[str, CudaLinear]:
    """Every packed weight over an engine's planes (plane name -> array)."""
    return {
        name: from_planes(fmt, {suffix: planes[f"{name}.{suffix}"] for suffix in fmt.planes()})
        for name, fmt in cuda_formats(graph).items()
    }
