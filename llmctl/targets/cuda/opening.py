"""An engine folder opened on a GPU: modules, weights, and as large a KV cache as a measured run leaves room for."""

from __future__ import annotations

import contextlib
import importlib
import logging
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from llmctl.engine.kv_blocks import longest_sequence, sequence_blocks
from llmctl.errors import EngineLoadError
from llmctl.graph.kv_groups import block_bytes, whole_context
from llmctl.targets.base import RuntimeEngine, RuntimeSizes
from llmctl.targets.cuda.device import best_arch, cuda_device
from llmctl.targets.cuda.launch import CudaMachine
from llmctl.targets.cuda.registry import choose_all, sources_of
from llmctl.targets.cuda.runtime import CudaRuntime
from llmctl.targets.cuda.weights import load_planes
from llmctl.targets.lora import lora_graph
from llmctl.targets.step_memory import kv_bytes_per_token

log = logging.getLogger("llmctl.cuda")

_MARGIN = 256 * 2**20
"""Bytes kept free beside the KV cache: graphs, samplers' temporaries, what the allocator rounds up."""


def open_cuda_runtime(engine: RuntimeEngine) -> CudaRuntime:
    """The runtime of a checked engine on the first GPU.

    The plan says how many KV blocks there should be; where the device has less room than the plan thought (other
    programs, the driver's own needs), there are fewer, and a line says so.

    Raises:
        EngineLoadError: no room for one sequence of the longest length.
    """
    cupy = threading.Thread(target=_import_cupy, daemon=True)
    cupy.start()
    torch.cuda.init()
    planes = load_planes(engine.weights)
    cupy.join()
    machine = CudaMachine(module_files(engine))
    sizes = fitted(engine, planes, machine)
    return CudaRuntime(engine.graph, engine.options, planes, sizes, machine)


def _import_cupy() -> None:
    """Import it while the weights are copied; where it is broken, whoever needs it finds out in his own thread."""
    with contextlib.suppress(Exception):
        importlib.import_module("cupy")


def module_files(engine: RuntimeEngine) -> dict[str, Path]:
    """Kernel source -> the engine's module of it for this device.

    Raises:
        EngineLoadError: a module that is not there.
    """
    device = cuda_device()
    assert device is not None, "check_machine came before"
    options, lora = engine.options, engine.sizes.lora
    graph = engine.graph if lora is None else lora_graph(engine.graph, lora)
    chosen = choose_all(graph, options.dtype, options.kv_cache_dtype, options.block_size)
    folder = engine.path / "kernels"
    arch = best_arch(tuple(path.name for path in folder.iterdir()), device.capability)
    assert arch is not None, "check_machine came before"
    suffix = "ptx" if arch.startswith("compute_") else "cubin"
    found = {source: folder / arch / f"{Path(source).stem}.{suffix}" for source in sources_of(chosen)}
    missing = [path.name for path in found.values() if not path.exists()]
    if missing:
        raise EngineLoadError(
            f"{engine.path}: expected kernels/{arch}/{missing[0]}, found none",
            fix="build the engine again on this machine, with --target cuda",
        )
    return found


def fitted(engine: RuntimeEngine, planes: Mapping[str, Tensor], machine: CudaMachine) -> RuntimeSizes:
    """The engine's sizes with as many KV blocks as fit, after a run of the largest step over a cache of one block.

    Raises:
        EngineLoadError: fewer than one sequence of the longest length needs.
    """
    sizes, block_size = engine.sizes, engine.sizes.block_size
    groups = sizes.kv_groups or whole_context(engine.graph)
    windows = tuple(group.window for group in groups)
    probe = CudaRuntime(engine.graph, engine.options, planes, replace(sizes, num_blocks=1, enforce_eager=True), machine)
    try:
        if not probe.run_largest():
            log.warning("the KV cache is sized without a measured step: torch's operators allocate as they go")
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
    except BaseException:
        probe.close()
        raise
    # What the probe holds the runtime will hold again, the null block too, all but the one block.
    room = int(total * sizes.gpu_memory_utilization) - (total - free) - _MARGIN
    probe.close()
    per_token = kv_bytes_per_token(engine.graph, engine.options.kv_cache_dtype)
    blocks = min(sizes.num_blocks, room // block_bytes(groups, per_token, block_size))
    step = sizes.max_num_batched_tokens
    if blocks < sequence_blocks(windows, block_size, step, sizes.max_model_len):
        longest = longest_sequence(windows, block_size, step, max(0, blocks), sizes.max_model_len)
        raise EngineLoadError(
            f"{engine.path}: KV cache: expected room for {sizes.max_model_len} tokens, found {max(0, blocks)} blocks "
            f"of {block_size} beside weights and a step ({free / 2**30:.1f} of {total / 2**30:.1f} GiB free, "
            f"--gpu-memory-utilization {sizes.gpu_memory_utilization:g})",
            fix=f"--max-model-len {longest}" if longest else "free memory on the device",
        )
    if blocks < sizes.num_blocks:
        log.warning(
            "KV cache: %d of the %d planned blocks fit: %.1f of %.1f GiB are free", blocks, sizes.num_blocks,
            free / 2**30, total / 2**30,
        )  # fmt: skip
    return replace(sizes, num_blocks=blocks)
