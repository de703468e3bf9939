"""Sequences taken through a CudaRuntime step by step, and what the reference gives at each of their positions.

A step is written as its slices: ``A13:21`` computes tokens 13..20 of sequence A and samples after the last one, ``-``
behind it samples nothing. A small letter is the same sequence in other blocks, as after a preemption.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from cuda_model import EmulatedRuntime
from runtime_stepping import greedy
from tiny_models import VOCAB, Weights
from torch import Tensor

from llmctl.engine.step import SequenceSlice, StepPlan
from llmctl.graph.graph import Graph
from llmctl.targets.cuda.buckets import padded
from llmctl.targets.reference.kernels import AdapterWeights
from llmctl.targets.reference.runtime import ReferenceRuntime

BLOCKS, BLOCK = 12, 16
SIZES = {"num_blocks": BLOCKS, "block_size": BLOCK, "max_num_batched_tokens": 23, "max_num_seqs": 5, "once": True}
SCRIPT = (
    "A0:13-",  # a chunk; nothing is sampled
    "A13:21- B0:1",  # beside a prompt of one token
    "A21:33 B1:2",  # the last chunk beside a row that is decoded
    "C16:19 A33:34 B2:3",  # C begins with the first block of A
    "B3:4 A34:35 C19:20",  # decoded rows alone, three of four that the bucket has
    "B4:5 A35:36 C20:21 D0:1",  # with a new one
    "D1:2 a0:17- B5:6",  # A is computed again, in other blocks
    "a17:37 D2:3 C21:22",  # 22 tokens: padded to the 23 that there is room for, no multiple of 8
    "B6:7 a37:38 C22:23 D3:4 E0:1",  # as many as there may be
    "E1:2- a38:39",  # one token each, but not all of them sampled
)
"""Orders change from step to step, and stay; in two places the same tables are asked for at another width, and tables
of as many blocks in another order."""
_LENGTHS = {"A": 39, "B": 7, "C": 23, "D": 4, "E": 2}
_PIECE = re.compile(r"(\w)(\d+):(\d+)(-?)")


def texts() -> dict[str, list[int]]:
    """Token ids by sequence; C has A's first block."""
    rng = np.random.default_rng(11)
    found = {name: rng.integers(0, VOCAB, length).tolist() for name, length in _LENGTHS.items()}
    found["C"][:BLOCK] = found["A"][:BLOCK]
    return found


def tables() -> dict[str, tuple[int, ...]]:
    """Block tables from a permutation of all blocks, each longer than its sequence ever is."""
    order = np.random.default_rng(7).permutation(BLOCKS).tolist()
    spare = (order.pop(), order.pop())
    found = {
        name: tuple(order.pop() for _ in range(n)) + spare for name, n in zip("AaBDE", (3, 3, 1, 1, 1), strict=True)
    }
    found["C"] = (found["A"][0], order.pop(), *spare)
    return found


def plan_of(step: str, **changes: Mapping[str, Any]) -> StepPlan:
    """The plan of one step; ``changes``: fields of a sequence's slice that are other than written."""
    all_texts, all_tables, slices = texts(), _TABLES, []
    for name, start, stop, unsampled in _PIECE.findall(step):
        a, b = int(start), int(stop)
        fields = {"token_ids": all_texts[name.upper()][a:b], "block_ids": all_tables[name], "sample": not unsampled}
        fields |= changes.get(name, {})
        slices.append(SequenceSlice(request_id=name.upper(), start=a, **fields))
    return StepPlan(tuple(slices))


_TABLES = tables()


@dataclass(frozen=True)
class Row:
    """Logits f32 [vocab] that a runtime gave at a position of a sequence; the token too, where one was sampled."""

    sequence: str
    position: int
    logits: Tensor
    token: int | None = None


def play(runtime: EmulatedRuntime, script: Iterable[str] = SCRIPT) -> list[Row]:
    """Every row of every step, the sampled ones twice: as the step left them, and from the hidden states."""
    rows: list[Row] = []
    for step in script:
        plan = plan_of(step)
        poison_activations(runtime)
        sampled = [piece for piece in plan.slices if piece.sample]
        result = runtime.execute(plan, greedy(len(sampled))).result()
        left = runtime._model.buffers.view("logits", len(sampled)).float()
        for piece, logits, token in zip(sampled, left, result.token_ids.tolist(), strict=True):
            rows.append(Row(piece.request_id, _end(piece) - 1, logits, token))
        places = [(piece.request_id, position) for piece in plan.slices for position in range(piece.start, _end(piece))]
        for place, logits in zip(places, _every_row(runtime, len(places)), strict=True):
            rows.append(Row(*place, logits))
    return rows


def _end(piece: SequenceSlice) -> int:
    return piece.start + len(piece.token_ids)


@torch.inference_mode()
def _every_row(runtime: EmulatedRuntime, tokens: int) -> Tensor:
    """Logits of all tokens of the step that was executed last, as prompts are scored."""
    most, parts = SIZES["max_num_seqs"], []
    for first in range(0, tokens, most):
        wanted = torch.arange(first, min(first + most, tokens))
        count = padded(len(wanted), runtime._buckets)
        view = runtime._arena.row_view("rows", count).zero_()
        view[: len(wanted)] = wanted
        parts.append(runtime._head(count, every=False)[: len(wanted)].float())
    return torch.cat(parts)


