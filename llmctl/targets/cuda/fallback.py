"""What no kernel takes, executed by torch's operators on the device: slow, never captured, and said aloud at the start.

A quantized linear of a format without a kernel is dequantized once instead, and is a dense product from then on.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from llmctl.errors import EngineLoadError
from llmctl.graph.dtypes import HALF_DTYPES
from llmctl.graph.graph import Graph
from llmctl.targets.base import FALLBACK, BuildOptions, KernelChoice
from llmctl.targets.batch import Batch
from llmctl.targets.cuda.call import Machine
from llmctl.targets.cuda.ops import Executor, Job
from llmctl.targets.cuda.program import Weights, torch_dtype
from llmctl.targets.plain import unpack_codes
from llmctl.targets.reference.context import Env, StepContext
from llmctl.targets.reference.interpreter import Interpreter

log = logging.getLogger("llmctl.cuda")

_CACHED = ("attention", "kv_write", "rope_kv_write")
"""Kinds that read or write the KV cache."""


def dequantized(graph: Graph, planes: Mapping[str, Tensor], weights: Weights, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights that no kernel reads packed, dense in ``dtype``, by name."""
    found = {}
    for name, weight in graph.weights.items():
        if name not in weights and weight.quant is not None:
            own = {p.removeprefix(f"{name}."): t for p, t in planes.items() if p.startswith(f"{name}.")}
            found[name] = unpack_codes(weight, own).dequantize(dtype)
    if found:
        log.warning(
            "no CUDA kernel reads %d weights as they are quantized (%s, …): they are kept as %s, %.1f GiB",
            len(found), next(iter(found)), str(dtype).removeprefix("torch."),
            sum(t.nbytes for t in found.values()) / 2**30,
        )  # fmt: skip
    return found


class Fallbacks:
    """The ops that the reference kernels execute.

    Attributes:
        executors: by op name; empty where every op has a kernel.
    """

    def __init__(
        self, graph: Graph, choices: Mapping[str, KernelChoice], weights: Weights, options: BuildOptions, device: str
    ) -> None:
        """Say which ops there are, and why.

        Raises:
            EngineLoadError: one that reads or writes the KV cache, where that is not of the compute dtype; one that
                torch's operators are not given what they need for.
        """
        dense = {op.name for op in graph.linears() if "activations" not in op.attrs}
        self._ops = [op for op in graph.ops if choices[op.name].kernel == FALLBACK and op.name not in dense]
        self._check(choices, options)
        given = {name: w for name, w in weights.items() if isinstance(w, Tensor)}
        self._interpreter = Interpreter(graph, given, torch_dtype(options.dtype), device)
        self._context: StepContext | None = None
        self.executors: dict[str, Executor] = {op.name: self._execute for op in self._ops}

    def begin(self, batch: Batch, caches: Mapping[int, Tensor], group_of: Sequence[int]) -> None:
        """What the ops of the next step share; ``group_of``: the KV group of each layer."""
        self._context = self._interpreter.context(batch, caches, group_of)

    def _check(self, choices: Mapping[str, KernelChoice], options: BuildOptions) -> None:
        reasons: dict[str, str] = {}
        for op in self._ops:
            refused = choices[op.name].refused
            if "activations" in op.attrs:  # of the kernels, one takes them
                refused = tuple(r for r in refused if r.kernel == "w8a8")
            reason = reasons[op.kind] = next((r.reason for r in refused), "there is none")
            if op.kind in _CACHED and options.kv_cache_dtype not in HALF_DTYPES:
                raise EngineLoadError(
                    f"--kv-cache-dtype {options.kv_cache_dtype}: op '{op.name}' has no CUDA kernel ({reason}), and "
                    f"torch's operators read a cache of {options.dtype}",
                    fix="--kv-cache-dtype auto",
                )
            if op.kind == "lora":
                raise EngineLoadError(
                    f"op '{op.name}' has no CUDA kernel ({reason}), and torch's operators are not given adapters",
                    fix="adapters of a rank that the kernels take",
                )
            if "activations" in op.attrs:
                raise EngineLoadError(
                    f"op '{op.name}' takes int8 activations and has no CUDA kernel: {reason}",
                    fix="build without --activations int8",
                )
        for kind, reason in sorted(reasons.items()):
            log.warning("no CUDA kernel for '%s' ops: %s; torch executes them, without CUDA graphs", kind, reason)

    def _execute(self, machine: Machine, job: Job) -> None:
        machine.call_torch(self._run, job)

    def _run(self, job: Job) -> None:
        ctx = self._context
        assert ctx is not None, "begin comes first"
        ctx.rows = job.step.rows
        env: Env = dict(zip(job.op.inputs, job.inputs, strict=True))
        self._interpreter.bound(job.op.name)(env, ctx)
        for name, place in zip(job.op.outputs, job.outputs, strict=True):
            place.copy_(env[name])
