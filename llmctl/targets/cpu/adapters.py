"""Adapters in slots, as the native kernels read them (``native/lora.h``): panels of 16 outputs, int8 behind a linear
that reads int8 activations, else bfloat16 or float32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmctl.checkpoint.adapters.adapter import Adapter
from llmctl.engine.step import LoraLimits
from llmctl.graph.graph import Graph
from llmctl.targets.cpu.abi import LANES
from llmctl.targets.cpu.adapted import Place, places
from llmctl.targets.cpu.layout import PackedLinear
from llmctl.targets.cpu.linear_format import LinearFormat
from llmctl.targets.cpu.operands import aligned
from llmctl.targets.lora import AdapterPart, check_representable, parts_of

if TYPE_CHECKING:
    from torch import Tensor

_STEP = {"f32": 1, "bf16": 2, "w8": 4}
"""Columns of an output that lie together."""
_LINE = 64
"""Bytes of a cache line."""
_ELEMENT: dict[str, type[np.generic]] = {"f32": np.float32, "bf16": np.uint16, "w8": np.uint8}


@dataclass(frozen=True)
class SlotArrays:
    """The slots of one op, or (without the first axis) what one adapter puts into a slot.

    Attributes:
        a, b: [slots, rank / 16, in / s, 16, s] and [slots, panels, rank / s, 16, s]: s columns of an output lie
            together, 1 in f32, 2 in bf16 (as u16), 4 in int8 (as u8, 128 more).
        a_scales, b_scales: of int8: f32 [slots, rank], and bf16 (as u16) [slots, panels, 16]; else empty.
        ranks: i32 [slots], those that an adapter has, a multiple of 16. scales: f32 [slots], 0 where it adds nothing.
    """

    a: NDArray[Any]
    b: NDArray[Any]
    a_scales: NDArray[np.float32]
    b_scales: NDArray[np.uint16]
    ranks: NDArray[np.int32]
    scales: NDArray[np.float32]

    def put(self, slot: int, part: SlotArrays | None) -> None:
        """What an adapter adds, None: nothing."""
        self.scales[slot] = 0.0
        if part is not None:
            for name, array in vars(self).items():
                array[slot] = getattr(part, name)


@dataclass(frozen=True)
class _Form:
    """How one op's matrices lie: ``dtype`` of ``abi.DTYPE``; ``columns``: of a, with the linear's padding."""

    dtype: str
    rank: int
    columns: int
    panels: int

    @property
    def a(self) -> tuple[int, ...]:
        """Shape of one slot's."""
        return self._shape(self.rank // LANES, self.columns)

    @property
    def b(self) -> tuple[int, ...]:
        """Shape of one slot's."""
        return self._shape(self.panels, self.rank)

    def _shape(self, panels: int, columns: int) -> tuple[int, ...]:
        return panels, -(-columns // _STEP[self.dtype]), LANES, _STEP[self.dtype]

    def arrays(self, slots: int) -> tuple[tuple[tuple[int, ...], type[np.generic]], ...]:
        """Shapes and dtypes of a ``SlotArrays`` of so many slots."""
        integer, element = self.dtype == "w8", _ELEMENT[self.dtype]
        a_scales, b_scales = (self.rank, self.panels * LANES) if integer else (0, 0)
        shapes = (self.a, element), (self.b, element), ((a_scales,), np.float32), ((b_scales,), np.uint16)
        return tuple(((slots, *shape), dtype) for shape, dtype in (*shapes, ((), np.int32), ((), np.float32)))

    def bytes(self, slots: int) -> int:
        """Of these arrays, each from a cache line's start."""
        return sum(_line(shape, dtype) for shape, dtype in self.arrays(slots))

    def cut(self, arena: NDArray[np.uint8], slots: int) -> SlotArrays:
        """These arrays in ``bytes(slots)`` of memory."""
        found, at = [], 0
        for shape, dtype in self.arrays(slots):
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            found.append(arena[at : at + size].view(dtype).reshape(shape))
            at += _line(shape, dtype)
        return SlotArrays(*found)


def _line(shape: tuple[int, ...], dtype: type[np.generic]) -> int:
    """Bytes of an array in whole cache lines."""
    return -(-int(np.prod(shape)) * np.dtype(dtype).itemsize // _LINE) * _LINE


def slots_bytes(graph: Graph, linears: Mapping[str, LinearFormat], slots: int, dtype: str) -> int:
    """Bytes of all slots over all ops of a ``lora_graph``.

    Args:
        linears: by weight. dtype: ``f32`` or ``bf16``, of matrices whose linear reads floats.
    """
    return sum(_form(graph, place, linears[place.weight], dtype).bytes(slots) for place in places(graph))


class CpuAdapters:
    """Implements ``engine.step.AdapterHost``.

    Attributes:
        slots: by op.

    Args:
        graph: a ``lora_graph``. linears: by weight. dtype: ``f32`` or ``bf16``, of matrices whose linear reads floats.
    """

    def __init__(self, graph: Graph, linears: Mapping[str, PackedLinear], lora: LoraLimits, dtype: str) -> None:
        self._graph, self._lora, self._linears = graph, lora, linears
        self._places = {place.op.name: place for place in places(graph)}
        self._forms = {n: _form(graph, place, linears[place.weight], dtype) for n, place in self._places.items()}
        # One piece: large pages hold it, and panels begin with cache lines.
        sizes = [form.bytes(lora.slots) for form in self._forms.values()]
        arena, ends = aligned(sum(sizes)), list(accumulate(sizes))
        self.slots = {
            name: form.cut(arena[end - size : end], lora.slots)
            for (name, form), size, end in zip(self._forms.items(), sizes, ends, strict=True)
        }

    def kept_as(self, place: Place) -> str:
        """The dtype of its matrices, of ``abi.DTYPE``."""
        return self._forms[place.op.name].dtype

    def prepare(self, adapter: Adapter) -> Mapping[str, SlotArrays]:
        """Part of ``AdapterHost``."""
        parts = parts_of(self._graph, adapter, self._lora)
        return {name: self._packed(adapter, name, part) for name, part in parts.items()}

    def put(self, slot: int, prepared: Mapping[str, SlotArrays]) -> None:
        """Part of ``AdapterHost``."""
        for name, arrays in self.slots.items():
            arrays.put(slot, prepared.get(name))

    def _packed(self, adapter: Adapter, name: str, part: AdapterPart) -> SlotArrays:
        import torch

        place, form = self._places[name], self._forms[name]
        order = self._linears[place.weight].permutation
        dtype = torch.bfloat16 if form.dtype == "bf16" else torch.float32
        step = _STEP[form.dtype]
        a = torch.zeros(form.rank, form.a[1] * step, dtype=dtype)
        b = torch.zeros(form.panels * LANES, form.rank, dtype=dtype)
        rows, columns = part.a.shape
        in_order = order is None or form.dtype != "w8"
        a[:rows, :columns] = part.a if in_order else part.a[:, torch.from_numpy(np.array(order, np.int64))]
        b[place.lead : place.lead + len(part.b), :rows] = part.b
        a_scales, b_scales = np.zeros(0, np.float32), np.zeros(0, np.uint16)
        if form.dtype == "w8":
            a, b, of_a, of_b = _rounded(a, b)
            check_representable(adapter, str(place.op.attrs["module"]), of_a, of_b)
            a_scales, b_scales = of_a.numpy(), of_b.view(torch.int16).numpy().view(np.uint16)
        else:
            check_representable(adapter, str(place.op.attrs["module"]), a, b)
        ranks, scale = np.array(-(-rows // LANES) * LANES, np.int32), np.array(part.scale, np.float32)
        return SlotArrays(_stored(a, step), _stored(b, step), a_scales, b_scales, ranks, scale)


def _form(graph: Graph, place: Place, linear: LinearFormat | PackedLinear, dtype: str) -> _Form:
    if linear.integer:
        return _Form("w8", place.rank, linear.columns, place.panels)
    return _Form(dtype, place.rank, graph.buffers[place.op.inputs[0]].width, place.panels)


def _rounded(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes of a [rank, in] and b [rows, rank], u8 with 128 added; scales of a's rows in float32, of b's in bfloat16.

    Ranks are made equally large in b first, by a's scales: what x makes of a is rounded with one scale for all ranks,
    which is then fair to each of them. A rank that b has nothing of counts for nothing in it.
    """
    import torch

    size = b.abs().amax(0)
    b = b / torch.where(size > 0, size, 1.0)
    a_scales, b_scales = a.abs().amax(1) / 127, (b.abs().amax(1) / 127).bfloat16()
    return _codes(a, a_scales), _codes(b, b_scales.float()), a_scales * size, b_scales


def _codes(matrix: Tensor, scales: Tensor) -> Tensor:
    import torch

    units = matrix / torch.where(scales > 0, scales, 1.0)[:, None]
    return (units.round().clamp(-127, 127) + 128).to(torch.uint8)


def _stored(matrix: Tensor, step: int) -> NDArray[Any]:
    """[n * 16, k] as [n, k / step, 16, step]; bfloat16 as u16."""
    import torch

    n, k = len(matrix) // LANES, matrix.shape[1]
    turned = matrix.view(n, LANES, k // step, step).transpose(1, 2).contiguous()
    return turned.view(torch.int16).numpy().view(np.uint16) if turned.dtype == torch.bfloat16 else turned.numpy()
