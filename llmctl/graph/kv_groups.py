"""Which layers share a block table: layers with a sliding window let go of blocks that others keep.

A KV block holds the tokens of as many layers as a group has, so that a block is of one size whichever group takes it,
and all groups take theirs from one pool. Design after vLLM's hybrid KV cache manager.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmctl.graph.graph import Graph

_MOST_GROUPS = 16
"""Each has a block table a sequence, which a step brings up to date and reads."""


@dataclass(frozen=True)
class KVGroup:
    """Layers (indices of ``Graph.kv``) that see ``window`` positions, their own included; 0: all."""

    window: int
    layers: tuple[int, ...]


def group_of_layer(groups: Sequence[KVGroup]) -> tuple[int, ...]:
    """The group of each layer."""
    found = {layer: index for index, group in enumerate(groups) for layer in group.layers}
    return tuple(found[layer] for layer in range(len(found)))


def block_bytes(groups: Sequence[KVGroup], bytes_per_token: int, block_size: int) -> int:
    """Of a block, which holds ``block_size`` tokens of one group; ``bytes_per_token``: of one token over all layers,
    which take the same where there are several groups."""
    layers = [len(group.layers) for group in groups]
    return bytes_per_token * max(layers) * block_size // max(1, sum(layers))


def whole_context(graph: Graph) -> tuple[KVGroup, ...]:
    """One group of all layers, which keeps every token."""
    return (KVGroup(0, tuple(range(len(graph.kv)))),)


def kv_groups(graph: Graph) -> tuple[KVGroup, ...]:
    """The groups of a graph, those that see most first; the last of a window may have fewer layers than the others.

    One group of all layers, window 0, where no window is shorter than the longest sequence, or where heads differ
    between layers, whose blocks could not be exchanged then.
    """
    windows: dict[int, list[int]] = {}
    for index, layer in enumerate(graph.kv):
        windows.setdefault(layer.window if layer.window < graph.max_position else 0, []).append(index)
    if set(windows) <= {0} or len({(layer.kv_heads, layer.head_dim) for layer in graph.kv}) > 1:
        return whole_context(graph)
    widest_first = sorted(windows, key=lambda window: (window != 0, -window))
    size = _layers_a_group([len(windows[window]) for window in widest_first])
    return tuple(
        KVGroup(window, tuple(windows[window][start : start + size]))
        for window in widest_first
        for start in range(0, len(windows[window]), size)
    )


def _layers_a_group(counts: list[int]) -> int:
    """How many layers a block is for. ``counts``: layers by window, the widest first.

    A group that is short of layers wastes the rest of its blocks: of all layers' in short sequences, of mainly the
    widest's in long ones. The size with the least of both together, of equals the one that makes the fewest groups.
    """

    def waste(size: int) -> tuple[float, int]:
        groups = [-(-count // size) for count in counts]
        return groups[0] * size / counts[0] + sum(groups) * size / sum(counts), sum(groups)

    sizes = range(1, max(counts) + 1)
    few = [size for size in sizes if sum(-(-count // size) for count in counts) <= _MOST_GROUPS]
    return min(few, key=waste, default=max(counts))
