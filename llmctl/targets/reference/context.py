"""What the ops of one step share beyond their input buffers: slots, attention groups, RoPE factors, the KV cache."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmctl.graph.graph import INPUT_IDS, POSITIONS, Graph
from llmctl.graph.kv_groups import KVGroup
from llmctl.targets.batch import Batch
from llmctl.targets.reference import kernels
from llmctl.targets.rope import cos_sin_table

Env = dict[str, Tensor]

# Gathered keys of one decode group stay under this, bytes, so that they are still in a core's L2 cache when they are
# read: 32 sequences of 300 tokens attend in a third of the time of one large group (EPYC with 1 MiB L2, float32).
_GROUP_BYTES = 2**20


def allocate_cache(
    graph: Graph,
    num_blocks: int,
    block_size: int,
    dtype: torch.dtype,
    layers: Iterable[int] | None = None,
    device: torch.device | str = "cpu",
) -> dict[int, Tensor]:
    """KV caches by layer, each ``[2, num_blocks, block_size, kv_heads, head_dim]``; ``layers`` None means all."""
    wanted = range(len(graph.kv)) if layers is None else layers
    return {
        i: torch.zeros(
            2, num_blocks, block_size, graph.kv[i].kv_heads, graph.kv[i].head_dim, dtype=dtype, device=device
        )
        for i in wanted
    }


def allocate_shared_cache(
    graph: Graph, groups: Sequence[KVGroup], num_blocks: int, block_size: int, dtype: torch.dtype, device: str
) -> dict[int, Tensor]:
    """KV caches by layer as ``allocate_cache`` makes them, for groups that take their blocks from one pool: one cache
    for the first layer of every group, one for the second, …; ``num_blocks``: null block included."""
    most = max((group.layers for group in groups), key=len)
    own = list(allocate_cache(graph, num_blocks, block_size, dtype, most, device).values())
    return {layer: cache for group in groups for layer, cache in zip(group.layers, own, strict=False)}


class StepContext:
    """One batch on the device: what its ops share beyond their input buffers, each piece made once per step.

    Args:
        groups: the KV group of each layer; empty: there is one.
    """

    def __init__(
        self,
        batch: Batch,
        cache: Mapping[int, Tensor],
        dtype: torch.dtype,
        device: torch.device,
        groups: Sequence[int] = (),
    ) -> None:
        self.batch = batch
        self._group_of = groups
        self._batches = [batch.of_group(group) for group in range(1 + len(batch.more))]
        self.cache = cache
        self.dtype = dtype
        self.device = device
        self._slots = [self.tensor(one.slot_mapping) for one in self._batches]
        self.padded = bool((batch.slot_mapping < 0).any())
        self.rows = self.tensor(batch.logits_indices)
        self.adapters: Tensor | None = None  # i32 [T], each token's LoRA adapter, -1 for none; None: no token has one
        self.scratch = kernels.Scratch()
        self._groups: dict[tuple[int, int], list[kernels.AttentionGroup]] = {}
        self._factors: dict[int, tuple[Tensor, Tensor]] = {}

    def tensor(self, array: np.ndarray) -> Tensor:
        """A numpy array on the step's device."""
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def inputs(self) -> Env:
        """A fresh environment that holds the step's inputs."""
        return {INPUT_IDS: self.tensor(self.batch.token_ids), POSITIONS: self.tensor(self.batch.positions)}

    def slots(self, layer: int) -> Tensor:
        """KV slot of each token in a layer's cache, i64 [T]."""
        return self._slots[self._group(layer)]

    def attention_groups(self, layer: int, window: int) -> list[kernels.AttentionGroup]:
        """How the batch attends in a layer under a sliding window (0 = none)."""
        key = self._group(layer), window
        if key not in self._groups:
            self._groups[key] = _attention_groups(self, self._batches[key[0]], window)
        return self._groups[key]

    def _group(self, layer: int) -> int:
        return self._group_of[layer] if self._group_of else 0

    def rope_factors(self, table: RopeTable) -> tuple[Tensor, Tensor]:
        """cos and sin factors of the batch's positions."""
        key = id(table)
        if key not in self._factors:
            self._factors[key] = table.factors(self.batch.positions, self.dtype, self.device)
        return self._factors[key]


