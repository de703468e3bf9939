"""How much memory a model takes: weights, activations, KV cache; what fits, and the longest context that does.

Everything is computed from a Graph and sizes: no tensor is touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmctl.graph.graph import INPUT_IDS, LOGITS, POSITIONS, Graph, KVLayer
from llmctl.targets.device import cuda_device
from llmctl.targets.planes import DTYPE_BYTES

KV_BYTES = {**DTYPE_BYTES, "int8": 1, "fp8_e4m3": 1}
"""Bytes of an element of the KV cache."""
_INT8_SCALE = 4  # bytes; int8 has one for every token's head

HOST_SHARE = 0.7
"""Share of the machine's available memory that an engine plans to use when no budget is given."""

DEVICE_SHARE = 0.9
"""Share of a GPU's memory that it plans to use."""

HOST_KV_BYTES = 4 * 2**30
"""Size of the KV cache in the machine's own memory when neither it nor a budget is given: other programs live there."""


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
    graph: Graph,
    *,
    weights_bytes: int,
    dtype: str,
    target_kind: str = "cpu",
    kv_cache_dtype: str = "auto",
    block_size: int = 16,
    max_model_len: int | None = None,
    max_num_batched_tokens: int = 512,
    max_num_seqs: int = 64,
    budget: int | None = None,
    kv_cache_bytes: int | None = None,
) -> MemoryPlan:
    """Plan an engine's memory.

    Args:
        weights_bytes: size of all weights in memory.
        dtype: dtype of the activations. kv_cache_dtype: of the KV cache; "auto" is ``dtype``.
        max_model_len: longest sequence, tokens; None takes the model's own limit.
        max_num_batched_tokens, max_num_seqs: tokens and sampled rows of the largest step.
        budget: bytes for everything; None takes a share of the device's memory for a cuda target on a machine that has
            one, and of the machine's available memory otherwise.
        kv_cache_bytes: size of the KV cache; None takes what the budget leaves, but no more than ``max_num_seqs``
            sequences of ``max_model_len`` could use, nor than ``HOST_KV_BYTES`` (or one such sequence) of the machine's
            memory unless a budget is given.
    """
    length = graph.max_position if max_model_len is None else max_model_len
    per_token = kv_bytes_per_token(graph, dtype if kv_cache_dtype == "auto" else kv_cache_dtype)
    activations = activation_bytes(graph, dtype, max_num_batched_tokens, max_num_seqs)
    block_bytes = max(1, per_token * block_size)
    sequence_blocks = _ceil(length, block_size) // block_size
    most_blocks = max_num_seqs * sequence_blocks
    if budget is None:
        budget, on_device = _default_budget(target_kind)
        if not on_device:
            most_blocks = min(most_blocks, max(HOST_KV_BYTES // block_bytes, sequence_blocks))
    room_blocks = max(0, budget - weights_bytes - activations) // block_bytes
    num_blocks = min(room_blocks, most_blocks) if kv_cache_bytes is None else kv_cache_bytes // block_bytes
    holds = room_blocks if kv_cache_bytes is None else min(room_blocks, num_blocks)
    return MemoryPlan(
        budget=budget,
        weights=weights_bytes,
        activations=activations,
        kv_per_token=per_token,
        block_size=block_size,
        num_blocks=num_blocks,
        max_model_len=length,
        largest_max_model_len=min(holds * block_size, graph.max_position),
    )


def kv_bytes_per_token(graph: Graph, dtype: str) -> int:
    """Bytes of keys and values of one token over all layers, scales included."""
    return sum(kv_layer_bytes(layer, dtype) for layer in graph.kv)


def kv_layer_bytes(layer: KVLayer, dtype: str) -> int:
    """Bytes of keys and values of one token in one layer, scales included."""
    scale = _INT8_SCALE if dtype == "int8" else 0
    return 2 * layer.kv_heads * (layer.head_dim * KV_BYTES[dtype] + scale)


def activation_bytes(graph: Graph, dtype: str, tokens: int, rows: int) -> int:
    """Peak bytes of the activation buffers of one step of ``tokens`` tokens and ``rows`` sampled rows.

    A buffer lives from the op that writes it to the last that reads it. Logits are float32, and sampling holds
    three arrays of their size (logits, their log-softmax, sorted copies).
    """
    last_use = {name: i for i, op in enumerate(graph.ops) for name in op.inputs}
    live, peak = 0, 0
    for index, op in enumerate(graph.ops):
        live += sum(graph.buffers[name].width for name in op.outputs if name != LOGITS)
        peak = max(peak, live)
        dead = {name for name in (*op.inputs, *op.outputs) if last_use.get(name, index) == index}
        live -= sum(graph.buffers[name].width for name in dead - {LOGITS, INPUT_IDS, POSITIONS})
    return peak * tokens * DTYPE_BYTES[dtype] + 3 * rows * graph.vocab_size * 4


def _default_budget(target_kind: str) -> tuple[int, bool]:
    """What an engine may use by default, and whether that is a GPU's memory."""
    device = cuda_device() if target_kind == "cuda" else None
    if device is not None:
        return int(device.memory * DEVICE_SHARE), True
    return int(available_memory() * HOST_SHARE), False


def available_memory() -> int:
    """Bytes of memory this process may still take: the machine's, or its control group's where that is less."""
    import psutil  # type: ignore[import-untyped,unused-ignore]

    available = int(psutil.virtual_memory().available)
    limit, used = _cgroup_number("memory.max"), _cgroup_number("memory.current")
    if limit is not None and used is not None:
        available = min(available, max(0, limit - used))
    return available


def _cgroup_number(name: str) -> int | None:
    try:
        return int((Path("/sys/fs/cgroup") / name).read_text())
    except (OSError, ValueError):
        return None


def human_bytes(size: float) -> str:
    """``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError("unreachable")


def _ceil(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size) * block_size
