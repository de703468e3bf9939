"""A memory plan as rows for people and as data: every item, and beside it the same model unquantized."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llmctl.artifact.memory import MemoryPlan, Sizing, human_bytes
from llmctl.graph.dtypes import DTYPES
from llmctl.graph.graph import Graph

if TYPE_CHECKING:
    from rich.table import Table

Row = Sequence[str]
"""What, this engine, and (for a quantized model) the same unquantized."""


def memory_rows(sizing: Sizing, plan: MemoryPlan) -> list[Row]:
    """The rows of a plan, a heading first.

    Args:
        plan: that of ``sizing``, its KV blocks perhaps fewer, as a runtime that measured found room for.
    """
    plans = [plan, *_unquantized(sizing, plan)]
    limits, lora = sizing.request.step_limits(sizing.target), sizing.request.lora
    heading = ["memory", "this engine", f"not quantized, {sizing.options.dtype}"]
    step = f"activations, {limits.max_num_batched_tokens} tokens a step"
    rows = [
        ("weights", [human_bytes(p.weights) for p in plans]),
        (step, [human_bytes(p.activations) for p in plans]),
        *([("device context, an allowance", [human_bytes(p.context) for p in plans])] if plan.context else []),
        *([(f"{lora.slots} adapters of rank {lora.rank}", [human_bytes(p.adapters) for p in plans])] if lora else []),
        (
            f"KV cache, {sizing.options.kv_cache_dtype}",
            [human_bytes(p.kv_bytes) if p.kv_bytes else "none" for p in plans],
        ),
        ("  tokens of it", [str(p.kv_tokens) for p in plans]),
        (f"  sequences of {plan.max_model_len} tokens", [f"{p.sequences:.1f}" for p in plans]),
        *_window_rows(sizing, plan, len(plans)),
        ("total", [human_bytes(p.total) for p in plans]),
        ("budget", [human_bytes(p.budget) for p in plans]),
        ("longest sequence that fits, tokens", [str(p.largest_max_model_len) for p in plans]),
    ]
    return [heading[: 1 + len(plans)], *([what, *cells] for what, cells in rows)]


def memory_document(sizing: Sizing, plan: MemoryPlan) -> dict[str, Any]:
    """A plan as JSON data; sizes in bytes."""
    document = {**_figures(plan), "budget_source": plan.budget_source, "kv_cache_dtype": sizing.options.kv_cache_dtype}
    for other in _unquantized(sizing, plan):
        document["unquantized"] = {"dtype": sizing.options.dtype, **_figures(other)}
    return document


def render(rows: Iterable[Row], *, note: str = "") -> Table:
    """The rows as a table that fits 80 columns; ``note`` stands below it."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    heading, *body = rows
    table = Table(box=SIMPLE_HEAD, caption=note or None, caption_justify="left", pad_edge=False)
    for i, name in enumerate(heading):
        table.add_column(name, justify="right" if i else "left", overflow="fold")
    for row in body:
        table.add_row(*row)
    return table


def _figures(plan: MemoryPlan) -> dict[str, Any]:
    return {
        "weights_bytes": plan.weights,
        "activation_bytes": plan.activations,
        "device_context_bytes": plan.context,
        "adapter_bytes": plan.adapters,
        "kv_bytes_per_token": plan.kv_per_token,
        "kv_cache_bytes": plan.kv_bytes,
        "block_size": plan.block_size,
        "kv_blocks": plan.num_blocks,
        "kv_tokens": plan.kv_tokens,
        "max_model_len": plan.max_model_len,
        "sequences_of_max_model_len": round(plan.sequences, 2),
        "kv_bytes_max_model_len": plan.kv_bytes_of_one,
        "kv_bytes_max_model_len_without_windows": plan.kv_bytes_of_whole_context,
        "kv_groups": [{"window": group.window, "layers": len(group.layers)} for group in plan.kv.groups],
        "largest_max_model_len": plan.largest_max_model_len,
        "total_bytes": plan.total,
        "memory_budget_bytes": plan.budget,
        "fits": plan.fits,
    }


def _unquantized(sizing: Sizing, plan: MemoryPlan) -> list[MemoryPlan]:
    """The plan with every weight dense in the compute dtype, and the KV cache that is left; none for a dense model."""
    if all(weight.quant is None for weight in sizing.graph.weights.values()):
        return []
    dense = replace(plan, weights=_dense_bytes(sizing.graph, sizing.options.dtype))
    blocks = plan.kv.blocks_in(dense.room)
    capped = plan.num_blocks < plan.kv.blocks_in(
        plan.room
    )  # by what can be used, by a size, by what a runtime measured
    largest = sizing.longest_in(dense.room)
    return [replace(dense, num_blocks=min(blocks, plan.num_blocks) if capped else blocks,
                    largest_max_model_len=largest)]  # fmt: skip


def _dense_bytes(graph: Graph, dtype: str) -> int:
    return sum(math.prod(weight.shape) for weight in graph.weights.values()) * DTYPES[dtype].nbytes


def _window_rows(sizing: Sizing, plan: MemoryPlan, columns: int) -> list[tuple[str, list[str]]]:
    """What a sequence takes where layers have a window, and what it would take if they kept every token."""
    sliding = [layer.window for layer in sizing.graph.kv if 0 < layer.window < plan.max_model_len]
    if not sliding:
        return []
    if not any(plan.kv.windows):
        return [(f"  {len(sliding)} layers with a sliding window", ["keep every token"] * columns)]
    return [
        ("  a sequence of that length", [human_bytes(plan.kv_bytes_of_one)] * columns),
        (f"  if {len(sliding)} sliding layers kept all of it", [human_bytes(plan.kv_bytes_of_whole_context)] * columns),
    ]
