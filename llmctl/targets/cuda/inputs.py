"""What a step is told: token ids, positions, slots, block tables, sampling parameters, staged on the host and copied
to fixed places on the device, where programs and CUDA graphs read them."""

from __future__ import annotations

import functools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmctl.engine.step import RuntimeLimits, SamplingBatch, StepPlan
from llmctl.targets.batch import FlatPlan, check_blocks

_ALIGN = 16
_SHAPES = 512
"""Shapes whose arrays are kept."""
_ROW_ARRAYS: dict[str, tuple[Any, float]] = {
    "rows": (np.int64, 0), "seeds": (np.int64, 0), "sample_positions": (np.int64, 0), "temperature": (np.float32, 0),
    "top_p": (np.float32, 1), "min_p": (np.float32, 0), "top_k": (np.int32, 0),
}  # fmt: skip
"""Arrays of the sampled rows: dtype, and what a row has that asks for nothing (greedy, no filter)."""
_TORCH = {np.int64: torch.int64, np.int32: torch.int32, np.float32: torch.float32}


@dataclass(frozen=True)
class StepShape:
    """What a program is bound for; steps are padded to one.

    Attributes:
        tokens, sequences: T and S, padding included. width: blocks a row of the block tables, so that contexts of up to
            ``width * block_size`` tokens are read.
        prefill, decode: whether some sequence has several rows, and whether some has one. Without prefill row i is
            that of sequence i.
    """

    tokens: int
    sequences: int
    width: int
    prefill: bool
    decode: bool


@dataclass(frozen=True)
class _Region:
    """An array in the arena: where it starts, in bytes, and its type."""

    start: int
    dtype: Any
    count: int

    @property
    def stop(self) -> int:
        return self.start + self.count * np.dtype(self.dtype).itemsize


def _regions(start: int, arrays: Sequence[tuple[str, Any, int]]) -> dict[str, _Region]:
    found = {}
    for name, dtype, count in arrays:
        found[name] = region = _Region(start, dtype, count)
        start = region.stop + -region.stop % _ALIGN
    return found


def _step_arrays(tokens: int, sequences: int, groups: int) -> list[tuple[str, Any, int]]:
    return [
        ("ids", np.int64, tokens), ("positions", np.int64, tokens), ("slots", np.int64, groups * tokens),
        ("source", np.int32, tokens), ("adapters", np.int32, tokens), ("seq_lens", np.int32, sequences),
        ("query_start", np.int32, sequences + 1),
    ]  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _step_regions(start: int, tokens: int, sequences: int, groups: int) -> dict[str, _Region]:
    return _regions(start, _step_arrays(tokens, sequences, groups))


