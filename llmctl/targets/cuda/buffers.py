"""Where a step's activations lie: planned once, at fixed addresses, because CUDA graphs keep them.

A storage is ``row_bytes`` for each of the largest step's tokens (or sampled rows); a buffer is a view of one, or of
some of its columns. A storage is used again once the last buffer in it has been read. Planning imports no torch: the
memory plan of an engine is made of it too.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmctl.graph.dtypes import DTYPES
from llmctl.graph.graph import Graph, Op
from llmctl.graph.ops import OP_KINDS
from llmctl.targets.base import RuntimeSizes
from llmctl.targets.cuda.attention import DECODE_SPLIT, max_splits
from llmctl.targets.cuda.experts import SLOTS, max_blocks
from llmctl.targets.cuda.gemm import GEMM_ROWS, H200_SMS, INT8_TOKENS, plan_gemm, plan_tile
from llmctl.targets.cuda.layout import CudaFormat
from llmctl.targets.cuda.lora import lora_splits
from llmctl.targets.cuda.packing import cuda_formats

if TYPE_CHECKING:
    from torch import Tensor

SCRATCH_DTYPES = {
    "workspace": "float32", "counters": "int32", "parts": "float32", "part_stats": "float32", "lora": "float32",
    "slot_order": "int32", "slot_blocks": "int32",
}  # fmt: skip
"""Of the buffers by purpose that are not of the compute dtype."""


@dataclass(frozen=True)
class Storage:
    """``row_bytes`` for each token of a step, or for each sampled row."""

    row_bytes: int
    on_rows: bool


@dataclass(frozen=True)
class Placement:
    """A buffer: ``columns`` elements a row from column ``start`` on, in a storage whose rows have ``width``."""

    storage: int
    dtype: str
    width: int
    start: int
    columns: int


@dataclass(frozen=True)
class BufferPlan:
    """Storages, and where each buffer lies. ``merged``: by op, all outputs of a linear with splits as one buffer."""

    storages: tuple[Storage, ...]
    placements: Mapping[str, Placement]
    merged: Mapping[str, Placement]

    def bytes(self, tokens: int, rows: int) -> int:
        """What all storages take."""
        return sum(s.row_bytes * (rows if s.on_rows else tokens) for s in self.storages)

    def allocate(self, tokens: int, rows: int, device: str) -> Buffers:
        """Storages for steps of up to ``tokens`` tokens and ``rows`` sampled rows."""
        import torch

        made = [
            torch.zeros(s.row_bytes * (rows if s.on_rows else tokens), dtype=torch.uint8, device=device)
            for s in self.storages
        ]
        return Buffers(self, made)


class Buffers:
    """The storages of a plan on a device."""

    def __init__(self, plan: BufferPlan, storages: Sequence[Tensor]) -> None:
        self._plan, self._storages = plan, storages
        self._typed: dict[tuple[int, str], Tensor] = {}  # storages as what lies in them

    def rows_of(self, name: str) -> int:
        """Rows of the largest step, of a buffer."""
        place = self._plan.placements[name]
        return self._storages[place.storage].numel() // (place.width * DTYPES[place.dtype].nbytes)

    def view(self, name: str, rows: int) -> Tensor:
        """The first rows of a buffer, [rows, columns]."""
        return self._view(self._plan.placements[name], rows)

    def outputs(self, op: Op, rows: int) -> list[Tensor]:
        """The first rows of each output of an op; one, merged, of a linear with splits."""
        merged = self._plan.merged.get(op.name)
        places = [self._plan.placements[name] for name in op.outputs] if merged is None else [merged]
        return [self._view(place, rows) for place in places]

    def _view(self, place: Placement, rows: int) -> Tensor:
        key = place.storage, place.dtype
        if key not in self._typed:
            import torch

            self._typed[key] = self._storages[place.storage].view(getattr(torch, DTYPES[place.dtype].torch))
        storage = self._typed[key]
        whole = storage[: rows * place.width].view(rows, place.width)
        return whole[:, place.start : place.start + place.columns]


def plan_buffers(graph: Graph, dtype: str) -> BufferPlan:
    """Place every buffer that an op makes.

    What ``gather_rows`` reads stays to the end of the step, because all that follows lies in storages for sampled rows:
    rows of it may be wanted in several portions.
    """
    return _Planner(graph, dtype).run()


class _Planner:
    """One planning: storages, the buffers alive in each, and those that are free."""

    def __init__(self, graph: Graph, dtype: str) -> None:
        self.graph, self.dtype = graph, dtype
        self.storages: list[Storage] = []
        self.alive: list[int] = []
        self.placements: dict[str, Placement] = {}
        self.merged: dict[str, Placement] = {}
        self.last = {name: i for i, op in enumerate(graph.ops) for name in (*op.inputs, *op.outputs)}
        self.gather = graph.gather_index()

    def run(self) -> BufferPlan:
        for index, op in enumerate(self.graph.ops):
            self._place(index, op)
            for name in {*op.inputs, *op.outputs}:
                if self.last[name] == index and name in self.placements:
                    self.alive[self.placements[name].storage] -= 1
        return BufferPlan(tuple(self.storages), self.placements, self.merged)

    def _place(self, index: int, op: Op) -> None:
        widths = [self.graph.buffers[name].width for name in op.outputs]
        if op.kind == "lora" and self.last[op.inputs[1]] == index:  # it adds to what lies there
            self._add(op.outputs[0], self.placements[op.inputs[1]])
        elif "splits" in op.attrs:
            whole = self._take(index, sum(widths), self.dtype)
            self.merged[op.name] = whole
            start = 0
            for name, width in zip(op.outputs, widths, strict=True):
                self._add(name, Placement(whole.storage, self.dtype, whole.width, start, width))
                start += width
        else:
            for name, width, dtype in zip(op.outputs, widths, output_dtypes(op, self.dtype), strict=True):
                self._add(name, self._take(index, width, dtype))

    def _add(self, name: str, place: Placement) -> None:
        self.placements[name] = place
        self.alive[place.storage] += 1

    def _take(self, index: int, width: int, dtype: str) -> Placement:
        """The smallest free storage that is large enough, or a new one."""
        on_rows, row_bytes = index >= self.gather, width * DTYPES[dtype].nbytes
        row_bytes += -row_bytes % 16
        free = [
            i
            for i, s in enumerate(self.storages)
            if not self.alive[i] and s.on_rows == on_rows and s.row_bytes >= row_bytes
        ]
        if free:
            found = min(free, key=lambda i: self.storages[i].row_bytes)
        else:
            found = len(self.storages)
            self.storages.append(Storage(row_bytes, on_rows))
            self.alive.append(0)
        return Placement(found, dtype, width, 0, width)


def output_dtypes(op: Op, dtype: str) -> tuple[str, ...]:
    """What each of an op's outputs is made of, when activations are ``dtype``."""
    first = ("int8", "float32") if OP_KINDS[op.kind].int8_rows else ("int32",) if op.kind == "route" else (dtype,)
    return (*first, *(dtype,) * len(op.outputs))[: len(op.outputs)]


