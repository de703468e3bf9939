"""What a Graph is bound to: native ops, their operands by name, and where those lie in one arena."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmctl.graph.graph import Op
from llmctl.targets.cpu.abi import Kind
from llmctl.targets.cpu.adapted import Place
from llmctl.targets.cpu.layout import PackedLinear

_ALIGN = 64


@dataclass
class Storage:
    """A range of the arena: ``row_bytes`` for each of T tokens (or R rows), live from op ``first`` to op ``last``.

    Room for rows is in multiples of ``row_unit``.
    """

    name: str
    row_bytes: int
    on_rows: bool
    row_unit: int = 1
    first: int = -1
    last: int = -1
    offset: int = -1

    def bytes(self, max_tokens: int, max_rows: int) -> int:
        """For so many tokens and rows."""
        return self.row_bytes * -(-(max_rows if self.on_rows else max_tokens) // self.row_unit) * self.row_unit


@dataclass(frozen=True)
class View:
    """Columns of an fp32 matrix storage: ``ld`` elements a row, starting at ``column``."""

    storage: Storage
    column: int
    ld: int


@dataclass(frozen=True)
class IntOperand:
    """int8 codes of a buffer, with a fp32 scale and an int32 negated sum for every ``group`` columns.

    ``wide``: all weights that meet it are of 8 bits. ``grouped``: it is in expert order.
    """

    codes: Storage
    scales: Storage
    sums: Storage
    columns: int
    group: int
    wide: bool
    grouped: bool

    @property
    def storages(self) -> tuple[Storage, Storage, Storage]:
        """Codes, scales, sums."""
        return self.codes, self.scales, self.sums


@dataclass(frozen=True)
class Routing:
    """Where a layer's choice of experts lies: i32 ``[T, top_k]`` each, see ``native/experts.h``.

    Attributes:
        experts: in the order in which they were chosen. order, place: of rows in expert order, and back.
        count: experts there are. attrs: of the route op.
    """

    experts: Storage
    order: Storage
    place: Storage
    count: int
    attrs: Mapping[str, Any]

    @property
    def top_k(self) -> int:
        """Experts a token."""
        return int(self.attrs["top_k"])

    @property
    def storages(self) -> tuple[Storage, Storage, Storage]:
        """All three."""
        return self.experts, self.order, self.place


@dataclass
class Bound:
    """One native op: kind, the graph op it came from, fp32 and int8 operands by descriptor field.

    Attributes:
        routing: the choice of experts that it makes or follows. sorted: its input is in expert order.
        places: of a linear, where adapters add to it.
    """

    kind: Kind
    op: Op
    on_rows: bool
    views: dict[str, View] = field(default_factory=dict)
    packed: PackedLinear | None = None
    operands: dict[str, IntOperand] = field(default_factory=dict)
    x16: Storage | None = None
    permutation: np.ndarray | None = None
    routing: Routing | None = None
    sorted: bool = False
    places: tuple[Place, ...] = ()


def aligned(size: int) -> NDArray[np.uint8]:
    """Zeroed bytes on a cache line's boundary; pages are touched only when used."""
    raw = np.zeros(size + _ALIGN, np.uint8)
    start = -raw.ctypes.data % _ALIGN
    return raw[start : start + size]


def plan_arena(storages: list[Storage], max_tokens: int, max_rows: int) -> int:
    """Give every storage an offset such that none overlaps another while both live; bytes of the arena.

    First fit in order of size: within a few percent of the optimum on chains such as these.
    """

    def size(storage: Storage) -> int:
        return -(-storage.bytes(max_tokens, max_rows) // _ALIGN) * _ALIGN

    placed: list[Storage] = []
    for storage in sorted(storages, key=size, reverse=True):
        offset = 0
        for other in sorted(placed, key=lambda s: s.offset):
            if other.last < storage.first or other.first > storage.last:
                continue
            if offset + size(storage) <= other.offset:
                break
            offset = max(offset, other.offset + size(other))
        storage.offset = offset
        placed.append(storage)
    return max((s.offset + size(s) for s in storages), default=0)
