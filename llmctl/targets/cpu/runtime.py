"""The CPU runtime: a Graph bound once to native kernels; a step is one native call. Imports neither torch nor
transformers."""

from __future__ import annotations

import ctypes as c
import logging
import time
from array import array
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmctl.engine.step import DoneStep, RuntimeLimits, SamplingBatch, StepPlan, StepResult, TokenScores
from llmctl.errors import HostMemoryError
from llmctl.graph.graph import Graph, Op
from llmctl.graph.kv_groups import group_of_layer, whole_context
from llmctl.targets.base import RuntimeSizes
from llmctl.targets.batch import BlockTables, FlatPlan, flatten, further_slots, token_adapters
from llmctl.targets.cpu.abi import (
    ACT,
    DTYPE,
    KEYS,
    KV_TYPE,
    MAX_KINDS,
    TILE,
    Choice,
    IntActs,
    Kind,
    KvDesc,
    LoraModule,
    Matrix,
    OpDesc,
    StepDesc,
    open_library,
)
from llmctl.targets.cpu.adapters import CpuAdapters
from llmctl.targets.cpu.binding import Lowering, hidden_view, logits_view
from llmctl.targets.cpu.layout import PackedLinear, kv_layer_bytes, pack_bias, padded_head
from llmctl.targets.cpu.operands import Bound, IntOperand, Routing, View, aligned, plan_arena
from llmctl.targets.cpu.packing import CpuWeights
from llmctl.targets.cpu.sampling import NativeSampling, logprobs_out
from llmctl.targets.lora import lora_graph
from llmctl.targets.rope import cos_sin_table

_MAX_LOGITS_BYTES = 32 * 2**20
logger = logging.getLogger(__name__)


_NO_SCORES = TokenScores.zeros(0), logprobs_out(TokenScores.zeros(0))
"""Of steps that score nothing, which most are: native code writes nothing there."""


