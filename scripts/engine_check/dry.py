"""A runtime for dry runs: the reference behind the CUDA runtime's interface, over the very planes that it is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from msgspec import structs
from torch import Tensor

from engine_check.steps import greedy, prompt
from engine_check.tiny import round_cache
from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.engine.step import IN_FLIGHT, DoneStep, SamplingBatch, SequenceSlice, StepPlan
from llmctl.graph.graph import Graph
from llmctl.targets.base import BuildOptions, RuntimeSizes
from llmctl.targets.cuda.layout import from_planes, unpack
from llmctl.targets.cuda.packing import codes_added, cuda_formats
from llmctl.targets.reference.runtime import ReferenceRuntime


class DryRuntime:
    """What ``CudaRuntime`` offers, by the reference in the options' dtype on the CPU."""

    def __init__(self, graph: Graph, options: BuildOptions, planes: Mapping[str, Tensor], sizes: RuntimeSizes) -> None:
        self._graph, self._sizes = graph, sizes
        weights = unpacked(graph, planes)
        self._inner = ReferenceRuntime(
            graph, weights, num_blocks=sizes.num_blocks, block_size=sizes.block_size,
            max_model_len=sizes.max_model_len, dtype=options.dtype,
        )  # fmt: skip
        if options.kv_cache_dtype != options.dtype:
            round_cache(self._inner, graph, options.kv_cache_dtype)
        self.limits = self._inner.limits
        self.steps_in_flight, self.kernels = 2, ""
        self._last: dict[str, int] = {}

    def execute(self, plan: StepPlan, sampling: SamplingBatch) -> DoneStep:
        """At once; a token in flight is the one that the step before has sampled."""
        done = self._inner.execute(StepPlan(tuple(self._known(piece) for piece in plan.slices)), sampling)
        ids = iter(done.value.token_ids.tolist())
        self._last = {piece.request_id: next(ids) for piece in plan.slices if piece.sample}
        return done

    def _known(self, piece: SequenceSlice) -> SequenceSlice:
        if piece.token_ids[0] != IN_FLIGHT:
            return piece
        tokens = [self._last[piece.request_id], *piece.token_ids[1:]]
        return structs.replace(piece, token_ids=tokens)

    def logits(self, plan: StepPlan) -> Tensor:
        """f32 [R, vocab]."""
        return self._inner.logits(plan)

    def decode_replay(self, batch: int, context: int) -> Callable[[], Any]:
        """A decode step of so many sequences at that context."""
        size = self._sizes.block_size
        each = -(-context // size)
        tokens = prompt(batch, self._graph.vocab_size)
        slices = [
            SequenceSlice(str(i), [tokens[i]], context - 1, tuple(b % self._sizes.num_blocks for b in blocks), True)
            for i in range(batch)
            for blocks in [range(i * each, (i + 1) * each)]
        ]
        return lambda: self._inner.execute(StepPlan(tuple(slices)), greedy(batch))

    def step_launches(self, tokens: int, sequences: int) -> list[str]:  # noqa: ARG002
        """The ops' names: nothing is launched."""
        return [op.name for op in self._graph.ops]

    def close(self) -> None:
        """Drop everything."""
        self._inner.close()


def unpacked(graph: Graph, planes: Mapping[str, Tensor]) -> dict[str, Tensor | QuantizedWeight]:
    """The reference's weights out of packed planes; act-order is not needed here."""
    formats = cuda_formats(graph)
    weights: dict[str, Tensor | QuantizedWeight] = {}
    for name, weight in graph.weights.items():
        if name not in formats:
            weights[name] = planes[name].cpu()
            continue
        fmt = formats[name]
        arrays = {s: planes[f"{name}.{s}"].cpu() for s in fmt.planes()}
        arrays["tile_scales"] = arrays["tile_scales"].view(torch.int16)
        packed = {suffix: tensor.numpy() for suffix, tensor in arrays.items()}
        packed["tile_scales"] = packed["tile_scales"].view("uint16")
        codes, scales, zeros, minimums = unpack(from_planes(fmt, packed))
        assert weight.quant is not None
        assert minimums is None, "no engine of these checks has some"
        added, groups = codes_added(fmt, weight.quant), weight.quant.groups(weight.shape[1])
        parts = codes - added, scales[:, :groups].copy(), zeros[:, :groups] - added
        weights[name] = QuantizedWeight(*map(torch.from_numpy, parts), weight.quant)
    return weights
