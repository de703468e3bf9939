"""The reference runtime: plain torch, op by op, over a paged KV cache. The oracle in tests, the fall-back anywhere."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmctl.engine.step import DoneStep, LoraLimits, RuntimeLimits, SamplingBatch, StepPlan, StepResult, TokenScores
from llmctl.graph.dtypes import COMPUTE_DTYPES, DTYPES
from llmctl.graph.graph import LOGITS, Graph
from llmctl.graph.kv_groups import KVGroup, group_of_layer, whole_context
from llmctl.targets.batch import Batch, build_batch, token_adapters
from llmctl.targets.lora import lora_graph
from llmctl.targets.reference.adapters import StackedAdapters
from llmctl.targets.reference.context import StepContext, allocate_shared_cache
from llmctl.targets.reference.interpreter import Interpreter
from llmctl.targets.reference.logprobs import describe
from llmctl.targets.reference.sampler import sample

# Logits of scored rows are made this many bytes at a time: a vocabulary of 150k float32 is 0.6 MB a row.
_SCORE_BYTES = 64 * 2**20


class ReferenceRuntime:
    """Implements ``engine.step.Runtime`` with the reference kernels; ``execute`` returns when the step is done.

    Attributes:
        limits: KV blocks, block size, longest sequence, vocabulary.
        adapters: those that it was sized for; None: none.
        interpreter: the bound graph.
        cache: KV cache by layer, ``[2, num_blocks, block_size, kv_heads, head_dim]`` in the compute dtype, with a block
            more, the null block, where a group has a window; layers of different groups share one.
    """

    steps_in_flight: int = 1
    kernels: str = ""

    def __init__(
        self,
        graph: Graph,
        weights: Mapping[str, Any],
        *,
        num_blocks: int,
        block_size: int = 16,
        max_model_len: int | None = None,
        dtype: str = "float32",
        threads: int | None = None,
        device: str = "cpu",
        lora: LoraLimits | None = None,
        kv_groups: Sequence[KVGroup] = (),
    ) -> None:
        """Allocate the KV cache and convert every weight to ``dtype``.

        Args:
            weights: Weight name -> dense Tensor or QuantizedWeight.
            max_model_len: longest sequence, tokens; None means what the model was made for or the cache can hold.
            dtype: compute dtype: float32, bfloat16 or float16.
            threads: torch's intra-op threads for the whole process; None leaves them as they are.
            lora: adapters to have room for. Their ops are inserted into ``graph``.
            kv_groups: which layers share a block table; none given: all.

        Raises:
            UsageError: as ``lora_graph``.
            ValueError: unknown dtype, a size that is not positive, a max_model_len the model cannot do, a weight of
                another shape than the graph's.
        """
        if dtype not in COMPUTE_DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(COMPUTE_DTYPES)}, found '{dtype}'")
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks and block_size must be positive, found {num_blocks} and {block_size}")
        if max_model_len is None:
            max_model_len = min(graph.max_position, num_blocks * block_size)
        if not 1 <= max_model_len <= graph.max_position:
            raise ValueError(f"max_model_len must be in 1..{graph.max_position}, found {max_model_len}")
        if threads is not None:
            torch.set_num_threads(threads)
        groups = tuple(kv_groups) or whole_context(graph)
        windows = tuple(group.window for group in groups)
        self.limits = RuntimeLimits(num_blocks, block_size, max_model_len, graph.vocab_size, windows)
        self._group_of_layer = group_of_layer(groups)
        element = getattr(torch, DTYPES[dtype].torch)
        if lora is not None:
            graph = lora_graph(graph, lora)
        self.adapters = None if lora is None else StackedAdapters(graph, lora, element, device)
        self.interpreter = Interpreter(graph, weights, element, device)
        if self.adapters is not None:
            self.interpreter.adapters.update(self.adapters.weights)
        self.cache = allocate_shared_cache(graph, groups, num_blocks + any(windows), block_size, element, device)
        gather = graph.gather_index()
        self._hidden = graph.ops[gather].inputs[0]
        self._body = self.interpreter.program(graph.ops[:gather], keep=(self._hidden,))
        self._head = self.interpreter.program(graph.ops[gather:], keep=(self._hidden, LOGITS))

    @torch.inference_mode()
    def execute(self, plan: StepPlan, sampling: SamplingBatch) -> DoneStep:
        """Run one step.

        Raises:
            ValueError: a plan that ``build_batch`` refuses, or sampling rows that do not match it.
        """
        began = time.perf_counter()
        batch = build_batch(plan, self.limits)
        rows = len(batch.logits_indices)
        if len(sampling.temperature) != rows:
            raise ValueError(f"expected {rows} sampling rows, one per sampled slice; found {len(sampling.temperature)}")
        ctx = self._context(plan, batch)
        env = self._body(ctx.inputs(), ctx)
        hidden = env[self._hidden]
        scores = self._scores(plan, batch, hidden, ctx)
        pooled = {
            request: hidden[start:end].sum(0, dtype=torch.float32).cpu().numpy() for request, start, end in batch.pooled
        }
        token_ids, logprobs = np.zeros(0, np.int32), None
        if rows:
            logits = self._logits(hidden, ctx.tensor(batch.logits_indices), ctx)
            token_ids, logprobs = sample(logits, sampling)
        return DoneStep(StepResult(token_ids, logprobs, scores, time.perf_counter() - began, pooled=pooled))

    @torch.inference_mode()
    def logits(self, plan: StepPlan, *, all_rows: bool = False) -> Tensor:
        """Run one step and return float32 logits ``[R, vocab]`` of the sampled rows, or of every token's row."""
        batch = build_batch(plan, self.limits)
        ctx = self._context(plan, batch)
        env = self._body(ctx.inputs(), ctx)
        rows = np.arange(batch.num_tokens) if all_rows else batch.logits_indices
        return self._logits(env[self._hidden], ctx.tensor(rows), ctx)

    def close(self) -> None:
        """Drop weights and cache; the runtime cannot be used afterwards."""
        del self.interpreter, self.cache, self._body, self._head

    def _context(self, plan: StepPlan, batch: Batch) -> StepContext:
        ctx = self.interpreter.context(batch, self.cache, self._group_of_layer)
        if adapters := token_adapters(plan):
            ctx.adapters = torch.tensor(adapters, dtype=torch.int32, device=ctx.device)
        return ctx

    def _logits(self, hidden: Tensor, rows: Tensor, ctx: StepContext) -> Tensor:
        ctx.rows = rows
        return self._head({self._hidden: hidden}, ctx)[LOGITS].float()

    def _scores(self, plan: StepPlan, batch: Batch, hidden: Tensor, ctx: StepContext) -> dict[str, TokenScores]:
        """Log-probabilities of every score target, a bounded number of rows at a time."""
        scores: dict[str, TokenScores] = {}
        chunk = max(1, _SCORE_BYTES // (4 * self.limits.vocab_size))
        for piece, first in zip(plan.slices, batch.query_start_loc, strict=False):
            if piece.score_targets is None:
                continue
            targets = torch.tensor(list(piece.score_targets), dtype=torch.int64, device=ctx.device)
            found = TokenScores.zeros(len(targets), min(piece.score_top, self.limits.vocab_size))
            for start in range(0, len(targets), chunk):
                wanted = targets[start : start + chunk]
                rows = torch.arange(len(wanted), device=ctx.device) + (int(first) + start)
                found.put(start, describe(self._logits(hidden, rows, ctx), wanted, piece.score_top))
            scores[piece.request_id] = found
        return scores
