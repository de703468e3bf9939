"""The CUDA runtime over emulated launches: whole tiny models, their weights packed as a build packs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from machine import EmulatedMachine
from torch import Tensor

from llmctl.engine.step import SequenceSlice
from llmctl.graph.graph import Graph
from llmctl.targets.base import BuildOptions, KernelChoice, RuntimeSizes
from llmctl.targets.cuda.packing import cuda_planes, pack_cuda
from llmctl.targets.cuda.runtime import CudaRuntime


class EmulatedRuntime(CudaRuntime):
    """A CudaRuntime that knows its machine and kernel choices."""

    machine: EmulatedMachine
    choices: Mapping[str, KernelChoice]


def packed_planes(graph: Graph, weights: Mapping[str, Any], options: BuildOptions) -> dict[str, Tensor]:
    """Planes by name, as tensors: what an engine of these weights holds."""
    found = {}
    for name, planes in cuda_planes(graph, options, None).items():
        value = weights[name]
        for plane, content in pack_cuda(name, lambda value=value: value, planes, graph).items():
            found[plane] = _tensor(content() if callable(content) else content)
    return found


def emulated_runtime(
    graph: Graph,
    weights: Mapping[str, Any],
    dtype: str,
    *,
    num_blocks: int,
    block_size: int = 16,
    kv_cache_dtype: str | None = None,
    max_num_batched_tokens: int = 32,
    max_num_seqs: int = 3,
    enforce_eager: bool = False,
    once: bool = False,
    lora: Any = None,
    adapter_of: Callable[[SequenceSlice], int] = lambda _: -1,
) -> EmulatedRuntime:
    """A runtime whose kernels the emulator runs; ``once``: forwards only."""
    options = BuildOptions(dtype, graph.max_position, block_size, kv_cache_dtype or dtype, graph.passes)
    sizes = RuntimeSizes(
        num_blocks, block_size, min(graph.max_position, num_blocks * block_size), max_num_batched_tokens, max_num_seqs,
        enforce_eager,
    )  # fmt: skip
    machine = EmulatedMachine(once)
    runtime = EmulatedRuntime(
        graph, options, packed_planes(graph, weights, options), sizes, machine, device="cpu", lora=lora,
        adapter_of=adapter_of,
    )  # fmt: skip
    runtime.machine, runtime.choices = machine, runtime._model.choices
    return runtime


def _tensor(content: Any) -> Tensor:
    if isinstance(content, Tensor):
        return content
    if content.dtype == np.uint16:  # float16, as its bits
        return torch.from_numpy(content.view(np.int16)).view(torch.float16)
    return torch.from_numpy(content)
