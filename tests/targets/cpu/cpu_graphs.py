"""Graphs of a few ops, run by the CPU runtime on a chosen build of the kernels, their output read back bit for bit.

The surface is the runtime's own (a Graph, packed weights, step plans), so that tests outlive a change of layouts,
micro-kernels or descriptors. Only ``_Recorder`` looks below it: at the last op's output matrix in the arena, which
scoring (unlike sampling) leaves as it is.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from numpy.typing import NDArray

from llmctl.checkpoint.resolve import cache_dir
from llmctl.engine.step import SamplingBatch, SequenceSlice, StepPlan, StepResult, TokenScores
from llmctl.graph.check import check_graph
from llmctl.graph.graph import INPUT_IDS, LOGITS, POSITIONS, Buffer, Graph, KVLayer, Op, Weight, WeightPart
from llmctl.targets.base import RuntimeSizes
from llmctl.targets.cpu import runtime as cpu
from llmctl.targets.cpu.features import cpu_features
from llmctl.targets.cpu.layout import PackedLinear, pack_int
from llmctl.targets.cpu.toolchain import (
    EMULATED_AMX,
    Variant,
    amx_to_test,
    compile_library,
    find_compiler,
    variants_to_test,
)

Floats = NDArray[np.float32]
VARIANTS = variants_to_test(cpu_features()) if find_compiler() else ()
"""The builds of the kernels that this machine runs, avx512bf16 in software where it lacks that."""
AMX = amx_to_test(cpu_features()) if find_compiler() else ()
"""The builds for tile registers: in software, and where there are some on them."""
_SLOW = {EMULATED_AMX, *(v for v in VARIANTS if AMX[1:] and v.name.endswith("avx512bf16"))}  # amx has its instructions
each_variant = pytest.mark.parametrize(
    "variant",
    [pytest.param(v, marks=[pytest.mark.slow] * (v in _SLOW)) for v in dict.fromkeys((*AMX, *VARIANTS))],
    ids=lambda v: v.name,
)
"""All of them; slow: what adds no code that another lacks, and the tile registers in software."""

_FOLDER = TemporaryDirectory()


@cache
def library(variant: Variant) -> Path:
    """The compiled kernels, from the cache that ``llmctl build`` keeps."""
    compiled = compile_library(variant, cache=cache_dir() / "kernels")
    path = Path(_FOLDER.name) / compiled.filename
    path.write_bytes(compiled.code)
    return path


class Sketch:
    """A Graph in the making. Buffers are named by the op that writes them."""

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.buffers = {INPUT_IDS: Buffer(INPUT_IDS, 1), POSITIONS: Buffer(POSITIONS, 1)}
        self.kv: list[KVLayer] = []
        self.linears: dict[str, PackedLinear] = {}
        self.tables: dict[str, NDArray[Any]] = {}
        self.table_dtypes: dict[str, str] = {}
        self.vectors: dict[str, Floats] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.max_position = 1

    def rows(self, by_position: Floats, by_token: Floats | None = None) -> str:
        """A buffer whose row for token ``t`` at position ``p`` is ``by_position[p] + by_token[t]`` (or the first)."""
        positions, width = by_position.shape
        self.max_position = max(self.max_position, positions)
        first = self.embed(np.zeros((1, width), np.float32) if by_token is None else by_token)
        name = self._table(by_position.astype(np.float32), "f32")
        return self.op("pos_embed", (first, POSITIONS), (width,), (name,), {"offset": 0})[0]

    def embed(self, table: NDArray[Any], dtype: str = "f32", scale: float = 1.0) -> str:
        """Rows of a table by token id; u16 bits for ``bf16`` and ``f16``."""
        name = self._table(table, dtype)
        return self.op("embed", (INPUT_IDS,), (table.shape[1],), (name,), {"scale": scale})[0]

    def packed_embed(self, packed: PackedLinear, rows: int, scale: float = 1.0) -> str:
        """Rows of a packed square table by token id."""
        name = f"linear{len(self.linears)}"
        self.linears[name], self.shapes[name] = packed, (rows, rows)
        return self.op("embed", (INPUT_IDS,), (rows,), (name,), {"scale": scale})[0]

    def vector(self, values: NDArray[Any]) -> str:
        """A norm weight or bias."""
        name = f"vector{len(self.vectors)}"
        self.vectors[name], self.shapes[name] = values.astype(np.float32), values.shape
        return name

    def linear(
        self,
        x: str,
        packed: PackedLinear,
        rows: int,
        *,
        bias: NDArray[Any] | None = None,
        splits: tuple[int, ...] = (),
        epilogue: str = "",
    ) -> tuple[str, ...]:
        """A linear op over a packed weight of ``rows`` logical rows; one buffer, or one per split."""
        name = f"linear{len(self.linears)}"
        self.linears[name], self.shapes[name] = packed, (rows, self.buffers[x].width)
        widths = splits or ((rows // 2,) if epilogue else (rows,))
        attrs: dict[str, Any] = {"splits": splits} if splits else {"epilogue": epilogue} if epilogue else {}
        weights = (name, self.vector(bias) if bias is not None else "")
        return self.op("linear", (x,), widths, weights, attrs)

    def gather(self, x: str) -> str:
        """Go on with the gathered rows only, as the output head does."""
        return self.op("gather_rows", (x,), (self.buffers[x].width,))[0]

    def op(
        self,
        kind: str,
        inputs: tuple[str, ...],
        widths: tuple[int, ...],
        weights: tuple[str, ...] = (),
        attrs: Mapping[str, Any] | None = None,
    ) -> tuple[str, ...]:
        """Any op; its output buffers."""
        name = f"{kind}{len(self.ops)}"
        outputs = tuple(f"{name}.{i}" for i in range(len(widths)))
        self.buffers |= {o: Buffer(o, w) for o, w in zip(outputs, widths, strict=True)}
        self.ops.append(Op(kind, name, inputs, outputs, weights, dict(attrs or {}), layer=0 if self.kv else -1))
        return outputs

    def graph(self, output: str) -> Graph:
        """The graph whose logits are ``output``, all conventions checked."""
        width = self.buffers[output].width
        if any(op.kind == "gather_rows" for op in self.ops):
            self.ops[-1] = self.ops[-1].with_(outputs=(LOGITS,))
            del self.buffers[output]
        else:
            self.ops.append(Op("gather_rows", "gather", (output,), (LOGITS,), layer=len(self.kv)))
        self.buffers[LOGITS] = Buffer(LOGITS, width)
        for op in self.ops:  # token ids are checked against the output's width
            if op.weights and op.weights[0] in self.tables:
                self._grow(op.weights[0], width if op.kind == "embed" else self.max_position)
        weights = {n: Weight(n, s, (WeightPart(n),)) for n, s in self.shapes.items()}
        graph = Graph(
            "sketch", width, width, len(self.kv), self.max_position, tuple(self.kv), self.buffers, weights,
            tuple(self.ops),
        )  # fmt: skip
        check_graph(graph)
        return graph

    def _grow(self, name: str, rows: int) -> None:
        table = self.tables[name]
        assert len(table) <= rows
        self.tables[name] = np.concatenate([table, np.zeros((rows - len(table), table.shape[1]), table.dtype)])
        self.shapes[name] = self.tables[name].shape

    def _table(self, values: NDArray[Any], dtype: str) -> str:
        name = f"table{len(self.tables)}"
        self.tables[name], self.table_dtypes[name], self.shapes[name] = values, dtype, values.shape
        return name


class _Recorder:
    """A kernel library that remembers where the last op writes, and can take a step's KV slots away."""

    def __init__(self, path: Path) -> None:
        self._library = cpu_open(path)
        self.output = (0, 0)
        self.padding = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)

    def llmctl_create(self, ops: Any, count: int, *rest: Any) -> Any:
        """Pass on, after a look."""
        last = ops[count - 1].y
        self.output = (last.data, last.ld)
        return self._library.llmctl_create(ops, count, *rest)

    def llmctl_step(self, program: Any, step: Any, sampling: Any) -> Any:
        """Pass on; as ``padding``, with every slot -1."""
        if self.padding:
            ctypes.memset(step._obj.slots, 0xFF, 8 * step._obj.tokens)
        return self._library.llmctl_step(program, step, sampling)


