"""The CUDA runtime: a graph bound to kernels over planned buffers; decode steps replayed as CUDA graphs.

A step is staged in page-locked memory, copied to fixed places on the device, run, sampled there; its token ids stay on
the device for the next step, which may be started before this one is done, and come to the host beside it. Everything
is in one stream, in order, so that steps need no other synchronisation among themselves.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmctl.engine.step import (
    IN_FLIGHT,
    RuntimeLimits,
    SamplingBatch,
    SequenceSlice,
    StepPlan,
)
from llmctl.graph.graph import LOGITS, Graph, Op
from llmctl.graph.kv_groups import group_of_layer, whole_context
from llmctl.targets.base import BuildOptions, KernelChoice, RuntimeSizes
from llmctl.targets.batch import FlatPlan, PooledRows, build_batch, flatten, further_slots
from llmctl.targets.cuda.buckets import context_width, padded, sequence_buckets
from llmctl.targets.cuda.buffers import SCRATCH_DTYPES, plan_buffers, scratch_sizes
from llmctl.targets.cuda.caches import allocate_caches
from llmctl.targets.cuda.errors import device_errors
from llmctl.targets.cuda.fallback import Fallbacks, dequantized
from llmctl.targets.cuda.inputs import InputArena, Staging, StepShape
from llmctl.targets.cuda.ops import Scratch
from llmctl.targets.cuda.pending import CudaStep, Execution, Scores
from llmctl.targets.cuda.program import LaunchMachine, Model, Program, Weights, torch_dtype
from llmctl.targets.cuda.queue import CudaQueue, HostQueue, Queue
from llmctl.targets.cuda.registry import choose_all
from llmctl.targets.cuda.sampling import DeviceSampler
from llmctl.targets.cuda.weights import device_weights
from llmctl.targets.lora import lora_graph
from llmctl.targets.reference.adapters import StackedAdapters
from llmctl.targets.reference.kernels import AdapterWeights
from llmctl.targets.rope import cos_sin_table

STEPS_IN_FLIGHT = 2
_PROGRAMS = 256
"""Bound programs that are kept, the latest used: about half a megabyte each for 32 layers."""


class CudaRuntime:
    """Implements ``engine.step.Runtime`` on CUDA kernels; ``execute`` returns when the step is started.

    Attributes:
        limits: KV blocks, block size, longest sequence, vocabulary.
        adapters: those that it was sized for; None: none.
        steps_in_flight: steps that may be started before the first one's result is asked for.
        caches: KV cache by layer, as ``caches.Caches`` has them.
    """

    def __init__(
        self,
        graph: Graph,
        options: BuildOptions,
        planes: Mapping[str, Tensor],
        sizes: RuntimeSizes,
        machine: LaunchMachine,
        *,
        device: str = "cuda",
        lora: Mapping[str, AdapterWeights] | None = None,
        adapter_of: Callable[[SequenceSlice], int] = lambda piece: piece.adapter,
    ) -> None:
        """Plan and allocate buffers and KV cache, bind and capture the decode steps.

        Args:
            planes: on the device, by name: those of ``CudaTarget.planes``.
            machine: with a module for every kernel that the registry chooses.
            device: ``cuda``, or ``cpu`` for a machine that works in host memory.
            lora: adapters by lora op, of a graph that has such ops; ``sizes.lora`` inserts ops, and makes ``adapters``.
            adapter_of: which of them a slice uses; -1: none.
        """
        self._queue: Queue = CudaQueue(machine) if device == "cuda" else HostQueue(machine)
        self.adapters = None
        if sizes.lora is not None:
            graph = lora_graph(graph, sizes.lora)
            dtype, place = torch_dtype(options.dtype), self._queue.device
            with self._queue.active():
                self.adapters = StackedAdapters(graph, sizes.lora, dtype, place, self._queue.active)
            lora = self.adapters.weights
        self._lora, self._adapter_of = lora or {}, adapter_of
        # A step has no more sequences than tokens.
        sizes = replace(sizes, max_num_seqs=min(sizes.max_num_seqs, sizes.max_num_batched_tokens))
        self._graph, self._options, self._sizes = graph, options, sizes
        self._groups = sizes.kv_groups or whole_context(graph)
        windows = tuple(group.window for group in self._groups)
        self.limits = RuntimeLimits(sizes.num_blocks, sizes.block_size, sizes.max_model_len, graph.vocab_size, windows)
        self.steps_in_flight, self.kernels = STEPS_IN_FLIGHT, ""
        self._ropes: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
        self._programs: OrderedDict[StepShape, Program] = OrderedDict()
        self._heads: dict[tuple[int, bool], Program] = {}
        self._graphs: dict[tuple[int, int], Callable[[], Any]] = {}
        self._buckets = sequence_buckets(sizes.max_num_seqs)
        self._row_of: dict[str, int] = {}
        self._turn = 0
        with self._queue.active(), torch.inference_mode():
            self._arena = InputArena(sizes.max_num_batched_tokens, sizes.max_num_seqs, self.limits, self._queue.device)
            self._slots = [self._staging() for _ in range(STEPS_IN_FLIGHT)]
            self._results = [self._queue.host_memory(4 * sizes.max_num_seqs).view(torch.int32) for _ in self._slots]
            self._steps: list[CudaStep | None] = [None] * STEPS_IN_FLIGHT
            self._sampler = DeviceSampler(self._queue, self._arena, sizes.max_num_seqs, graph.vocab_size)
            weights = device_weights(graph, planes)
            weights |= dequantized(graph, planes, weights, torch_dtype(options.dtype))
            chosen = choose_all(graph, options.dtype, options.kv_cache_dtype, sizes.block_size)
            choices = {choice.op: choice for choice in chosen}
            self._fallbacks = Fallbacks(graph, choices, weights, options, self._queue.device)
            self._model = self._make_model(choices, weights)
            if self._captures:
                self._capture_all()

    @property
    def caches(self) -> Mapping[int, Tensor]:
        """See the class."""
        return self._model.caches

    # -- a step -----------------------------------------------------------------------------------------------

    def execute(self, plan: StepPlan, sampling: SamplingBatch) -> CudaStep:
        """Start one step.

        Raises:
            ValueError: a plan that ``flatten`` refuses, with more tokens or sequences than the runtime was sized for,
                or that takes up a token which no step has sampled; sampling rows that do not match it.
            DeviceError: the device failed, in this step or in an earlier one.
        """
        flat = flatten(plan, self.limits, may_feed=True)
        self._check(plan, flat, sampling)
        further = further_slots(plan, self.limits, flat.slots)
        staging, turn = self._next_staging()
        shape, decode = self._shape(plan, flat)
        rows = self._padded(len(flat.rows), self._buckets) if flat.rows else 0
        if self._fallbacks.executors:
            batch = build_batch(plan, self.limits, may_feed=True)
            self._fallbacks.begin(batch, self._model.caches, self._model.group_of)
        staging.block_tables(shape, plan)
        staging.tokens(shape, flat, further, self._fed(plan, flat), self._adapters(plan))
        staging.rows(flat, sampling, rows)
        with device_errors(), self._abandoning(), self._queue.active(), torch.inference_mode():
            began = self._queue.mark()
            staging.send(shape)
            execution, logits = self._compute(shape, decode, rows)
            scores = self._score(plan, flat) if flat.scored else []
            pooled = self._pool(flat.pooled) if flat.pooled else {}
            sampled = None
            if rows:
                if logits is None:
                    if flat.scored:  # scoring has put its own rows there
                        self._arena.row_view("rows", rows).copy_(staging.sent_rows(rows), non_blocking=True)
                    logits = self._head(rows, every=False)
                sampled = self._sampler.start(sampling, logits, self._results[turn])
            step = CudaStep(sampled, scores, pooled, began, self._queue.mark(), execution)
        self._row_of = {p.request_id: i for i, p in enumerate(p for p in plan.slices if p.sample)}
        self._steps[turn] = step
        return step

    def logits(self, plan: StepPlan) -> Tensor:
        """Run one step and return float32 logits [R, vocab] of the sampled rows, on the host; for tests."""
        rows = sum(piece.sample for piece in plan.slices)
        self.execute(plan, _greedy(rows)).result()
        with self._queue.active():
            return self._model.buffers.view(LOGITS, rows).float().cpu()

    def decode_replay(self, batch: int, context: int) -> Callable[[], None]:
        """What starts one decode step of ``batch`` sequences again and again, as the engine would; for timing.

        Args:
            context: tokens of each sequence. Where the pool is too small for all of them they share blocks.
        """
        blocks, limits, groups = -(-context // self.limits.block_size), self.limits, len(self._groups)
        tables = [tuple((i * blocks + j) % limits.num_blocks for j in range(blocks)) for i in range(batch * groups)]
        pieces = []
        for i in range(batch):
            first, *more = tables[i * groups : (i + 1) * groups]
            ids = (i % limits.vocab_size,)
            pieces.append(SequenceSlice(str(i), ids, context - 1, first, True, more_block_ids=tuple(more)))
        plan = StepPlan(tuple(pieces))
        greedy = _greedy(batch)
        self.execute(plan, greedy).result()
        shape, _ = self._shape(plan, flatten(plan, limits))
        rows = self._padded(batch, self._buckets)

        def run() -> None:
            with self._queue.active(), torch.inference_mode():
                self._compute(shape, True, rows)
                self._sampler.start(greedy, self._logits(rows), self._results[0])

        return run

    def chosen_experts(self, plan: StepPlan, sampling: SamplingBatch) -> dict[str, int]:
        """How many experts a step's tokens, padding left out, choose together, by ``chosen`` buffer; runs it twice."""
        self.execute(plan, sampling).result()
        flat = flatten(plan, self.limits)
        routes, found = (op.outputs[0] for op in self._graph.ops if op.kind == "route"), {}
        with self._queue.active(), torch.inference_mode():
            program = self._body(self._shape(plan, flat)[0])
            for start, entry in zip(program.launches, program.entries, strict=True):
                start()
                if entry.startswith("route_"):  # the next layer's choices may lie in the same place
                    name = next(routes)
                    found[name] = len(self._model.buffers.view(name, len(flat.token_ids)).unique())
        return found

    def step_launches(self, tokens: int, sequences: int) -> tuple[str, ...]:
        """What a step starts, in order: entry points, and ``torch.<operator>``; a decode step where both are equal."""
        width, seats = context_width(1, self.limits), self._padded(sequences, self._buckets)
        decode = tokens == sequences
        shape = StepShape(seats if decode else self._padded(tokens), seats, width, not decode, decode)
        return self._body(shape).entries + self._head_program(seats, decode).entries

    def run_largest(self) -> bool:
        """Start a step of the largest size over nothing but padding: what it allocates, every later one finds.

        False, and nothing is started, where torch's operators execute some ops: they could not run over padding.
        """
        if self._fallbacks.executors:
            return False
        sizes = self._sizes
        width = context_width(sizes.max_model_len, self.limits)
        shape = StepShape(sizes.max_num_batched_tokens, sizes.max_num_seqs, width, True, True)
        with self._queue.active(), torch.inference_mode():
            views = self._arena.views(shape)
            for name in ("slots", "source"):
                views[name].fill_(-1)
            self._run_body(shape)
            self._head(sizes.max_num_seqs, every=False)
        return True

    def close(self) -> None:
        """Free the device's memory."""
        for step in self._steps:
            if step is not None:
                step.result()
        for name in ("_programs", "_heads", "_graphs", "_model", "_sampler", "_arena", "_slots", "_results", "_steps"):
            delattr(self, name)
        if self._queue.device == "cuda":
            torch.cuda.empty_cache()

    @contextlib.contextmanager
    def _abandoning(self) -> Iterator[None]:
        """Around starting a step: where that fails half-way, what was started of it is waited for, because its staging
        is used again, and nothing can be fed from what may be its tokens."""
        try:
            yield
        except Exception:
            self._row_of = {}
            with contextlib.suppress(Exception):  # a device that is lost says so again
                self._queue.mark().wait()
            raise

    def _check(self, plan: StepPlan, flat: FlatPlan, sampling: SamplingBatch) -> None:
        sizes = self._sizes
        if len(flat.token_ids) > sizes.max_num_batched_tokens:
            raise ValueError(
                f"{len(flat.token_ids)} tokens exceed the {sizes.max_num_batched_tokens} this runtime was sized for"
            )
        if len(plan.slices) > sizes.max_num_seqs:
            raise ValueError(f"{len(plan.slices)} sequences exceed the {sizes.max_num_seqs} this runtime was sized for")
        if len(sampling.temperature) != len(flat.rows):
            raise ValueError(f"expected {len(flat.rows)} sampling rows, found {len(sampling.temperature)}")

    def _fed(self, plan: StepPlan, flat: FlatPlan) -> dict[int, int]:
        """Index of each token in flight -> row of the step before that samples it."""
        found = {}
        for piece, start in zip(plan.slices, flat.query_start, strict=False):
            if flat.token_ids[start] == IN_FLIGHT:
                if piece.request_id not in self._row_of:
                    raise ValueError(f"request {piece.request_id}: the step before sampled no token for it")
                found[start] = self._row_of[piece.request_id]
        return found

    def _adapters(self, plan: StepPlan) -> list[int]:
        if not self._lora:
            return []
        return [self._adapter_of(piece) for piece in plan.slices for _ in piece.token_ids]

    def _next_staging(self) -> tuple[Staging, int]:
        """The staging of the oldest step, which is done and whose result is kept: its memory is used again."""
        turn = self._turn
        self._turn = (turn + 1) % STEPS_IN_FLIGHT
        step = self._steps[turn]
        if step is not None:
            step.result()
        return self._slots[turn], turn

    def _shape(self, plan: StepPlan, flat: FlatPlan) -> tuple[StepShape, bool]:
        """The shape that a plan is padded to, and whether it is a decode step: a row a sequence, all sampled."""
        tokens, sequences = len(flat.token_ids), len(plan.slices)
        counts = [b - a for a, b in zip(flat.query_start, flat.query_start[1:], strict=False)]
        longest = max(p.start + n for p, n in zip(plan.slices, counts, strict=True))
        width = context_width(longest, self.limits)
        seats = self._padded(sequences, self._buckets)
        if tokens == sequences:
            return StepShape(seats, seats, width, False, True), not flat.scored and len(flat.rows) == tokens
        most = self._sizes.max_num_batched_tokens
        return StepShape(min(self._padded(tokens), most), seats, width, True, 1 in counts), False

    def _compute(self, shape: StepShape, decode: bool, rows: int) -> tuple[Execution, Tensor | None]:
        """Start the model; the logits too, of a decode step. How it was executed, and the logits [rows, vocab]."""
        if not decode:
            self._run_body(shape)
            return "eager", None
        if not self._captures:
            self._run_body(shape)
            self._head_program(shape.tokens, True)()
            return "eager", self._logits(rows)
        self._graph_of(shape.tokens, shape.width)()
        return "graph", self._logits(rows)

    def _head(self, rows: int, every: bool) -> Tensor:
        self._head_program(rows, every)()
        return self._logits(rows)

    def _logits(self, rows: int) -> Tensor:
        return self._model.buffers.view(LOGITS, rows)

    def _score(self, plan: StepPlan, flat: FlatPlan) -> list[Scores]:
        """Log-probabilities of every score target, as many rows at a time as logits have room for."""
        most = self._sizes.max_num_seqs
        found = []
        for piece, first in zip(plan.slices, flat.query_start, strict=False):
            if piece.score_targets is None:
                continue
            parts = []
            targets = np.array(piece.score_targets, np.int32)
            for start in range(0, len(targets), most):
                wanted = targets[start : start + most]
                rows = np.arange(first + start, first + start + len(wanted), dtype=np.int64)
                count = self._padded(len(wanted), self._buckets)
                view = self._arena.row_view("rows", count)
                view.zero_()
                view[: len(rows)].copy_(self._queue.upload(rows))
                logits = self._head(count, every=False)
                parts.append(self._sampler.describe(logits, self._queue.upload(wanted), piece.score_top))
            top = min(piece.score_top, self.limits.vocab_size)
            found.append(Scores(piece.request_id, len(targets), top, tuple(parts)))
        return found

    def _pool(self, pooled: Sequence[PooledRows]) -> dict[str, Tensor]:
        """f32 [hidden size] of each: its rows' hidden states, added up, on their way to the host."""
        gather = self._graph.ops[self._graph.gather_index()]
        hidden = self._model.buffers.view(gather.inputs[0], self._sizes.max_num_batched_tokens)
        sums = [hidden[start:end].sum(0, dtype=torch.float32) for _, start, end in pooled]
        rows = self._queue.download(torch.stack(sums))
        return {request: rows[i] for i, (request, _, _) in enumerate(pooled)}

    # -- programs ---------------------------------------------------------------------------------------------

    @property
    def _captures(self) -> bool:
        """Whether decode steps are replayed: torch's operators allocate, and wait for the host."""
        return not (self._sizes.enforce_eager or self._fallbacks.executors)

    def _padded(self, count: int, buckets: Sequence[int] = ()) -> int:
        """What a number of tokens, sequences or rows is padded to; torch's operators are given no padding."""
        return count if self._fallbacks.executors else padded(count, buckets)

    def _run_body(self, shape: StepShape) -> None:
        """Run the model up to the hidden states; a program that is not there yet runs while it is bound."""
        if shape in self._programs:
            self._body(shape)()
        else:
            self._body(shape, run=True)

    def _body(self, shape: StepShape, *, run: bool = False) -> Program:
        """The program up to the hidden states; bound at its first use, and then run too where that is asked for."""
        program = self._programs.get(shape)
        if program is None:
            inputs, tokens = self._arena.views(shape), self._sampler.tokens
            program = self._model.bind(self._queue.machine, shape, inputs, tokens, run=run)
            self._programs[shape] = program
            if len(self._programs) > _PROGRAMS:
                self._programs.popitem(last=False)
        self._programs.move_to_end(shape)
        return program

    def _head_program(self, rows: int, every: bool) -> Program:
        key = rows, every
        if key not in self._heads:
            self._heads[key] = self._model.bind_head(self._queue.machine, self._arena.row_view("rows", rows), every)
        return self._heads[key]

    def _graph_of(self, bucket: int, width: int) -> Callable[[], Any]:
        """What replays the decode step of a bucket; captured at its first use where that was not done at the start."""
        key = bucket, width
        if key not in self._graphs:
            body, head = self._body(StepShape(bucket, bucket, width, False, True)), self._head_program(bucket, True)

            def run() -> None:
                body()
                head()

            self._graphs[key] = self._queue.capture(run)
        return self._graphs[key]

    def _capture_all(self) -> None:
        """Capture every bucket, the largest first, so that smaller ones find its memory in the pool."""
        width = context_width(1, self.limits)
        self._warm_up(width)
        for bucket in reversed(self._buckets):
            self._graph_of(bucket, width)

    def _warm_up(self, width: int) -> None:
        """One eager step of padding alone: libraries make their handles and workspaces, which capturing forbids."""
        bucket = self._buckets[-1]
        shape = StepShape(bucket, bucket, width, False, True)
        views = self._arena.views(shape)
        views["slots"].fill_(-1)
        views["source"].fill_(-1)
        self._run_body(shape)
        self._head_program(bucket, True)()

    # -- what is allocated ------------------------------------------------------------------------------------

    def _staging(self) -> Staging:
        arena = self._arena
        tables = self._queue.host_memory(4 * arena.tables.numel()).view(torch.int32)
        return Staging(arena, self._queue.host_memory(arena.size), tables)

    def _make_model(self, choices: Mapping[str, KernelChoice], weights: Weights) -> Model:
        graph, options, sizes = self._graph, self._options, self._sizes
        device = self._queue.device
        scratch = Scratch(device)
        for name, size in scratch_sizes(graph, options.dtype, sizes, self._queue.sms).items():
            scratch.take(name, torch_dtype(SCRATCH_DTYPES.get(name, options.dtype)), size)
        scratch.freeze()
        caches = allocate_caches(graph, self._groups, self.limits, options.kv_cache_dtype, device)
        return Model(
            graph, choices, weights, plan_buffers(graph, options.dtype).allocate(
                sizes.max_num_batched_tokens, sizes.max_num_seqs, device
            ), scratch, caches.values, caches.scales, self._rope, self.limits, self._queue.sms,
            self._fallbacks.executors, self._lora, group_of_layer(self._groups),
        )  # fmt: skip

    def _rope(self, op: Op) -> tuple[Tensor, Tensor]:
        """cos and sin f32 [positions, R / 2] of an op; one table for all ops that turn alike."""
        attrs = {k: v for k, v in op.attrs.items() if k not in ("layer", "heads", "kv_heads")}
        key = tuple(sorted(attrs.items()))
        if key not in self._ropes:
            tables = cos_sin_table(attrs, self.limits.max_model_len)
            cos, sin = (torch.from_numpy(t).to(self._queue.device) for t in tables)
            self._ropes[key] = cos, sin
        return self._ropes[key]


def _greedy(rows: int) -> SamplingBatch:
    return SamplingBatch(np.zeros(rows, np.float32), np.zeros(rows, np.uint64), np.zeros(rows, np.int64))
