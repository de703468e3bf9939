"""Planes: the tensors in which a weight is stored in an engine. Which they are, each target's room says."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from llmctl.graph.dtypes import BY_SAFETENSORS


class Described(Protocol):
    """What is asked of a checkpoint tensor's description."""

    @property
    def dtype(self) -> str:
        """safetensors dtype of the tensor, or of the scales of a quantized weight."""
        ...


Describe = Callable[[str], Described]
"""A checkpoint tensor's description by its name."""


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
        return math.prod(self.shape) * BY_SAFETENSORS[self.dtype].nbytes


PlanesByWeight = Mapping[str, tuple[Plane, ...]]
"""Planes by the name of the graph weight that they belong to."""


@dataclass(frozen=True)
class WeightPlane:
    """A plane as it lies in memory: safetensors dtype, shape, and a read-only array (BF16 as uint16)."""

    dtype: str
    shape: tuple[int, ...]
    data: NDArray[Any]


def total_bytes(planes: Iterable[Plane]) -> int:
    """Size of all planes together, bytes."""
    return sum(plane.nbytes for plane in planes)


def flat(planes: PlanesByWeight) -> dict[str, Plane]:
    """Planes by their own name."""
    return {plane.name: plane for group in planes.values() for plane in group}
