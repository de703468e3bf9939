"""Which layers share a block table."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import CONFIGS

from llmctl.graph.families import build_graph
from llmctl.graph.graph import Graph, KVLayer
from llmctl.graph.kv_groups import group_of_layer, kv_groups, whole_context

LLAMA = build_graph({**CONFIGS["llama"], "vocab_size": 97})


def graph_of(windows: list[int], heads: int = 1) -> Graph:
    layers = tuple(KVLayer(heads, 16, window) for window in windows)
    return replace(LLAMA, kv=layers, max_position=1000)


def shape(graph: Graph) -> list[tuple[int, int]]:
    return [(group.window, len(group.layers)) for group in kv_groups(graph)]


@pytest.mark.parametrize(
    ("windows", "expected"),
    [
        ([0] * 4, [(0, 4)]),
        ([7] * 4, [(7, 4)]),
        ([7, 7, 0, 7] * 2, [(0, 2), (7, 2), (7, 2), (7, 2)]),
        ([7, 7, 7, 7, 7, 0] * 4 + [7, 7], [(0, 2), (0, 2), *[(7, 2)] * 11]),  # Gemma 3 1B: nothing is wasted
        ([7, 7, 7, 7, 7, 0] * 3, [(0, 3), *[(7, 3)] * 5]),
        ([7, 7, 7, 0], [(0, 1), (7, 1), (7, 1), (7, 1)]),
        ([1000, 1000], [(0, 2)]),  # hides nothing
        ([0, 9, 7], [(0, 1), (9, 1), (7, 1)]),
    ],
)
def test_groups(windows: list[int], expected: list[tuple[int, int]]) -> None:
    assert shape(graph_of(windows)) == expected


def test_layers_with_other_heads_share_one_table() -> None:
    graph = graph_of([7, 0])
    mixed = replace(graph, kv=(replace(graph.kv[0], kv_heads=2), graph.kv[1]))
    assert kv_groups(mixed) == whole_context(mixed)


@settings(deadline=None)
@given(st.lists(st.sampled_from([0, 7, 9, 5000]), min_size=1, max_size=70))
def test_every_layer_is_in_one_group_that_sees_as_far(windows: list[int]) -> None:
    groups = kv_groups(graph_of(windows))
    sees = [0 if window == 5000 else window for window in windows]
    assert [sees[layer] for group in groups for layer in group.layers] == [
        group.window for group in groups for _ in group.layers
    ]
    assert sorted(layer for group in groups for layer in group.layers) == list(range(len(windows)))
    assert all(layer in groups[group].layers for layer, group in enumerate(group_of_layer(groups)))
    assert len(groups) <= 16
    sizes = [len(group.layers) for group in groups]
    assert max(sizes) * len(groups) <= 2.5 * len(windows)  # what short groups waste