class CpuRuntime:
    """Implements ``engine.step.Runtime`` on a native kernel library; ``execute`` returns when the step is done.

    Attributes:
        limits: KV blocks, block size, longest sequence, vocabulary.
        adapters: those that it was sized for; None: none.
        variant: which build of the kernels runs, e.g. ``avx512bf16``: the library's own, or the next where the system
            refuses what that needs.
        arena_bytes: activations and logits, allocated once.
        kv_bytes: the KV cache.
    """

    steps_in_flight: int = 1

    def __init__(
        self,
        graph: Graph,
        weights: CpuWeights,
        library: Path,
        sizes: RuntimeSizes,
        *,
        kv_dtype: str,
        threads: int,
        lora_dtype: str = "f32",
    ) -> None:
        """Plan the buffers, allocate arena and KV cache, bind the ops.

        Args:
            library: the compiled kernels. sizes: of cache and steps. kv_dtype: ``bf16``, ``f32`` or ``s8``.
            threads: native threads, the caller's included. lora_dtype: of adapters' matrices where operands are floats,
                ``bf16`` or ``f32``.

        Raises:
            ValueError: a block size that is not a multiple of ``KEYS``.
            UnsupportedModelError: an op without a native kernel.
            EngineLoadError: the library does not load here.
            HostMemoryError: memory or threads are spent.
        """
        if sizes.block_size % KEYS:
            raise ValueError(
                f"the CPU kernels need a block size that is a multiple of {KEYS}, found {sizes.block_size}"
            )
        self._groups = sizes.kv_groups or whole_context(graph)
        windows = tuple(group.window for group in self._groups)
        self.limits = RuntimeLimits(sizes.num_blocks, sizes.block_size, sizes.max_model_len, graph.vocab_size, windows)
        self.threads = threads
        self._library = open_library(library)
        self.variant = self._library.llmctl_variant().decode()
        refusal = self._library.llmctl_refusal().decode()
        self.kernels = f"{self.variant} ({refusal})" if refusal else ""
        if refusal:
            logger.warning("%s: the %s kernels run", refusal, self.variant)
        self._weights = weights
        self._keep: list[Any] = []
        self._ropes: dict[tuple[Any, ...], tuple[int, int]] = {}
        max_rows = max(1, min(sizes.max_num_seqs, _MAX_LOGITS_BYTES // (4 * graph.vocab_size)))
        self._max_tokens = sizes.max_num_batched_tokens
        plans = [_Plan(Lowering(graph, weights.linears), self._max_tokens, max_rows)]
        self.adapters: CpuAdapters | None = None
        if sizes.lora is not None:
            adapted = lora_graph(graph, sizes.lora)
            self.adapters = CpuAdapters(adapted, weights.linears, sizes.lora, lora_dtype)
            plans.append(_Plan(Lowering(adapted, weights.linears), self._max_tokens, max_rows))
        self._starts = {
            name: self._pointer(np.zeros(2 * routing.count + 2, np.int32))
            for plan in plans
            for name, routing in plan.lowering.routings.items()
        }
        self.arena_bytes = max(plan.size for plan in plans)
        self._arena = aligned(self.arena_bytes)
        ops = self._descriptors(plans[0])
        # Of steps without adapters, and of those with some.
        self._hidden = [self._rows_of(hidden_view(plan.lowering), graph.hidden_size) for plan in plans]
        kv, self.kv_bytes = self._allocate_cache(graph, kv_dtype)
        self._program = self._library.llmctl_create(
            ops,
            len(ops),
            kv,
            len(kv),
            sizes.block_size,
            sizes.max_num_batched_tokens,
            max_rows,
            sizes.max_model_len,
            graph.vocab_size,
            threads,
        )
        if not self._program:
            said = self._library.llmctl_create_error().decode(errors="replace")
            raise HostMemoryError(
                f"no memory or threads for a runtime of {threads} threads: {said}",
                fix="free memory, or raise the limit (ulimit -v, ulimit -u)",
            )
        for plan in plans[1:]:
            ops = self._descriptors(plan)
            if self._library.llmctl_adapt(self._program, ops, len(ops)):
                self.close()
                raise HostMemoryError("no memory for the ops of adapters", fix="free memory")
        self._sampling = NativeSampling(graph.vocab_size)
        self._tables = [BlockTables(sizes.max_num_seqs, self.limits, group) for group in range(len(windows))]

    def execute(self, plan: StepPlan, sampling: SamplingBatch) -> DoneStep:
        """Run one step.

        Raises:
            ValueError: a plan that ``flatten`` or ``BlockTables`` refuses, one with more tokens than the runtime was
                sized for, or sampling rows that do not match it.
        """
        flat = flatten(plan, self.limits)
        all_slots = array("q", flat.slots)
        for further in further_slots(plan, self.limits, flat.slots):
            all_slots.fromlist(further)
        for tables in self._tables:
            tables.update(plan)
        if len(flat.token_ids) > self._max_tokens:
            raise ValueError(f"{len(flat.token_ids)} tokens exceed the {self._max_tokens} this runtime was sized for")
        if len(sampling.temperature) != len(flat.rows):
            raise ValueError(f"expected {len(flat.rows)} sampling rows, found {len(sampling.temperature)}")
        rows, targets, tops = _logits_rows(plan, flat)
        scores, out = _NO_SCORES
        if targets:
            scores = TokenScores.zeros(len(targets), min(max(tops), self.limits.vocab_size))
            out = logprobs_out(scores)
        arrays = [array("i", flat.token_ids), array("i", flat.positions), all_slots]
        adapters = token_adapters(plan)
        arrays += [array("i", values) for values in (flat.query_start, rows, targets, tops, adapters)]
        token_ids, positions, slots, query_start, rows_at, targets_at, tops_at, adapters_at = (
            a.buffer_info()[0] for a in arrays
        )
        block_tables = (c.c_void_p * len(self._tables))(*[tables.address for tables in self._tables])
        step = StepDesc(
            tokens=len(flat.token_ids),
            seqs=len(plan.slices),
            rows=len(rows),
            token_ids=token_ids,
            positions=positions,
            slots=slots,
            query_start=query_start,
            block_tables=c.addressof(block_tables),
            max_blocks=self._tables[0].width,
            logits_rows=rows_at,
            targets=targets_at if targets else None,
            target_tops=tops_at,
            out=out,
            adapters=adapters_at if adapters else None,
        )
        desc = self._sampling.prepare(sampling)
        began = time.perf_counter()
        self._library.llmctl_step(self._program, c.byref(step), c.byref(desc))
        seconds = time.perf_counter() - began
        sampled, logprobs = self._sampling.results()
        hidden = self._hidden[1 if adapters else 0]
        pooled = {request: hidden[start:end].sum(0) for request, start, end in flat.pooled}
        split = _split_scores(plan, scores) if targets else {}
        return DoneStep(StepResult(sampled, logprobs, split, seconds, pooled=pooled))

    def profile(self) -> dict[str, float]:
        """Microseconds per op kind since the last call (as seen by the first thread, waiting included)."""
        out = (c.c_double * MAX_KINDS)()
        self._library.llmctl_profile(self._program, out)
        return {kind.name.lower(): out[kind] for kind in Kind if out[kind]}

    def weight_bytes(self) -> int:
        """Bytes of weights, without their scales, that linears have read since the last call."""
        return int(self._library.llmctl_weight_bytes(self._program))

    def close(self) -> None:
        """Stop the threads and free the memory; the runtime cannot be used afterwards."""
        if self._program:
            self._library.llmctl_destroy(self._program)
            self._program = None
            self._keep.clear()

    # binding

    def _descriptors(self, plan: _Plan) -> c.Array[OpDesc]:
        graph, bound = plan.lowering.graph, plan.bound
        assert logits_view(plan.lowering) == bound[-1].views["y"]
        return (OpDesc * len(bound))(*[self._describe(b, graph) for b in bound])

    def _describe(self, bound: Bound, graph: Graph) -> OpDesc:
        op, attrs = bound.op, bound.op.attrs
        desc = OpDesc(kind=int(bound.kind), on_rows=int(bound.on_rows))
        for name, view in bound.views.items():
            setattr(desc, name, self._matrix(view))
        desc.width = graph.buffers[op.inputs[0]].width
        for name in ("heads", "kv_heads", "head_dim", "window", "layer"):
            setattr(desc, name, int(attrs.get(name, 0)))
        for name in ("eps", "scale", "softcap"):
            setattr(desc, name, float(attrs.get(name, 0.0)))
        for name, operand in bound.operands.items():
            setattr(desc, name, self._acts(operand))
        if bound.x16 is not None and bound.packed is not None:
            desc.x16, desc.k = self._address(bound.x16.offset), bound.packed.columns
        if bound.routing is not None:
            desc.choice, desc.sorted = self._choice(bound.routing), int(bound.sorted)
        if bound.permutation is not None:
            desc.permutation = self._pointer(bound.permutation)
        if bound.kind in _FILLERS:
            _FILLERS[bound.kind](self, desc, bound, graph)
        return desc

    def _fill_embed(self, desc: OpDesc, bound: Bound, graph: Graph) -> None:
        name = bound.op.weights[0]
        if name in self._weights.tables:
            desc.w = self._pointer(self._weights.tables[name])
            desc.weight_dtype = DTYPE[self._weights.table_dtypes[name]]
        else:
            self._fill_packed(desc, self._weights.linears[name])
        desc.width = graph.buffers[bound.op.outputs[0]].width
        desc.scale = float(bound.op.attrs.get("scale", 1.0))

    def _fill_pos_embed(self, desc: OpDesc, bound: Bound, graph: Graph) -> None:
        self._fill_embed(desc, bound, graph)
        desc.offset = float(bound.op.attrs.get("offset", 0))

    def _fill_cap(self, desc: OpDesc, bound: Bound, graph: Graph) -> None:
        desc.width = graph.buffers[bound.op.outputs[0]].width
        desc.scale = float(bound.op.attrs.get("scale", 1.0))

    def _fill_rms_norm(self, desc: OpDesc, bound: Bound, graph: Graph) -> None:  # noqa: ARG002
        desc.w = self._vector(bound.op.weights[0])
        desc.offset = 1.0 if bound.op.attrs.get("plus_one") else 0.0

    def _fill_layer_norm(self, desc: OpDesc, bound: Bound, graph: Graph) -> None:
        self._fill_rms_norm(desc, bound, graph)
        if desc.offset:  # the kernel has no such form of it
            desc.w = self._pointer(self._weights.vectors[bound.op.weights[0]].astype(np.float32) + np.float32(1))
        if bound.op.weights[1]:
            desc.bias = self._vector(bound.op.weights[1])

    def _fill_act(self, desc: OpDesc, bound: Bound, graph: Graph) -> None:  # noqa: ARG002
        desc.act = ACT[str(bound.op.attrs["fn"])]

    def _fill_rope(self, desc: OpDesc, bound: Bound, graph: Graph) -> None:  # noqa: ARG002
        attrs = bound.op.attrs
        desc.cos, desc.sin = self._rope_table(bound.op)
        desc.rotary_dim, desc.neox = int(attrs["rotary_dim"]), int(attrs["style"] == "neox")
        desc.writes_kv = int("x3" in bound.views)

    def _fill_linear(self, desc: OpDesc, bound: Bound, graph: Graph) -> None:
        op, packed = bound.op, bound.packed
        assert packed is not None
        epilogue = str(op.attrs.get("epilogue", ""))
        desc.act = ACT[epilogue.removesuffix("_mul")]
        desc.n = sum(graph.buffers[o].width for o in op.outputs)
        self._fill_packed(desc, packed)
        if bound.places:
            self._fill_adapted(desc, bound)
        if len(op.weights) > 1 and op.weights[1]:
            bias = self._weights.vectors[op.weights[1]].astype(np.float32)
            desc.bias = self._pointer(pack_bias(bias, packed.rows, bool(epilogue)))

    def _fill_adapted(self, desc: OpDesc, bound: Bound) -> None:
        assert self.adapters is not None
        modules = (LoraModule * len(bound.places))()
        for module, place in zip(modules, bound.places, strict=True):
            slots = self.adapters.slots[place.op.name]
            module.first, module.stride, module.panels = place.first, place.stride, place.panels
            for name in ("a", "b", "scales", "ranks", "a_scales", "b_scales"):
                setattr(module, name, getattr(slots, name).ctypes.data)
        self._keep.append(modules)
        desc.lora, desc.num_lora = c.addressof(modules), len(modules)
        desc.lora_rank, desc.lora_dtype = bound.places[0].rank, DTYPE[self.adapters.kept_as(bound.places[0])]

    def _fill_route(self, desc: OpDesc, bound: Bound, graph: Graph) -> None:  # noqa: ARG002
        if bound.op.weights[0]:
            desc.bias = self._vector(bound.op.weights[0])

    def _fill_gather(self, desc: OpDesc, bound: Bound, graph: Graph) -> None:
        assert bound.routing is not None
        desc.width = graph.weights[bound.op.weights[0]].shape[1]

    def _fill_grouped(self, desc: OpDesc, bound: Bound, graph: Graph) -> None:
        op, packed, routing = bound.op, bound.packed, bound.routing
        assert packed is not None
        assert routing is not None
        desc.act = ACT[str(op.attrs.get("epilogue", "")).removesuffix("_mul")]
        desc.n = graph.buffers[op.outputs[0]].width // routing.top_k
        self._fill_packed(desc, packed)
        desc.n_padded = packed.rows // routing.count
        desc.x.ld, desc.y.ld = packed.columns, desc.n

    def _fill_weighted_sum(self, desc: OpDesc, bound: Bound, graph: Graph) -> None:
        desc.width = graph.buffers[bound.op.outputs[0]].width
        desc.choice.top_k = graph.buffers[bound.op.inputs[1]].width
        desc.choice.sigmoid = int(bool(bound.op.attrs.get("sigmoid")))

    def _choice(self, routing: Routing) -> Choice:
        attrs, starts = routing.attrs, self._starts[routing.experts.name]
        experts, order, place = (self._address(storage.offset) for storage in routing.storages)
        return Choice(
            experts, order, place, starts, routing.count, routing.top_k, attrs["groups"], attrs["top_groups"],
            int(attrs["scores"] == "sigmoid"), int(attrs["renormalise"]),
        )  # fmt: skip

    def _fill_packed(self, desc: OpDesc, packed: PackedLinear) -> None:
        desc.weight_dtype = DTYPE[packed.dtype]
        desc.n_padded, desc.k, desc.group = packed.rows, packed.columns, packed.group
        desc.zero_step = 0 if packed.one_zero else TILE
        desc.w = self._pointer(packed.data)
        scales = "w_scales" if packed.integer else "w_scales32"
        desc.nested, desc.nested_bits, desc.code_bits = packed.nested, packed.nested_bits, packed.code_bits
        desc.scale_rows = packed.scale_rows
        planes = {"w_zeros": packed.zeros, "w_minimums": packed.minimums, "w_book": packed.book, scales: packed.scales}
        supers = "w_scale_supers" if packed.integer else "w_scale_supers32"
        planes |= {"w_scale_codes": packed.scale_codes, supers: packed.scale_supers}
        planes |= {"w_scale_starts": packed.scale_starts, "w_scale_map": packed.scale_map}
        for field, plane in planes.items():
            if plane is not None:
                setattr(desc, field, self._pointer(plane))

    def _rope_table(self, op: Op) -> tuple[int, int]:
        attrs = {k: v for k, v in op.attrs.items() if k not in ("layer", "heads", "kv_heads", "head_dim", "style")}
        key = tuple(sorted(attrs.items()))
        if key not in self._ropes:
            cos, sin = cos_sin_table(attrs, self.limits.max_model_len)
            self._ropes[key] = (self._pointer(cos), self._pointer(sin))
        return self._ropes[key]

    def _allocate_cache(self, graph: Graph, dtype: str) -> tuple[c.Array[KvDesc], int]:
        blocks = self.limits.num_blocks + any(self.limits.windows)  # the null block
        # Layers at the same place of their groups share their memory: a block is held for one group at a time.
        places = {layer: place for group in self._groups for place, layer in enumerate(group.layers)}
        bases: dict[int, int] = {}
        descs, total, group_of = [], 0, group_of_layer(self._groups)
        for index, layer in enumerate(graph.kv):
            place = places[index]
            if place not in bases:
                size = blocks * self.limits.block_size * kv_layer_bytes(layer, dtype)
                # Zero pages: a never-written lane of a tile meets a weight of 0, and 0 * NaN would be NaN. So does what
                # a segment has before a window: the null block, or keys that this sequence wrote.
                bases[place] = self._pointer(aligned(size))
                total += size
            kind = KV_TYPE[dtype], group_of[index]
            descs.append(KvDesc(bases[place], layer.kv_heads, layer.head_dim, padded_head(layer), *kind))
        return (KvDesc * len(descs))(*descs), total

    def _matrix(self, view: View) -> Matrix:
        return Matrix(self._address(view.storage.offset) + 4 * view.column, view.ld)

    def _rows_of(self, view: View, width: int) -> NDArray[np.float32]:
        """The matrix [tokens, width] as numpy reads it."""
        start = view.storage.offset
        whole = self._arena[start : start + 4 * view.ld * self._max_tokens].view(np.float32)
        return whole.reshape(self._max_tokens, view.ld)[:, view.column : view.column + width]

    def _acts(self, operand: IntOperand) -> IntActs:
        addresses = [self._address(s.offset) for s in operand.storages]
        return IntActs(*addresses, operand.columns, operand.group, operand.wide, operand.grouped)

    def _address(self, offset: int) -> int:
        return int(self._arena.ctypes.data) + offset

    def _vector(self, name: str) -> int:
        return self._pointer(np.ascontiguousarray(self._weights.vectors[name], np.float32))

    def _pointer(self, array: NDArray[Any]) -> int:
        assert array.flags.c_contiguous
        self._keep.append(array)
        return int(array.ctypes.data)


class _Plan:
    """A graph lowered, and its storages placed; ``size``: bytes of the arena."""

    def __init__(self, lowering: Lowering, max_tokens: int, max_rows: int) -> None:
        self.lowering, self.bound = lowering, lowering.run()
        self.size = plan_arena(lowering.storages, max_tokens, max_rows)


def _logits_rows(plan: StepPlan, flat: FlatPlan) -> tuple[list[int], list[int], list[int]]:
    """Rows whose logits are made, and per row the id whose log-probability is wanted (-1: the row is sampled) and how
    many of the most likely ones.

    No targets at all mean that every row is sampled.
    """
    if not flat.scored:
        return flat.rows, [], []
    rows: list[int] = []
    targets: list[int] = []
    tops: list[int] = []
    for piece, first in zip(plan.slices, flat.query_start, strict=False):
        wanted = piece.score_targets or ()
        rows += range(first, first + len(wanted))
        targets += wanted
        tops += [piece.score_top] * len(wanted)
        if piece.sample:
            rows.append(first + len(piece.token_ids) - 1)
            targets.append(-1)
            tops.append(0)
    return rows, targets, tops


_FILLERS: Mapping[Kind, Callable[[CpuRuntime, OpDesc, Bound, Graph], None]] = {
    Kind.EMBED: CpuRuntime._fill_embed,
    Kind.POS_EMBED: CpuRuntime._fill_pos_embed,
    Kind.RMS_NORM: CpuRuntime._fill_rms_norm,
    Kind.LAYER_NORM: CpuRuntime._fill_layer_norm,
    Kind.HEAD_RMS_NORM: CpuRuntime._fill_rms_norm,
    Kind.LINEAR: CpuRuntime._fill_linear,
    Kind.ACT: CpuRuntime._fill_act,
    Kind.CAP: CpuRuntime._fill_cap,
    Kind.ROPE: CpuRuntime._fill_rope,
    Kind.ROUTE: CpuRuntime._fill_route,
    Kind.GATHER_EXPERTS: CpuRuntime._fill_gather,
    Kind.GROUPED_LINEAR: CpuRuntime._fill_grouped,
    Kind.WEIGHTED_SUM: CpuRuntime._fill_weighted_sum,
}
"""What writes the fields of a descriptor that not every kind has."""


def _split_scores(plan: StepPlan, scores: TokenScores) -> dict[str, TokenScores]:
    """The scores of each slice that has score targets; of rows in the order of ``_logits_rows``."""
    out: dict[str, TokenScores] = {}
    at = 0
    for piece in plan.slices:
        if piece.score_targets is not None:
            out[piece.request_id] = scores.part(at, len(piece.score_targets), piece.score_top)
            at += len(piece.score_targets)
        at += piece.sample
    return out
