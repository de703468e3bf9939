"""The KV cache on the device: which layers share memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmctl.engine.step import RuntimeLimits
from llmctl.graph.dtypes import DTYPES
from llmctl.graph.graph import Graph
from llmctl.graph.kv_groups import KVGroup


@dataclass(frozen=True)
class Caches:
    """By layer. Layers at the same place of their KV groups share their memory: a block is held for one group at a
    time; with groups that let go of blocks there is one more, the null block, which no kernel reads.

    Attributes:
        values: [2, blocks, block size, kv heads, head dim], keys before values.
        scales: f32 [2, blocks * block size, kv heads], of int8 caches.
    """

    values: Mapping[int, Tensor]
    scales: Mapping[int, Tensor]


def allocate_caches(graph: Graph, groups: Sequence[KVGroup], limits: RuntimeLimits, dtype: str, device: str) -> Caches:
    """Caches of zeros for a pool of ``limits.num_blocks`` blocks, which the groups take theirs from."""
    blocks, size = limits.num_blocks + any(limits.windows), limits.block_size
    element = getattr(torch, DTYPES[dtype].torch)
    made: list[tuple[Tensor, Tensor | None]] = []
    values, scales = {}, {}
    for group in sorted(groups, key=lambda group: -len(group.layers)):
        for place, layer in enumerate(group.layers):
            if place == len(made):
                kv = graph.kv[layer]
                row = kv.head_dim * element.itemsize
                raw = torch.zeros((2, blocks, size, kv.kv_heads, row), dtype=torch.uint8, device=device)
                own = torch.zeros(2, blocks * size, kv.kv_heads, device=device) if dtype == "int8" else None
                made.append((raw.view(element), own))
            values[layer], scale = made[place]
            if scale is not None:
                scales[layer] = scale
    return Caches(values, scales)
