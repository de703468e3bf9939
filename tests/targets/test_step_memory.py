"""What a step takes besides weights, against sums done by hand."""

from __future__ import annotations

import pytest
import tiny_checkpoint
from tiny_checkpoint import HEADS, HIDDEN, KV_HEADS, LAYERS, MLP, VOCAB

from llmctl.graph.families import build_graph
from llmctl.graph.graph import Graph
from llmctl.graph.passes import DEFAULT_PASSES, apply_passes
from llmctl.targets.step_memory import activation_bytes, kv_bytes_per_token


@pytest.fixture(scope="module")
def graph() -> Graph:
    return apply_passes(build_graph(tiny_checkpoint.config()), DEFAULT_PASSES)


def test_kv_bytes_per_token(graph: Graph) -> None:
    width = HIDDEN // HEADS * KV_HEADS
    assert kv_bytes_per_token(graph, "float32") == LAYERS * 2 * width * 4
    assert kv_bytes_per_token(graph, "bfloat16") == LAYERS * 2 * width * 2
    assert kv_bytes_per_token(graph, "int8") == LAYERS * 2 * (width + KV_HEADS * 4)


def test_activations_hold_what_is_live(graph: Graph) -> None:
    """At the widest point: residual, the norm's output and the MLP's gated half (its gate/up pair is fused away)."""
    logits = 3 * 64 * VOCAB * 4
    measured = activation_bytes(graph, "float32", 100, 64) - logits
    assert measured % 400 == 0
    assert HIDDEN + MLP <= measured // 400 <= 3 * HIDDEN + 2 * MLP
