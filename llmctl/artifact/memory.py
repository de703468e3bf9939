"""How much memory a model takes: weights, activations, KV cache; what fits, and the longest context that does.

Everything is computed from a Graph and sizes: no tensor is touched.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from llmctl.artifact.request import EngineRequest
from llmctl.graph.graph import Graph
from llmctl.targets.base import BuildOptions, Target
from llmctl.targets.planes import Plane

HOST_KV_BYTES = 4 * 2**30
"""Size of the KV cache in memory that other programs live in, when neither it nor a budget is given."""


@dataclass(frozen=True)
class MemoryPlan:
    """What an engine takes and what fits; sizes in bytes.

    Attributes:
        budget: what may be used in all. weights: all weights as they lie in memory. activations: peak of one step.
        kv_per_token: KV cache of one token over all layers. block_size: tokens a KV block.
        num_blocks: KV blocks that the plan allocates. max_model_len: longest sequence asked for, tokens.
        largest_max_model_len: longest sequence the budget has room for (at most the model's own limit), tokens.
    """

    budget: int
    weights: int
    activations: int
    kv_per_token: int
    block_size: int
    num_blocks: int
    max_model_len: int
    largest_max_model_len: int

    @property
    def kv_tokens(self) -> int:
        """Tokens the KV cache holds."""
        return self.num_blocks * self.block_size

    @property
    def kv_bytes(self) -> int:
        """Size of the KV cache."""
        return self.kv_tokens * self.kv_per_token

    @property
    def total(self) -> int:
        """Everything together."""
        return self.weights + self.activations + self.kv_bytes

    @property
    def fits(self) -> bool:
        """Whether one sequence of ``max_model_len`` fits."""
        return self.kv_tokens >= self.max_model_len and self.total <= self.budget

    def shortfall(self) -> str:
        """One line that itemises why ``max_model_len`` does not fit."""
        needed = _ceil(self.max_model_len, self.block_size) * self.kv_per_token
        total = self.weights + self.activations + needed
        return (
            f"memory: expected at most {human_bytes(self.budget)}, found {human_bytes(total)} needed: "
            f"weights {human_bytes(self.weights)} + activations {human_bytes(self.activations)} + "
            f"KV {human_bytes(needed)} ({self.max_model_len} tokens of {human_bytes(self.kv_per_token)})"
        )

    def advice(self) -> str:
        """What to change so that it fits."""
        if self.largest_max_model_len > 0:
            return f"use --max-model-len {self.largest_max_model_len} or less, or free memory"
        return "free memory, or use a smaller or quantized model: the weights and activations alone do not fit"


def plan_memory(
    graph: Graph, options: BuildOptions, target: Target, request: EngineRequest, planes: Iterable[Plane]
) -> MemoryPlan:
    """Plan an engine's memory.

    Without a budget it takes the target's own. Without a size the KV cache takes what the budget leaves, but no more
    than ``max_num_seqs`` sequences of ``max_model_len`` could use, nor, unless a budget is given, than
    ``HOST_KV_BYTES`` (or one such sequence) of memory that other programs live in.

    Args:
        planes: the stored tensors.
    """
    length = options.max_model_len if request.max_model_len is None else request.max_model_len
    block_size = options.block_size
    per_token = target.kv_bytes_per_token(graph, options)
    activations = target.activation_bytes(graph, options, request.max_num_batched_tokens, request.max_num_seqs)
    weights = target.resident_bytes(graph, options, planes)
    block_bytes = max(1, per_token * block_size)
    sequence_blocks = _ceil(length, block_size) // block_size
    most_blocks = request.max_num_seqs * sequence_blocks
    budget = request.budget
    if budget is None:
        budget, shared = target.memory_budget()
        if shared:
            most_blocks = min(most_blocks, max(HOST_KV_BYTES // block_bytes, sequence_blocks))
    room_blocks = max(0, budget - weights - activations) // block_bytes
    asked = request.kv_cache_bytes
    num_blocks = min(room_blocks, most_blocks) if asked is None else asked // block_bytes
    holds = room_blocks if asked is None else min(room_blocks, num_blocks)
    return MemoryPlan(
        budget=budget,
        weights=weights,
        activations=activations,
        kv_per_token=per_token,
        block_size=block_size,
        num_blocks=num_blocks,
        max_model_len=length,
        largest_max_model_len=min(holds * block_size, graph.max_position),
    )


def human_bytes(size: float) -> str:
    """``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError("unreachable")


def _ceil(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size) * block_size
