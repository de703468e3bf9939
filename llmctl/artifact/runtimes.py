"""Runtimes out of what is on disk: an engine folder, or a checkpoint as it is."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmctl.artifact.loader import LoadedEngine, WeightPlane, load_engine, read_manifest
from llmctl.artifact.manifest import Manifest
from llmctl.artifact.plan import check_has_runtime, parse_target
from llmctl.checkpoint.assemble import GraphSource, assemble, checkpoint_graph
from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.config import EngineConfig, parse_bytes
from llmctl.engine.step import Runtime
from llmctl.errors import EngineLoadError
from llmctl.graph.graph import Graph, Weight
from llmctl.graph.passes import apply_passes
from llmctl.targets.device import NO_CUDA_RUNTIME

if TYPE_CHECKING:
    from torch import Tensor

    from llmctl.targets.reference.runtime import ReferenceRuntime

logger = logging.getLogger(__name__)


def open_runtime(path: Path, config: EngineConfig) -> tuple[LoadedEngine, Runtime]:
    """An engine folder and its runtime as ``serve`` and offline ``bench`` run it.

    Raises:
        LlmctlError: whatever loading refuses.
    """
    if config.target != "auto":
        check_has_runtime(parse_target(config.target))
    _refuse_cuda(path, read_manifest(path))
    kv_bytes = parse_bytes(config.kv_cache_memory, param="kv_cache_memory") if config.kv_cache_memory else None
    loaded = load_engine(
        path,
        verify=config.verify,
        max_model_len=config.max_model_len,
        block_size=config.block_size,
        dtype=None if config.dtype == "auto" else config.dtype,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_num_seqs=config.max_num_seqs,
        kv_cache_bytes=kv_bytes,
        target=config.target,
    )
    return loaded, load_runtime(loaded, threads=config.threads)


def load_runtime(engine: LoadedEngine, *, dtype: str | None = None, threads: int | None = None) -> Runtime:
    """The runtime for a loaded engine, sized by its memory plan.

    Args:
        dtype: compute dtype; None means the one the engine was built for.
        threads: CPU threads; None leaves the library's default.

    Raises:
        EngineLoadError: no runtime for the engine's target.
    """
    _refuse_cuda(engine.path, engine.manifest)
    if engine.manifest.target.native_cpu:
        from llmctl.targets.cpu.load import load_cpu_runtime

        return load_cpu_runtime(engine, threads=threads)
    from llmctl.targets.reference.runtime import ReferenceRuntime

    if engine.manifest.target.kind == "cpu":
        logger.warning("this engine was built without a C++ compiler: it runs on torch, many times slower")
    return ReferenceRuntime(
        engine.graph,
        EngineWeights(engine.graph, engine.weights),
        num_blocks=engine.plan.num_blocks,
        block_size=engine.plan.block_size,
        max_model_len=engine.max_model_len,
        dtype=dtype or engine.manifest.options.dtype,
        threads=threads,
    )


def _refuse_cuda(path: Path, manifest: Manifest) -> None:
    if manifest.target.kind == "cuda":
        raise EngineLoadError(
            f"{path}: target {manifest.target}: {NO_CUDA_RUNTIME}",
            fix=manifest.rebuild_command(str(path), target="cpu"),
        )


def runtime_from_checkpoint(
    checkpoint: GraphSource,
    *,
    passes: Iterable[str] | None = None,
    dtype: str = "float32",
    num_blocks: int,
    block_size: int = 16,
    max_model_len: int | None = None,
    threads: int | None = None,
) -> ReferenceRuntime:
    """A reference runtime straight from a checkpoint.

    Args:
        passes: graph passes; None means the default ones.
        num_blocks, block_size: the KV cache. max_model_len: as ReferenceRuntime's.

    Raises:
        CheckpointError: as ``build_graph`` and ``assemble``.
    """
    from llmctl.targets.reference.runtime import ReferenceRuntime

    graph = apply_passes(checkpoint_graph(checkpoint), passes)
    return ReferenceRuntime(
        graph,
        CheckpointWeights(graph, checkpoint),
        num_blocks=num_blocks,
        block_size=block_size,
        max_model_len=max_model_len,
        dtype=dtype,
        threads=threads,
    )


class CheckpointWeights(Mapping[str, "Tensor | QuantizedWeight"]):
    """A graph's weights, assembled from a checkpoint when asked for and not kept."""

    def __init__(self, graph: Graph, checkpoint: GraphSource) -> None:
        self._weights = graph.weights
        self._checkpoint = checkpoint

    def __getitem__(self, name: str) -> Tensor | QuantizedWeight:
        return assemble(self._weights[name], self._checkpoint)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


class EngineWeights(Mapping[str, "Tensor | QuantizedWeight"]):
    """A graph's weights, read from an engine's planes when asked for and not kept."""

    def __init__(self, graph: Graph, planes: Mapping[str, WeightPlane]) -> None:
        self._weights = graph.weights
        self._planes = planes

    def __getitem__(self, name: str) -> Tensor | QuantizedWeight:
        weight = self._weights[name]
        return _tensor(self._planes[name]) if weight.quant is None else self._quantized(weight)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def _quantized(self, weight: Weight) -> QuantizedWeight:
        import torch

        scheme = weight.quant
        assert scheme is not None
        codes = _tensor(self._planes[f"{weight.name}.codes"])
        if scheme.bits != 8:
            codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)[:, : weight.shape[1]].contiguous()
        scales = _tensor(self._planes[f"{weight.name}.scales"])
        if scheme.symmetric:
            zeros = torch.full(scales.shape, 2 ** (scheme.bits - 1), dtype=torch.uint8)
        else:
            zeros = _tensor(self._planes[f"{weight.name}.zeros"])
        g_idx = _tensor(self._planes[f"{weight.name}.g_idx"]) if scheme.act_order else None
        return QuantizedWeight(codes, scales, zeros, scheme, g_idx)


def _tensor(plane: WeightPlane) -> Tensor:
    """A torch view of a plane; the engine's file is read-only, and so must be the tensor."""
    import warnings

    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(np.asarray(plane.data)).view(plane.shape)
    return tensor.view(torch.bfloat16) if plane.dtype == "BF16" else tensor
