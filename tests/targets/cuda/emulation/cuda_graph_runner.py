"""Runs a graph with every op that the registry has a kernel for executed by that kernel, through the launcher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.graph.graph import Graph, Op
from llmctl.targets.base import FALLBACK, KernelChoice
from llmctl.targets.cuda.call import Machine
from llmctl.targets.cuda.gemm import weight_format
from llmctl.targets.cuda.layout import pack
from llmctl.targets.cuda.ops import EXECUTORS, Job, PackedWeight, Scratch, StepTensors, output_dtypes, packed_weight
from llmctl.targets.cuda.registry import choose_all
from llmctl.targets.reference.context import Env, StepContext
from llmctl.targets.reference.interpreter import Bound
from llmctl.targets.reference.runtime import ReferenceRuntime
from llmctl.targets.rope import cos_sin_table


class KernelRuntime(ReferenceRuntime):
    """A ReferenceRuntime whose ops run on a machine's kernels where the registry chose one.

    Attributes:
        choices: of the graph's ops, by name.
        executed: op kind -> what executed it, "torch" or a kernel's name.
    """

    def __init__(self, machine: Machine, graph: Graph, weights: Mapping[str, Any], dtype: str, **sizes: Any) -> None:
        super().__init__(graph, weights, dtype=dtype, **sizes)
        self.machine, self.weights = machine, weights
        self.executed: dict[str, set[str]] = {}
        self.scratch = Scratch("cpu")
        self.packed: dict[str, Tensor | PackedWeight | None] = {"": None}
        chosen = choose_all(graph, dtype, dtype, sizes["block_size"])
        self.choices: dict[str, KernelChoice] = {choice.op: choice for choice in chosen}
        for op in graph.ops:
            kernel = self.choices[op.name].kernel
            if kernel != FALLBACK and kernel in EXECUTORS:
                self.interpreter.override(op.name, self._bind(op, kernel))
            else:
                self.interpreter.override(op.name, self._note(op, self.interpreter.bound(op.name)))

    def _note(self, op: Op, plain: Bound) -> Bound:
        def run(env: Env, ctx: StepContext) -> None:
            self.executed.setdefault(op.kind, set()).add(FALLBACK)
            plain(env, ctx)

        return run

    def _bind(self, op: Op, kernel: str) -> Bound:
        def run(env: Env, ctx: StepContext) -> None:
            self.executed.setdefault(op.kind, set()).add(kernel)
            outputs = self._outputs(op, env, ctx)
            weights = [self._weight(name) for name in op.weights]
            job = Job(op, [env[name] for name in op.inputs], outputs, weights, self._step(ctx))
            EXECUTORS[kernel](self.machine, job)
            if op.attrs.get("splits"):
                env.update(zip(op.outputs, outputs[0].split(list(op.attrs["splits"]), 1), strict=True))
            else:
                env.update(zip(op.outputs, outputs, strict=True))

        return run

    def _outputs(self, op: Op, env: Env, ctx: StepContext) -> list[Tensor]:
        if op.kind == "lora":
            return [env[op.inputs[1]]]  # adds in place, as a runtime would have it
        rows = len(ctx.rows) if op.kind == "gather_rows" else len(env[op.inputs[0]])
        widths = [self.interpreter.graph.buffers[name].width for name in op.outputs]
        widths = [sum(widths)] if op.attrs.get("splits") else widths
        dtypes = output_dtypes(op, self.interpreter.dtype)
        # NaN (or -128), so that an element that no kernel wrote shows.
        return [
            torch.full((rows, width), torch.nan if dtype.is_floating_point else -128, dtype=dtype)
            for width, dtype in zip(widths, dtypes, strict=False)
        ]

    def _weight(self, name: str) -> Tensor | PackedWeight | None:
        if name not in self.packed:
            value, weight = self.weights[name], self.interpreter.graph.weights[name]
            if isinstance(value, QuantizedWeight):
                gated = any(name in op.weights and "epilogue" in op.attrs for op in self.interpreter.graph.ops)
                fmt = weight_format(weight, gated=gated)
                order = None if value.g_idx is None else value.g_idx.numpy()
                linear = pack(value.codes.numpy(), value.scales.numpy(), value.zeros.numpy(), fmt, order)
                self.packed[name] = packed_weight(linear)
            else:
                self.packed[name] = value.to(self.interpreter.dtype)
        return self.packed[name]

    def _step(self, ctx: StepContext) -> StepTensors:
        batch = ctx.batch
        counts = batch.query_start_loc[1:] - batch.query_start_loc[:-1]
        ints = [torch.from_numpy(a).int() for a in (batch.block_tables, batch.seq_lens, batch.query_start_loc)]
        return StepTensors(
            torch.from_numpy(batch.positions), ctx.slots, ctx.rows, *ints, int(batch.seq_lens.max()),
            int(counts.max()), int(counts.min()), ctx.cache, self._rope, self.scratch, sms=2,
            adapters=ctx.adapters, lora=self.interpreter.adapters,
        )  # fmt: skip

    def _rope(self, op: Op) -> tuple[Tensor, Tensor]:
        cos, sin = cos_sin_table(op.attrs, self.limits.max_model_len)
        return torch.from_numpy(cos), torch.from_numpy(sin)
