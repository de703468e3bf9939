"""How a Graph's weights lie in an engine: which planes each has, their shapes and dtypes.

A dense Weight ``W`` is one tensor ``W``. A quantized one is ``W.codes`` (u8; up to 4 bits: two codes a byte, the low
nibble is the even column, [N, ceil(K/2)]; 8 bits: [N, K]), ``W.scales`` (F16 or F32 [N, G]), ``W.zeros`` (u8 [N, G];
absent when symmetric) and ``W.g_idx`` (I32 [K]; only with act-order).

Dense weights are stored in the engine's dtype, except for the target ``reference``, which keeps the checkpoint's own
(a float32 copy of a bfloat16 weight holds nothing more): float64 and mixed parts become F32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from llmctl.artifact.manifest import Target
from llmctl.checkpoint.safetensors_io import numpy_dtype
from llmctl.graph.graph import Graph, QuantScheme, Weight

SAFETENSORS_DTYPE = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_KEPT = ("F32", "F16", "BF16")


class Described(Protocol):
    """What is asked of a checkpoint tensor's description."""

    @property
    def dtype(self) -> str:
        """safetensors dtype of the tensor, or of the scales of a quantized weight."""
        ...


@dataclass(frozen=True)
class Plane:
    """One stored tensor. ``dtypes``: the safetensors dtypes it may have; one once it is settled."""

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]

    @property
    def dtype(self) -> str:
        """The (widest) dtype it may have."""
        return self.dtypes[0]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * numpy_dtype(self.dtype).itemsize


def dense_dtypes(target_kind: str, dtype: str) -> tuple[str, ...]:
    """The safetensors dtypes a dense weight may be stored in."""
    return _KEPT if target_kind == "reference" else (SAFETENSORS_DTYPE[dtype],)


def expected_planes(graph: Graph, dense: tuple[str, ...]) -> dict[str, tuple[Plane, ...]]:
    """The planes that an engine of ``graph`` must hold, by weight name; ``dense``: dtypes a dense weight may have."""
    return {weight.name: weight_planes(weight, dense, ("F32", "F16")) for weight in graph.weights.values()}


def settle_planes(
    graph: Graph, dense: tuple[str, ...], describe: Callable[[str], Described]
) -> dict[str, tuple[Plane, ...]]:
    """Planes by weight name with the dtypes the checkpoint's tensors lead to; from headers only."""
    return {
        name: weight_planes(
            weight, _settle_dense(dense, stored := {describe(p.tensor).dtype for p in weight.parts}), _scales(stored)
        )
        for name, weight in graph.weights.items()
    }


def weight_planes(weight: Weight, dense: tuple[str, ...], scales: tuple[str, ...]) -> tuple[Plane, ...]:
    """The planes of one weight; ``dense`` and ``scales``: the dtypes those may have."""
    if weight.quant is None:
        return (Plane(weight.name, weight.shape, dense),)
    rows, columns = weight.shape
    scheme, groups = weight.quant, weight.quant.groups(columns)
    planes = [
        Plane(f"{weight.name}.codes", (rows, code_bytes(scheme, columns)), ("U8",)),
        Plane(f"{weight.name}.scales", (rows, groups), scales),
    ]
    if not scheme.symmetric:
        planes.append(Plane(f"{weight.name}.zeros", (rows, groups), ("U8",)))
    if scheme.act_order:
        planes.append(Plane(f"{weight.name}.g_idx", (columns,), ("I32",)))
    return tuple(planes)


def code_bytes(scheme: QuantScheme, columns: int) -> int:
    """Bytes of one row of codes."""
    return columns if scheme.bits == 8 else (columns + 1) // 2


def total_bytes(planes: Iterable[Plane]) -> int:
    """Size of all planes together, bytes."""
    return sum(plane.nbytes for plane in planes)


def resident_bytes(graph: Graph, target: Target, dtype: str, planes: Iterable[Plane]) -> int:
    """Bytes the weights take when the engine runs. Cuda and native CPU engines compute from the stored planes; the
    reference runtime holds every weight dense in ``dtype``."""
    if target.kind == "cuda" or target.native_cpu:
        return total_bytes(planes)
    return sum(math.prod(weight.shape) for weight in graph.weights.values()) * DTYPE_BYTES[dtype]


def flat(planes: Mapping[str, tuple[Plane, ...]]) -> dict[str, Plane]:
    """Planes by their own name, of planes by weight name."""
    return {plane.name: plane for group in planes.values() for plane in group}


def _settle_dense(dense: tuple[str, ...], stored: set[str]) -> tuple[str, ...]:
    if len(dense) == 1:
        return dense
    only = next(iter(stored)) if len(stored) == 1 else ""
    return (only if only in dense else "F32",)


def _scales(stored: set[str]) -> tuple[str, ...]:
    return ("F16",) if stored == {"F16"} else ("F32",)
