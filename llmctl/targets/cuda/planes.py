"""How quantized weights lie in an engine for the CUDA kernels: ``W.tiles``, ``W.tile_scales``, ``W.tile_zeros`` (absent
when symmetric) and ``W.permutation`` (only with act-order); see ``layout``.

Every linear is stored so, unless the kernels cannot take its format: then it keeps the planes of ``targets.planes``.
Dense weights are as there, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.graph.graph import Graph
from llmctl.targets.cuda.gemm import weight_format
from llmctl.targets.cuda.layout import CudaFormat, CudaLinear, from_planes, pack
from llmctl.targets.planes import Plane


def cuda_formats(graph: Graph) -> dict[str, CudaFormat]:
    """Stored format by weight name, for every quantized weight that the kernels take."""
    formats = {}
    for op in graph.linears():
        weight = graph.weights[op.weights[0]]
        if weight.quant is None:
            continue
        try:
            formats[weight.name] = weight_format(weight, gated="epilogue" in op.attrs)
        except ValueError:
            continue  # the registry records the reason
    return formats


def cuda_planes(graph: Graph, planes: Mapping[str, tuple[Plane, ...]]) -> dict[str, tuple[Plane, ...]]:
    """Planes by weight name: those given, but for the weights that are stored for the kernels."""
    formats = cuda_formats(graph)
    return {
        name: tuple(Plane(f"{name}.{s}", shape, (dtype,)) for s, (dtype, shape) in formats[name].planes().items())
        if name in formats
        else found
        for name, found in planes.items()
    }


def pack_planes(weight: QuantizedWeight, fmt: CudaFormat) -> dict[str, NDArray[Any]]:
    """The planes of one weight, by suffix."""
    g_idx = None if weight.g_idx is None else weight.g_idx.numpy()
    return pack(weight.codes.numpy(), weight.scales.numpy(), weight.zeros.numpy(), fmt, g_idx).planes()


def packed_linears(graph: Graph, planes: Mapping[str, NDArray[Any]]) -> dict[str, CudaLinear]:
    """Every packed weight over an engine's planes (plane name -> array)."""
    return {
        name: from_planes(fmt, {suffix: planes[f"{name}.{suffix}"] for suffix in fmt.planes()})
        for name, fmt in cuda_formats(graph).items()
    }
