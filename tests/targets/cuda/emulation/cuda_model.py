"""The CUDA runtime over emulated launches: whole tiny models, their weights packed as a build packs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from machine import EmulatedMachine
from sliding_blocks import Fill
from torch import Tensor

from llmctl.artifact.loader import LoadedEngine
from llmctl.engine.step import SequenceSlice
from llmctl.graph.dtypes import BY_SAFETENSORS
from llmctl.graph.graph import Graph
from llmctl.graph.kv_groups import KVGroup
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
    groups: tuple[KVGroup, ...] = (),
) -> EmulatedRuntime:
    """A runtime whose kernels the emulator runs; ``once``: forwards only."""
    options = BuildOptions(dtype, graph.max_position, block_size, kv_cache_dtype or dtype, graph.passes)
    sizes = RuntimeSizes(
        num_blocks, block_size, min(graph.max_position, num_blocks * block_size), max_num_batched_tokens, max_num_seqs,
        enforce_eager, kv_groups=groups,
    )  # fmt: skip
    planes = packed_planes(graph, weights, options)
    return _runtime(graph, options, planes, sizes, once, lora=lora, adapter_of=adapter_of)


def emulated_engine(engine: LoadedEngine) -> EmulatedRuntime:
    """The runtime of a built engine, as its memory plan sizes it; kernels run forwards only."""
    planes = {}
    for name, plane in engine.weights.items():
        dtype = getattr(torch, BY_SAFETENSORS[plane.dtype].torch)
        planes[name] = torch.from_numpy(np.array(plane.data).reshape(-1).view(np.uint8)).view(dtype).view(plane.shape)
    return _runtime(engine.graph, engine.options, planes, engine.sizes, once=True)


def _runtime(
    graph: Graph, options: BuildOptions, planes: Mapping[str, Tensor], sizes: RuntimeSizes, once: bool, **more: Any
) -> EmulatedRuntime:
    machine = EmulatedMachine(once)
    runtime = EmulatedRuntime(graph, options, planes, sizes, machine, device="cpu", **more)
    runtime.machine, runtime.choices = machine, runtime._model.choices
    return runtime


def fill_emulated(runtime: EmulatedRuntime) -> Fill:
    """What fills a block of its KV cache, scales included."""
    caches = [*runtime._model.caches.values(), *runtime._model.kv_scales.values()]
    blocks = runtime.limits.num_blocks + any(runtime.limits.windows)
    stores = [cache.view(torch.uint8).view(2, blocks, -1) for cache in {id(c): c for c in caches}.values()]

    def fill(block: int, byte: int) -> None:
        for store in stores:
            store[:, block] = byte

    return fill


def _tensor(content: Any) -> Tensor:
    if isinstance(content, Tensor):
        return content
    if content.dtype == np.uint16:  # float16, as its bits
        return torch.from_numpy(content.view(np.int16)).view(torch.float16)
    return torch.from_numpy(content)
