"""Adapters in slots, as the native kernels read them (``native/lora.h``): panels of 16 outputs, bfloat16 or float32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmctl.checkpoint.adapters.adapter import Adapter
from llmctl.engine.step import LoraLimits
from llmctl.graph.graph import Graph
from llmctl.targets.cpu.abi import LANES
from llmctl.targets.cpu.adapted import Place, places
from llmctl.targets.lora import AdapterPart, check_representable, parts_of

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SlotArrays:
    """The slots of one op: a [slots, rank / 16, in, 16] and b [slots, panels, rank, 16] in f32. In bf16, as u16, two
    columns of an output lie together: a [slots, rank / 16, in / 2, 16, 2], b [slots, panels, rank / 2, 16, 2]. scales
    f32 [slots], 0 where an adapter adds nothing."""

    a: NDArray[Any]
    b: NDArray[Any]
    scales: NDArray[np.float32]


@dataclass(frozen=True)
class PackedPart:
    """What one adapter adds in one op, as a slot of ``SlotArrays``."""

    a: NDArray[Any]
    b: NDArray[Any]
    scale: float


def slot_bytes(graph: Graph, dtype: str) -> int:
    """Bytes of one slot over all ops of a ``lora_graph``. ``dtype``: ``f32`` or ``bf16``."""
    size = 0
    for place in places(graph):
        shapes = _shapes(graph, place, _STEP[dtype])
        size += sum(int(np.prod(shape)) for shape in shapes) * (4 if dtype == "f32" else 2) + 4
    return size


class CpuAdapters:
    """Implements ``engine.step.AdapterHost``.

    Attributes:
        slots: by op. dtype: of the matrices.

    Args:
        graph: a ``lora_graph``.
    """

    def __init__(self, graph: Graph, lora: LoraLimits, dtype: str) -> None:
        self._graph, self._lora, self.dtype = graph, lora, dtype
        self._places = {place.op.name: place for place in places(graph)}
        element = np.float32 if dtype == "f32" else np.uint16
        self.slots: dict[str, SlotArrays] = {}
        for name, place in self._places.items():
            a, b = _shapes(graph, place, _STEP[dtype])
            scales = np.zeros(lora.slots, np.float32)
            self.slots[name] = SlotArrays(
                np.zeros((lora.slots, *a), element), np.zeros((lora.slots, *b), element), scales
            )

    def prepare(self, adapter: Adapter) -> Mapping[str, PackedPart]:
        """Part of ``AdapterHost``."""
        parts = parts_of(self._graph, adapter, self._lora)
        return {name: self._packed(adapter, self._places[name], part) for name, part in parts.items()}

    def put(self, slot: int, prepared: Mapping[str, PackedPart]) -> None:
        """Part of ``AdapterHost``."""
        for name, arrays in self.slots.items():
            part = prepared.get(name)
            arrays.scales[slot] = 0.0 if part is None else part.scale
            if part is not None:
                arrays.a[slot], arrays.b[slot] = part.a, part.b

    def _packed(self, adapter: Adapter, place: Place, part: AdapterPart) -> PackedPart:
        import torch

        dtype = torch.float32 if self.dtype == "f32" else torch.bfloat16
        step = _STEP[self.dtype]
        (_, lines, *_), (panels, *_) = _shapes(self._graph, place, step)
        a, b = torch.zeros(place.rank, lines * step, dtype=dtype), torch.zeros(panels * LANES, place.rank, dtype=dtype)
        rows, columns = part.a.shape
        a[:rows, :columns] = part.a
        b[place.lead : place.lead + len(part.b), :rows] = part.b
        check_representable(adapter, str(place.op.attrs["module"]), a, b)
        return PackedPart(_stored(a, step), _stored(b, step), part.scale)


_STEP = {"f32": 1, "bf16": 2}
"""Columns of an output that lie together: ``kLineStep``."""


def _shapes(graph: Graph, place: Place, step: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of one slot's a and b."""
    columns = graph.buffers[place.op.inputs[0]].width
    a, b = (place.rank // LANES, -(-columns // step), LANES), (place.panels, place.rank // step, LANES)
    return (a, b) if step == 1 else ((*a, step), (*b, step))


def _stored(matrix: Tensor, step: int) -> NDArray[Any]:
    """[n * 16, k] as [n, k / step, 16, step], the last only where it is not 1; bfloat16 as u16."""
    import torch

    n, k = len(matrix) // LANES, matrix.shape[1]
    turned = matrix.view(n, LANES, k // step, step).transpose(1, 2).contiguous()
    if step == 1:
        turned = turned.view(n, k, LANES)
    return turned.numpy() if turned.dtype == torch.float32 else turned.view(torch.int16).numpy().view(np.uint16)
