"""Adapters in slots, as the native kernels read them (``native/lora.h``): panels of 16 outputs, bfloat16 or float32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmctl.checkpoint.adapters.adapter import Adapter
from llmctl.engine.step import LoraLimits
from llmctl.graph.graph import Graph, Op
from llmctl.targets.cpu.abi import LANES
from llmctl.targets.cpu.binding import lora_rank
from llmctl.targets.lora import AdapterPart, check_representable, lora_ops, parts_of

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SlotArrays:
    """The slots of one op: a [slots, rank / 16, in, 16] and b [slots, rows / 16, rank, 16] in f32, or bf16 as u16;
    scales f32 [slots], 0 where an adapter adds nothing."""

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
    for op in lora_ops(graph):
        shapes = _shapes(graph, op)
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
        self._ops = {op.name: op for op in lora_ops(graph)}
        element = np.float32 if dtype == "f32" else np.uint16
        self.slots: dict[str, SlotArrays] = {}
        for op in self._ops.values():
            a, b = _shapes(graph, op)
            scales = np.zeros(lora.slots, np.float32)
            self.slots[op.name] = SlotArrays(
                np.zeros((lora.slots, *a), element), np.zeros((lora.slots, *b), element), scales
            )

    def prepare(self, adapter: Adapter) -> Mapping[str, PackedPart]:
        """Part of ``AdapterHost``."""
        parts = parts_of(self._graph, adapter, self._lora)
        return {name: self._packed(adapter, self._ops[name], part) for name, part in parts.items()}

    def put(self, slot: int, prepared: Mapping[str, PackedPart]) -> None:
        """Part of ``AdapterHost``."""
        for name, arrays in self.slots.items():
            part = prepared.get(name)
            arrays.scales[slot] = 0.0 if part is None else part.scale
            if part is not None:
                arrays.a[slot], arrays.b[slot] = part.a, part.b

    def _packed(self, adapter: Adapter, op: Op, part: AdapterPart) -> PackedPart:
        import torch

        dtype = torch.float32 if self.dtype == "f32" else torch.bfloat16
        (ranks, columns, _), (panels, rank, _) = _shapes(self._graph, op)
        a, b = torch.zeros(rank, columns, dtype=dtype), torch.zeros(panels * LANES, rank, dtype=dtype)
        a[: len(part.a)], b[: len(part.b), : part.b.shape[1]] = part.a, part.b
        check_representable(adapter, str(op.attrs["module"]), a, b)
        return PackedPart(_stored(a.view(ranks, LANES, columns)), _stored(b.view(panels, LANES, rank)), part.scale)


def _shapes(graph: Graph, op: Op) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Of one slot's a and b."""
    rank, columns, rows = lora_rank(op), graph.buffers[op.inputs[0]].width, int(op.attrs["rows"])
    return (rank // LANES, columns, LANES), (-(-rows // LANES), rank, LANES)


def _stored(tiles: Tensor) -> NDArray[Any]:
    """[n, lanes, k] as [n, k, lanes]; bfloat16 as u16."""
    import torch

    turned = tiles.transpose(1, 2).contiguous()
    return turned.numpy() if turned.dtype == torch.float32 else turned.view(torch.int16).numpy().view(np.uint16)