def scratch_sizes(graph: Graph, dtype: str, sizes: RuntimeSizes, sms: int) -> dict[str, int]:
    """Elements of every scratch buffer that some step of these sizes needs, by purpose (``ops.Scratch.take``'s names).

    Exact for the GEMM kernels' workspaces, whose size is no simple function of the rows: every number is planned.
    """
    found: dict[str, int] = {}
    for name, size in _needs(graph, dtype, sizes, sms):
        found[name] = max(found.get(name, 0), size)
    return found


def scratch_bytes(sizes: Mapping[str, int], dtype: str) -> int:
    """Bytes of scratch buffers of these sizes."""
    return sum(n * DTYPES[SCRATCH_DTYPES.get(name, dtype)].nbytes for name, n in sizes.items())


def _needs(graph: Graph, dtype: str, sizes: RuntimeSizes, sms: int) -> Iterator[tuple[str, int]]:
    tokens, formats = sizes.max_num_batched_tokens, cuda_formats(graph)
    gather = graph.gather_index()
    for index, op in enumerate(graph.ops):
        most = sizes.max_num_seqs if index >= gather else tokens
        if op.kind == "linear":
            fmt, (rows, _) = formats.get(op.weights[0]), graph.weights[op.weights[0]].shape
            int8 = "activations" in op.attrs
            if fmt is not None:
                yield from _gemm_needs(fmt, dtype, int8, most, sms)
            if "epilogue" in op.attrs and (fmt is None or (most > GEMM_ROWS and not int8)):
                yield "product", most * rows
        elif op.kind == "attention":
            splits = max_splits(sizes.max_model_len, op.attrs["window"], DECODE_SPLIT)
            heads = sizes.max_num_seqs * op.attrs["heads"] * splits
            yield "parts", heads * op.attrs["head_dim"]
            yield "part_stats", heads * 2
        elif op.kind == "grouped_linear":
            slots, count = most * graph.buffers[op.inputs[1]].width, op.attrs["count"]
            yield "slot_order", slots
            yield "slot_blocks", 4 * max_blocks(slots, count, SLOTS[0])
        elif op.kind == "lora":
            yield "lora", lora_splits(graph.buffers[op.inputs[0]].width) * tokens * op.attrs["rank"]
        elif op.kind == "rms_norm" and _is_slice(graph, op.inputs[0]):
            yield "normed", most * graph.buffers[op.inputs[0]].width
        elif op.kind in ("act", "act_mul", "mul", "add"):
            for i, name in enumerate(op.inputs):
                yield f"elementwise{i}", most * graph.buffers[name].width


