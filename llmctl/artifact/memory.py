"""How much memory a model takes: weights, activations, KV cache; what fits, and the longest context that does.

Everything is computed from a Graph and sizes: no tensor is touched. ``fit.py`` says what to change when it does not
fit, ``memory_table.py`` shows a plan.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from llmctl.artifact.kv_layout import KVLayout
from llmctl.artifact.request import EngineRequest
from llmctl.graph.graph import Graph
from llmctl.graph.kv_groups import whole_context
from llmctl.targets.base import BuildOptions, MemoryBudget, Target
from llmctl.targets.lora import lora_graph
from llmctl.targets.planes import Plane

HOST_KV_BYTES = 4 * 2**30
"""Size of the KV cache in memory that other programs live in, when neither it nor a budget is given."""


@dataclass(frozen=True)
class MemoryPlan:
    """What an engine takes and what fits; sizes in bytes.

    Attributes:
        budget: what may be used in all. budget_source: where that comes from, for people.
        weights: all weights as they lie in memory. activations: peak of one step.
        context: what the device takes for running anything at all. adapters: their slots.
        kv: how the KV cache is cut into blocks. num_blocks: KV blocks that the plan allocates.
        max_model_len: longest sequence asked for, tokens.
        largest_max_model_len: longest sequence the budget has room for (at most the model's own limit), tokens.
    """

    budget: int
    budget_source: str
    weights: int
    activations: int
    context: int
    kv: KVLayout
    num_blocks: int
    max_model_len: int
    largest_max_model_len: int
    adapters: int = 0

    @property
    def kv_per_token(self) -> int:
        """KV cache of one token over all layers."""
        return self.kv.bytes_per_token

    @property
    def block_size(self) -> int:
        """Tokens a KV block."""
        return self.kv.block_size

    @property
    def kv_tokens(self) -> int:
        """Tokens the KV cache holds, in sequences of ``max_model_len``; of shorter ones it holds fewer where layers
        have a window."""
        return self.kv.tokens_in(self.num_blocks, self.max_model_len)

    @property
    def kv_bytes(self) -> int:
        """Size of the KV cache."""
        return self.kv.size(self.num_blocks)

    @property
    def sequences(self) -> float:
        """Sequences of ``max_model_len`` that the KV cache holds."""
        return self.kv_tokens / self.max_model_len

    @property
    def fixed(self) -> int:
        """Everything but the KV cache."""
        return self.weights + self.activations + self.context + self.adapters

    @property
    def total(self) -> int:
        """Everything together."""
        return self.fixed + self.kv_bytes

    @property
    def room(self) -> int:
        """What the budget leaves for a KV cache."""
        return max(0, self.budget - self.fixed)

    @property
    def fits(self) -> bool:
        """Whether one sequence of ``max_model_len`` fits."""
        return self.num_blocks >= self.kv.blocks_of(self.max_model_len) and self.total <= self.budget

    @property
    def kv_bytes_of_one(self) -> int:
        """KV cache of one sequence of ``max_model_len``, in whole blocks."""
        return self.kv.size(self.kv.blocks_of(self.max_model_len))

    @property
    def kv_bytes_of_whole_context(self) -> int:
        """What that would be if layers with a window kept every token."""
        return -(-self.max_model_len // self.block_size) * self.block_size * self.kv_per_token

    def shortfall(self) -> str:
        """One line that itemises why ``max_model_len`` does not fit."""
        needed = self.kv_bytes_of_one
        context = f"device context {human_bytes(self.context)} + " if self.context else ""
        context += f"adapters {human_bytes(self.adapters)} + " if self.adapters else ""
        return (
            f"memory: expected at most {human_bytes(self.budget)} ({self.budget_source}), found "
            f"{human_bytes(self.fixed + needed)} needed: weights {human_bytes(self.weights)} + "
            f"activations {human_bytes(self.activations)} + {context}"
            f"KV {human_bytes(needed)} ({self._of_one()})"
        )

    def _of_one(self) -> str:
        if not any(self.kv.windows):
            return f"{self.max_model_len} tokens of {human_bytes(self.kv_per_token)}"
        sliding = sum(len(group.layers) for group in self.kv.groups if group.window)
        return f"{self.max_model_len} tokens, of which {sliding} layers keep their sliding window"


@dataclass(frozen=True)
class Sizing:
    """What a memory plan is made of. ``planes``: the stored tensors."""

    graph: Graph
    options: BuildOptions
    target: Target
    request: EngineRequest
    planes: tuple[Plane, ...]

    def plan(self) -> MemoryPlan:
        """The plan."""
        return plan_memory(self.graph, self.options, self.target, self.request, self.planes)

    def longest_in(self, room: int) -> int:
        """``MemoryPlan.largest_max_model_len`` where the budget leaves so many bytes for a KV cache."""
        return _longest(_layouts(self.graph, self.options, self.target, self.request), room, self.request, self.graph)


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
    limits = request.step_limits(target)
    adapters, run = 0, graph
    if request.lora is not None:
        run = lora_graph(graph, request.lora)
        adapters = target.adapter_bytes(run, options, request.lora)
    activations = target.activation_bytes(run, options, limits.max_num_batched_tokens, limits.max_num_seqs)
    weights, context = target.resident_bytes(graph, options, planes), target.context_bytes()
    budget = _budget(target, request)
    room = max(0, budget.size - weights - activations - context - adapters)
    asked = request.kv_cache_bytes
    layouts = _layouts(graph, options, target, request)
    kv = min(layouts, key=lambda layout: layout.size(layout.blocks_of(length)))
    most_blocks = kv.blocks_of(length, limits.max_num_seqs)
    if budget.shared:
        most_blocks = min(most_blocks, max(HOST_KV_BYTES // kv.block_bytes, kv.blocks_of(length)))
    return MemoryPlan(
        budget=budget.size,
        budget_source=budget.source,
        weights=weights,
        activations=activations,
        context=context,
        kv=kv,
        num_blocks=min(kv.blocks_in(room), most_blocks) if asked is None else kv.blocks_in(asked),
        max_model_len=length,
        largest_max_model_len=_longest(layouts, room, request, graph),
        adapters=adapters,
    )


def _layouts(graph: Graph, options: BuildOptions, target: Target, request: EngineRequest) -> tuple[KVLayout, ...]:
    """One block table a sequence for all layers; and the target's groups, which take less from some length on."""
    per_token, tokens = target.kv_bytes_per_token(graph, options), request.step_limits(target).max_num_batched_tokens
    groups = dict.fromkeys((whole_context(graph), *(() if request.whole_context else (target.kv_groups(graph),))))
    return tuple(KVLayout(one, per_token, options.block_size, tokens) for one in groups)


def _longest(layouts: Iterable[KVLayout], room: int, request: EngineRequest, graph: Graph) -> int:
    """Tokens of the longest sequence that fits in any of the layouts."""
    size = room if request.kv_cache_bytes is None else min(room, request.kv_cache_bytes)
    return max(layout.longest(layout.blocks_in(size), graph.max_position) for layout in layouts)


def _budget(target: Target, request: EngineRequest) -> MemoryBudget:
    if request.budget is not None:
        return MemoryBudget(request.budget, "the budget that was given", shared=False)
    return target.memory_budget(request.gpu_memory_utilization)


def human_bytes(size: float) -> str:
    """``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError("unreachable")