class RopeTable:
    """cos and sin of one kind of RoPE, grown to the longest position seen."""

    def __init__(self, attrs: Mapping[str, Any]) -> None:
        self._attrs = dict(attrs)
        self._cos, self._sin = cos_sin_table(self._attrs, 1)

    def factors(self, positions: np.ndarray, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """``kernels.rope_factors`` of i64 positions [T]."""
        longest = int(positions.max(initial=0)) + 1
        if longest > len(self._cos):
            self._cos, self._sin = cos_sin_table(self._attrs, max(longest, 2 * len(self._cos)))
        cos, sin = (torch.from_numpy(t[positions]).to(device) for t in (self._cos, self._sin))
        spread = kernels.rope_factors(cos, sin, str(self._attrs["style"]))
        return spread[0].to(dtype), spread[1].to(dtype)


def _attention_groups(ctx: StepContext, batch: Batch, window: int) -> list[kernels.AttentionGroup]:
    """One group per prefill slice; single-token slices in groups of like context length.

    Lengths within a factor of two go together, which bounds both the padding and the number of calls.
    """
    counts = np.diff(batch.query_start_loc)
    groups: list[kernels.AttentionGroup] = []
    decodes: dict[int, list[tuple[int, int]]] = {}
    for i in range(batch.num_sequences):
        if counts[i] == 1:
            length = min(int(batch.seq_lens[i]), window or int(batch.seq_lens[i]))
            decodes.setdefault(length.bit_length(), []).append((i, length))
        else:
            groups.append(_prefill_group(ctx, batch, i, int(counts[i]), window))
    row_bytes = max((c[0, 0, 0].nbytes for c in ctx.cache.values()), default=1)
    for members in decodes.values():
        size = max(1, _GROUP_BYTES // (max(length for _, length in members) * row_bytes))
        groups += [_decode_group(ctx, batch, members[i : i + size]) for i in range(0, len(members), size)]
    return groups


def _prefill_group(ctx: StepContext, batch: Batch, sequence: int, count: int, window: int) -> kernels.AttentionGroup:
    end, row = int(batch.seq_lens[sequence]), int(batch.query_start_loc[sequence])
    first = max(0, end - count - window + 1) if window else 0
    slots = batch.context_slots(sequence, first)
    query = torch.arange(end - count, end, device=ctx.device)[:, None]
    key = torch.arange(first, end, device=ctx.device)[None, :]
    hidden = key > query
    if window:
        hidden |= key <= query - window
    mask = torch.zeros(hidden.shape, dtype=ctx.dtype, device=ctx.device).masked_fill_(hidden, -torch.inf)
    return kernels.AttentionGroup(
        rows=slice(row, row + count),
        slots=ctx.tensor(slots),
        mask=mask[None, None],
        batch=1,
        queries=count,
        context=len(slots),
    )


def _decode_group(ctx: StepContext, batch: Batch, members: Sequence[tuple[int, int]]) -> kernels.AttentionGroup:
    longest = max(length for _, length in members)
    slots = np.empty((len(members), longest), dtype=np.int64)
    hidden = np.zeros((len(members), longest), dtype=bool)
    for row, (sequence, length) in enumerate(members):
        slots[row, :length] = batch.context_slots(sequence, int(batch.seq_lens[sequence]) - length)
        slots[row, length:] = slots[row, 0]
        hidden[row, length:] = True
    mask = None
    if hidden.any():
        mask = torch.zeros(hidden.shape, dtype=ctx.dtype).masked_fill_(torch.from_numpy(hidden), -torch.inf)
        mask = mask[:, None, None].to(ctx.device)
    rows = batch.query_start_loc[[sequence for sequence, _ in members]]
    contiguous = len(rows) == 1 or bool((np.diff(rows) == 1).all())
    return kernels.AttentionGroup(
        rows=slice(int(rows[0]), int(rows[0]) + len(rows)) if contiguous else ctx.tensor(rows),
        slots=ctx.tensor(slots.reshape(-1)),
        mask=mask,
        batch=len(members),
        queries=1,
        context=longest,
    )