@torch.inference_mode()
def poison_cache(runtime: EmulatedRuntime) -> None:
    """Fill the KV cache with NaN, or with the largest codes times NaN."""
    for cache in runtime.caches.values():
        cache.view(torch.uint8).fill_(0x7F)  # of int8 the largest code, of fp8_e4m3 a NaN
        if cache.dtype.itemsize == 2:
            cache.fill_(torch.nan)
    for scales in runtime._model.kv_scales.values():
        scales.fill_(torch.nan)


@torch.inference_mode()
def poison_activations(runtime: EmulatedRuntime) -> None:
    """Leave nothing of the step before, which a step must not need, but the tokens that it sampled."""
    for storage in runtime._model.buffers._storages:
        storage.fill_(0xFF)
    for (name, _), buffer in runtime._model.scratch._buffers.items():
        if name != "counters":  # are zero between launches
            buffer.view(torch.uint8).fill_(0xFF)


class Oracle:
    """The reference's logits of whole sequences, each computed at once: in float32, and in the runtime's dtype.

    Both keep keys and values as a cache of ``kv_cache_dtype`` does, so that what that loses is not held against the
    kernels.
    """

    def __init__(
        self,
        graph: Graph,
        weights: Weights,
        dtype: str,
        kv_cache_dtype: str,
        lora: Mapping[str, AdapterWeights] | None = None,
        adapter_of: Callable[[str], int] = lambda _: -1,
    ) -> None:
        self._adapter_of, self._lora = adapter_of, lora or {}
        self._runtimes = [
            ReferenceRuntime(graph, weights, num_blocks=BLOCKS, block_size=BLOCK, dtype=name)
            for name in ("float32", dtype)
        ]
        for runtime in self._runtimes:
            runtime.interpreter.adapters.update(self._lora)
            if kv_cache_dtype != dtype:
                _round_cache(runtime, kv_cache_dtype)

    def logits(self, sequence: str) -> tuple[Tensor, Tensor]:
        """(float32, the runtime's dtype), each f32 [tokens, vocab]."""
        ids = texts()[sequence]
        plan = StepPlan((SequenceSlice(sequence, ids, 0, range(BLOCKS), True),))
        single, same = (self._run(runtime, plan, self._adapter_of(sequence)) for runtime in self._runtimes)
        return single, same

    def _run(self, runtime: ReferenceRuntime, plan: StepPlan, adapter: int) -> Tensor:
        if not self._lora:
            return runtime.logits(plan, all_rows=True)
        plain = type(runtime.interpreter).context

        def context(batch: Any, *places: Any) -> Any:
            ctx = plain(runtime.interpreter, batch, *places)
            ctx.adapters = torch.full((batch.num_tokens,), adapter, dtype=torch.int32)
            return ctx

        runtime.interpreter.context = context  # type: ignore[method-assign]
        return runtime.logits(plan, all_rows=True)


def _round_cache(runtime: ReferenceRuntime, dtype: str) -> None:
    """Let every write of the KV cache be followed by what storing it in ``dtype`` leaves of it."""
    interpreter = runtime.interpreter
    for op in interpreter.graph.ops:
        if op.kind in ("kv_write", "rope_kv_write"):
            plain = interpreter.bound(op.name)

            def run(env: Any, ctx: Any, plain: Any = plain, layer: int = op.attrs["layer"]) -> None:
                plain(env, ctx)
                rows, slots = ctx.cache[layer].flatten(1, 2), ctx.slots(layer)
                rows[:, slots] = _stored(rows[:, slots].float(), dtype).to(rows.dtype)

            interpreter.override(op.name, run)


def _stored(x: Tensor, dtype: str) -> Tensor:
    """What a cache of ``dtype`` gives back for heads [..., head_dim]."""
    if dtype == "fp8_e4m3":
        return x.to(torch.float8_e4m3fn).float()
    scales = x.abs().amax(-1, keepdim=True) / 127
    return torch.round(x / scales) * scales


def check(rows: Sequence[Row], oracle: Oracle, dtype: str, factor: float = 2) -> None:
    """Every row within the tolerance: twice the error of the reference in the same dtype, and a small floor; and the
    tokens those of the float32 reference wherever its best two lie further apart than that allows to be swapped.

    ``factor``: instead of twice.
    """
    exact, same = zip(*(oracle.logits(name) for name in _LENGTHS), strict=True)
    limit = factor * max(float((a - b).abs().max()) for a, b in zip(exact, same, strict=True))
    limit += float(torch.cat(exact).abs().max()) * torch.finfo(getattr(torch, dtype)).eps / 2
    by_name = dict(zip(_LENGTHS, exact, strict=True))
    told = 0
    for row in rows:
        expected = by_name[row.sequence][row.position]
        error = (row.logits - expected).abs().max()
        assert error <= limit, f"{row.sequence}{row.position}: {error:.4g} off, {limit:.4g} allowed"
        if row.token is not None:
            first, second = expected.topk(2).values
            assert row.token == row.logits.argmax(), f"{row.sequence}{row.position}: another token than its logits'"
            if first - second > 2 * limit:
                told += 1
                assert row.token == expected.argmax(), f"{row.sequence}{row.position}: another token"
    assert told or dtype != "float16" or factor > 2, "no position had a token that could be told"