cpu_open = cpu.open_library


class Native:
    """A sketch bound to one build of the kernels."""

    def __init__(
        self,
        sketch: Sketch,
        output: str,
        variant: Variant,
        *,
        max_tokens: int = 128,
        num_blocks: int = 64,
        block_size: int = 16,
        kv_dtype: str = "f32",
        threads: int = 2,
    ) -> None:
        graph = sketch.graph(output)
        self.width = graph.vocab_size
        weights = cpu.CpuWeights(sketch.linears, sketch.tables, sketch.table_dtypes, sketch.vectors)
        self._library = _Recorder(library(variant))
        with patch.object(cpu, "open_library", lambda _: self._library):
            self.runtime = cpu.CpuRuntime(
                graph,
                weights,
                library(variant),
                RuntimeSizes(num_blocks, block_size, sketch.max_position, max_tokens, max_tokens),
                kv_dtype=kv_dtype,
                threads=threads,
            )

    def step(self, *slices: SequenceSlice, padding: bool = False) -> Floats:
        """One step; the last op's row for every token of every slice, f32 [T, width].

        Args:
            padding: the tokens are padding: their keys and values have no slot.
        """
        self._library.padding = padding
        scored = [SequenceSlice(s.request_id, s.token_ids, s.start, s.block_ids, False, [0] * len(s.token_ids))
                  for s in slices]  # fmt: skip
        self.runtime.execute(StepPlan(tuple(scored)), greedy(0)).result()
        address, ld = self._library.output
        count = sum(len(s.token_ids) for s in slices)
        values = (ctypes.c_float * ((count - 1) * ld + self.width)).from_address(address)
        flat = np.zeros(count * ld, np.float32)
        flat[: len(values)] = np.ctypeslib.as_array(values)
        return flat.reshape(count, ld)[:, : self.width].copy()

    def first_rows(self, count: int) -> Floats:
        """One step over positions 0 .. count-1 of one sequence."""
        return self.step(SequenceSlice("a", [0] * count, 0, range(-(-count // self.runtime.limits.block_size)), False))

    def sample(self, rows: int, batch: SamplingBatch) -> StepResult:
        """Sample from the output's rows at positions 0 .. rows-1, as that many sequences."""
        blocks = range(-(-rows // self.runtime.limits.block_size))
        plan = StepPlan(tuple(SequenceSlice(str(i), [0], i, blocks, True) for i in range(rows)))
        return self.runtime.execute(plan, batch).result()

    def score(self, targets: Sequence[int], top: int) -> TokenScores:
        """Log-probabilities of tokens in the output's rows at positions 0 .. , as one sequence."""
        count = len(targets)
        blocks = range(-(-count // self.runtime.limits.block_size))
        piece = SequenceSlice("a", [0] * count, 0, blocks, False, targets, top)
        return self.runtime.execute(StepPlan((piece,)), greedy(0)).result().scores["a"]


def greedy(rows: int) -> SamplingBatch:
    """Greedy sampling of some rows."""
    return SamplingBatch(np.zeros(rows, np.float32), np.zeros(rows, np.uint64), np.zeros(rows, np.int64))


def run(sketch: Sketch, output: str, variant: Variant, rows: Sequence[int], **options: Any) -> list[Floats]:
    """The output at positions 0 .. M-1 for every M of ``rows``."""
    native = Native(sketch, output, variant, max_tokens=max(rows), **options)
    found = [native.first_rows(count) for count in rows]
    native.runtime.close()
    return found


def looked_up_rows(packed: PackedLinear, width: int, variant: Variant) -> Floats:
    """Every row of a packed square table, as an embedding of each token id in one step."""
    sketch = Sketch()
    sketch.max_position = width
    native = Native(sketch, sketch.packed_embed(packed, width), variant, max_tokens=width)
    found = native.step(SequenceSlice("a", list(range(width)), 0, list(range(width // 16)), False))
    native.runtime.close()
    return found


def identity(width: int, bits: int, group: int) -> PackedLinear:
    """Codes of the identity matrix: what comes out of the linear is the quantised activation."""
    codes = np.eye(width, dtype=np.uint8)
    scales = np.ones((width, width // group if group > 0 else 1), np.float16)
    return pack_int(codes, scales, np.zeros(scales.shape, np.uint8), bits=bits, group=group, gated=False)


def quantization_is_right(found: Floats, x: Floats, group: int) -> bool:
    """Every value within half a step of its own, on a whole number of steps, the largest on step 127."""
    ok = True
    for begin in range(0, x.shape[1], group):
        part, got = x[:, begin : begin + group].astype(np.float64), found[:, begin : begin + group]
        top = np.abs(part).max(1, keepdims=True)
        steps = got / (top / 127)
        ok &= bool((np.abs(steps - np.rint(steps)) < 1e-3).all())
        ok &= bool((np.abs(got - part) <= 0.5001 * top / 127).all())
        ok &= bool((np.abs(np.abs(steps).max(1) - 127) < 1e-3).all())
    return ok
