"""The weights of a reference runtime: out of an engine's plain planes, or straight from a checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from llmctl.checkpoint.assemble import GraphSource, assemble, checkpoint_graph
from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.engine.step import LoraLimits
from llmctl.graph.graph import Graph, Weight
from llmctl.graph.passes import apply_passes
from llmctl.targets.plain import unpack_codes
from llmctl.targets.planes import WeightPlane
from llmctl.targets.reference.runtime import ReferenceRuntime


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
        start = f"{weight.name}."
        planes = {p.removeprefix(start): _tensor(v) for p, v in self._planes.items() if p.startswith(start)}
        return unpack_codes(weight, planes)


def checkpoint_runtime(
    checkpoint: GraphSource,
    *,
    passes: Iterable[str] | None = None,
    dtype: str = "float32",
    num_blocks: int,
    block_size: int = 16,
    max_model_len: int | None = None,
    threads: int | None = None,
    lora: LoraLimits | None = None,
) -> ReferenceRuntime:
    """A reference runtime straight from a checkpoint.

    Args:
        passes: graph passes; None means the default ones.
        num_blocks, block_size: the KV cache. max_model_len, lora: as ReferenceRuntime's.

    Raises:
        CheckpointError: as ``build_graph`` and ``assemble``.
    """
    graph = apply_passes(checkpoint_graph(checkpoint), passes)
    return ReferenceRuntime(
        graph,
        CheckpointWeights(graph, checkpoint),
        num_blocks=num_blocks,
        block_size=block_size,
        max_model_len=max_model_len,
        dtype=dtype,
        threads=threads,
        lora=lora,
    )


def _tensor(plane: WeightPlane) -> Tensor:
    """A torch view of a plane; the engine's file is read-only, and so must be the tensor."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(np.asarray(plane.data)).view(plane.shape)
    return tensor.view(torch.bfloat16) if plane.dtype == "BF16" else tensor
