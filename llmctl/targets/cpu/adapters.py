"""Adapters in slots, as the native kernels read them (``native/lora.h``): panels of 16 outputs, bfloat16 or float32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmctl.checkpoint.adapters.adapter import Adapter
from llmctl.engine.adapter_slots import LoraLimits
from llmctl.graph.graph import Graph, Op
from llmctl.targets.cpu.abi import LANES
from llmctl.targets.cpu.binding import lora_rank
from llmctl.targets.lora import AdapterPart, lora_ops, parts_of, too_large

_INFINITE = 0x7F80  # in bfloat16, but for the sign


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
        packed = {name: self._packed(self._ops[name], part) for name, part in parts.items()}
        for name, part in packed.items():
            if self.dtype == "bf16" and any(bool((m & _INFINITE == _INFINITE).any()) for m in (part.a, part.b)):
                raise too_large(adapter, str(self._ops[name].attrs["module"]), "bfloat16")
        return packed

    def put(self, slot: int, prepared: Mapping[str, PackedPart]) -> None:
        """Part of ``AdapterHost``."""
        for name, arrays in self.slots.items():
            part = prepared.get(name)
            arrays.scales[slot] = 0.0 if part is None else part.scale
            if part is not None:
                arrays.a[slot], arrays.b[slot] = part.a, part.b

    def _packed(self, op: Op, part: AdapterPart) -> PackedPart:
        (ranks, columns, _), (panels, rank, _) = _shapes(self._graph, op)
        a, b = np.zeros((rank, columns), np.float32), np.zeros((panels * LANES, rank), np.float32)
        a[: len(part.a)] = part.a.numpy()
        b[: len(part.b), : part.b.shape[1]] = part.b.numpy()
        tiles_a = a.reshape(ranks, LANES, columns).transpose(0, 2, 1)
        tiles_b = b.reshape(panels, LANES, rank).transpose(0, 2, 1)
        return PackedPart(self._stored(tiles_a), self._stored(tiles_b), part.scale)

    def _stored(self, values: NDArray[np.float32]) -> NDArray[Any]:
        values = np.ascontiguousarray(values)
        return values if self.dtype == "f32" else _to_bf16(values)


def _shapes(graph: Graph, op: Op) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Of one slot's a and b."""
    rank, columns, rows = lora_rank(op), graph.buffers[op.inputs[0]].width, int(op.attrs["rows"])
    return (rank // LANES, columns, LANES), (-(-rows // LANES), rank, LANES)


def _to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Finite values, rounded to nearest even; those that round beyond the largest are infinite."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