def _is_slice(graph: Graph, buffer: str) -> bool:
    """Whether it is some columns of a merged linear's result, to which adapters may have added in place."""
    producer = graph.producer(buffer)
    while producer is not None and producer.kind == "lora":
        producer = graph.producer(producer.inputs[1])
    return producer is not None and "splits" in producer.attrs


def _gemm_needs(fmt: CudaFormat, dtype: str, int8: bool, most: int, sms: int) -> Iterator[tuple[str, int]]:
    workspace, counters = _gemm_scratch(fmt, dtype, int8, most if int8 else min(most, GEMM_ROWS), sms)
    yield "workspace", workspace
    yield "counters", counters
    if fmt.permuted:
        yield "permuted", most * fmt.shape[1]
    if most > GEMM_ROWS and not int8:
        yield "dense", fmt.shape[0] * fmt.shape[1]


@functools.cache
def _gemm_scratch(fmt: CudaFormat, dtype: str, int8: bool, most: int, sms: int) -> tuple[int, int]:
    """(workspace, counters) that are enough for any number of rows up to ``most``.

    Beyond the largest tile an int8 plan depends on the number of tiles alone, and shares nothing out from two a
    multiprocessor on.
    """
    if int8:
        tile = INT8_TOKENS[-1]
        rows = [*range(1, min(most, tile) + 1), *range(2 * tile, min(most + tile, 2 * sms * tile), tile)]
        plans = [plan_tile(fmt, dtype, m, int8=True, sms=sms) for m in rows]
    else:
        plans = [plan_gemm(fmt, dtype, m, sms) for m in range(1, most + 1)]
    return max(p.workspace for p in plans), max(p.counters for p in plans)


def step_bytes(graph: Graph, dtype: str, sizes: RuntimeSizes, sms: int = H200_SMS) -> int:
    """Bytes beside weights and KV cache: activations, scratch, and float32 logits of every sampled row."""
    rows = sizes.max_num_seqs
    activations = plan_buffers(graph, dtype).bytes(sizes.max_num_batched_tokens, rows)
    return activations + scratch_bytes(scratch_sizes(graph, dtype, sizes, sms), dtype) + 4 * rows * graph.vocab_size