class InputArena:
    """The device's side: one block of memory for arrays, one for block tables.

    Arrays of the sampled rows lie first, at the same place in every step; those of tokens and sequences follow, packed
    for the step's shape. A sequence has a block table for each KV group, one behind the other.

    Attributes:
        groups: KV groups. held: width and rows of the block tables that were sent last, a row for each group of each
            sequence; None where that is not known.
    """

    def __init__(self, tokens: int, sequences: int, limits: RuntimeLimits, device: torch.device | str) -> None:
        """``tokens``, ``sequences``: of the largest step."""
        self.limits, self.groups = limits, len(limits.windows)
        self.row_regions = _regions(0, [(name, dtype, sequences) for name, (dtype, _) in _ROW_ARRAYS.items()])
        self._start = max(r.stop + -r.stop % _ALIGN for r in self.row_regions.values())
        self.size = self.step_bytes(StepShape(tokens, sequences, 1, True, True))
        self.table_width = -(-limits.max_model_len // limits.block_size)
        self.memory = torch.zeros(self.size, dtype=torch.uint8, device=device)
        self.tables = torch.zeros(sequences * self.groups * self.table_width, dtype=torch.int32, device=device)
        self.held: tuple[int, list[Sequence[int]]] | None = None

    def holds(self, width: int, tables: Sequence[Sequence[int]]) -> bool:
        """Whether the rows of these very tables are what was last sent (or more rows than these)."""
        if self.held is None or self.held[0] != width or len(self.held[1]) < len(tables):
            return False
        return all(a is b for a, b in zip(self.held[1], tables, strict=False))

    def step_regions(self, tokens: int, sequences: int) -> dict[str, _Region]:
        """Where a shape's arrays lie."""
        return _step_regions(self._start, tokens, sequences, self.groups)

    def step_bytes(self, shape: StepShape) -> int:
        """Bytes from the arena's start that a step of a shape uses."""
        return next(reversed(self.step_regions(shape.tokens, shape.sequences).values())).stop

    def views(self, shape: StepShape) -> dict[str, Tensor]:
        """The step's arrays on the device by name, ``slots`` as [groups, T], ``block_tables`` [S, groups, width]
        included."""
        found = {n: self._view(r) for n, r in self.step_regions(shape.tokens, shape.sequences).items()}
        found["slots"] = found["slots"].view(self.groups, shape.tokens)
        tables = self.tables[: shape.sequences * self.groups * shape.width]
        found["block_tables"] = tables.view(shape.sequences, self.groups, shape.width)
        return found

    def row_view(self, name: str, rows: int) -> Tensor:
        """The first rows of an array of the sampled rows."""
        return self._view(self.row_regions[name])[:rows]

    def _view(self, region: _Region) -> Tensor:
        return self.memory[region.start : region.stop].view(_TORCH[region.dtype])


class Staging:
    """The host's side of one step in flight: what is written here is copied to the arena as the step starts.

    Not to be written again before the copy has been made (the runtime waits for the step that used it).
    """

    def __init__(self, arena: InputArena, memory: Tensor, tables: Tensor) -> None:
        """``memory``, ``tables``: page-locked host memory of the arena's sizes."""
        self.arena, self.memory, self.tables = arena, memory, tables
        self._bytes = memory.numpy()
        self._table = memoryview(tables.numpy())
        self._row_arrays = {name: self._bytes[r.start : r.stop].view(r.dtype) for name, r in arena.row_regions.items()}
        self._arrays: dict[tuple[int, int], dict[str, NDArray[Any]]] = {}
        self._table_rows = 0
        self._staged: tuple[int, list[Sequence[int]]] | None = None
        self._width = 0
        self._tables_of: list[Sequence[int] | None] = []
        self._given: dict[str, tuple[int, NDArray[Any] | None]] = {}

    def tokens(
        self,
        shape: StepShape,
        flat: FlatPlan,
        further: Sequence[Sequence[int]],
        source: dict[int, int],
        adapters: Sequence[int] = (),
    ) -> None:
        """Write the arrays of tokens and sequences; padding reads token 0 at position 0 and stores nothing.

        Args:
            further: slots in each KV group but the first, ``flat``'s.
            source: index of a token -> row of the step before whose token it is.
            adapters: each token's LoRA adapter, -1 for none; empty: no token has one.
        """
        views = self._views(shape.tokens, shape.sequences)
        count, sequences = len(flat.token_ids), len(flat.query_start) - 1
        ids, feed = views["ids"], views["source"]
        ids[:count], ids[count:] = flat.token_ids, 0
        feed[:] = -1
        for at, row in source.items():
            ids[at], feed[at] = 0, row
        views["adapters"][: len(adapters)], views["adapters"][len(adapters) :] = adapters, -1
        views["positions"][:count], views["positions"][count:] = flat.positions, 0
        for group, own in enumerate((flat.slots, *further)):
            slots = views["slots"][group * shape.tokens : (group + 1) * shape.tokens]
            slots[:count], slots[count:] = own, -1
        starts, lens = views["query_start"], views["seq_lens"]
        starts[: sequences + 1], starts[sequences + 1 :] = flat.query_start, flat.query_start[-1]
        ends = np.asarray(flat.query_start[1:]) - 1
        lens[:sequences], lens[sequences:] = views["positions"][ends] + 1, 0

    def _views(self, tokens: int, sequences: int) -> dict[str, NDArray[Any]]:
        key = tokens, sequences
        if key not in self._arrays:
            if len(self._arrays) > _SHAPES:
                self._arrays.clear()
            regions = self.arena.step_regions(tokens, sequences)
            self._arrays[key] = {name: self._bytes[r.start : r.stop].view(r.dtype) for name, r in regions.items()}
        return self._arrays[key]

    def block_tables(self, shape: StepShape, plan: StepPlan) -> None:
        """Bring the tables up to the plan's slices, where the device does not hold them as they are.

        Most decode steps change none: a sequence takes a new block every ``block_size`` tokens.

        Raises:
            ValueError: a block id out of range; the message names the request.
        """
        groups = self.arena.groups
        tables = [table for piece in plan.slices for table in (piece.tables if groups > 1 else (piece.block_ids,))]
        if self.arena.holds(shape.width, tables):
            self._table_rows = 0
            return
        if self._width != shape.width:
            self._width, self._tables_of = shape.width, []
        self._tables_of += [None] * (len(tables) - len(self._tables_of))
        for row, table in enumerate(tables):
            if self._tables_of[row] is table:
                continue
            self._tables_of[row] = None
            check_blocks(plan.slices[row // groups], self.arena.limits, row % groups)
            blocks = array("i", table[: shape.width])
            self._table[row * shape.width : row * shape.width + len(blocks)] = blocks
            if isinstance(table, tuple):  # another kind might change and still be the same object
                self._tables_of[row] = table
        self._table_rows = len(tables)
        self._staged = (shape.width, tables) if all(isinstance(table, tuple) for table in tables) else None

    def rows(self, flat: FlatPlan, batch: SamplingBatch, padded: int) -> None:
        """Write the arrays of the sampled rows, up to ``padded`` of them."""
        self._row("rows", padded, np.array(flat.rows, np.int64))
        self._row("sample_positions", padded, batch.positions)
        for name in ("seeds", "temperature", "top_p", "min_p", "top_k"):
            value = getattr(batch, name)
            given = self._given.get(name)
            if given is None or given[0] != padded or given[1] is not value:
                self._row(name, padded, value)
                self._given[name] = (padded, value)

    def sent_rows(self, padded: int) -> Tensor:
        """The rows that were sent last, i64 [padded], on the host."""
        return self.memory[self.arena.row_regions["rows"].start :][: 8 * padded].view(torch.int64)

    def _row(self, name: str, padded: int, values: NDArray[Any] | None) -> None:
        dtype, off = _ROW_ARRAYS[name]
        to = self._row_arrays[name]
        count = 0 if values is None else len(values)
        if values is not None:
            to[:count] = values.view(dtype) if values.dtype == np.uint64 else values
        to[count:padded] = off

    def send(self, shape: StepShape) -> None:
        """Start both copies on the current stream."""
        size = self.arena.step_bytes(shape)
        self.arena.memory[:size].copy_(self.memory[:size], non_blocking=True)
        used = self._table_rows * shape.width
        if used:
            self.arena.held = None
            self.arena.tables[:used].copy_(self.tables[:used], non_blocking=True)
            self.arena.held = self._staged
