"""Every pass gives an equal graph: same logits through the reference runtime, still valid, smaller."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from family_models import CASES, MORE_CASES, VOCAB, family_model, slow

from llmctl.engine.step import SequenceSlice, StepPlan
from llmctl.errors import UsageError
from llmctl.graph.check import check_graph
from llmctl.graph.graph import Graph, QuantScheme
from llmctl.graph.passes import DEFAULT_PASSES, PASSES, apply_passes
from llmctl.graph.serial import graph_from_dict, graph_to_dict
from llmctl.targets.cuda.target import CUDA_PASSES
from llmctl.targets.reference.runtime import ReferenceRuntime
from llmctl.targets.reference.weights import CheckpointWeights


def logits(case: str, graph: Graph) -> torch.Tensor:
    """All rows of two sequences, one of them continued in a second step."""
    weights = CheckpointWeights(graph, family_model(case).checkpoint)
    runtime = ReferenceRuntime(graph, weights, num_blocks=16, block_size=4)
    ids = np.random.default_rng(0).integers(0, VOCAB, 31).tolist()
    first = StepPlan(
        (SequenceSlice("a", ids[:11], 0, [3, 1, 5, 2], True), SequenceSlice("b", ids[20:], 0, [0, 4, 7], True))
    )
    second = StepPlan((SequenceSlice("a", ids[11:15], 11, [3, 1, 5, 2], True),))
    return torch.cat([runtime.logits(plan, all_rows=True) for plan in (first, second)])


@pytest.mark.parametrize("case", ["llama", "llama_biases_tied", "mistral", "qwen2", "qwen3", "phi", "gpt2"])
def test_each_pass_alone_and_in_any_order_changes_nothing(case: str) -> None:
    plain = family_model(case).graph
    expected = logits(case, plain)
    chains = [(name,) for name in PASSES]
    chains += [CUDA_PASSES, CUDA_PASSES[::-1], (*CUDA_PASSES, *CUDA_PASSES), DEFAULT_PASSES]
    for names in chains:
        graph = apply_passes(plain, names)
        check_graph(graph)
        assert graph.passes == names
        assert graph_from_dict(graph_to_dict(graph)) == graph
        torch.testing.assert_close(logits(case, graph), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", [*CASES, *slow(MORE_CASES)])
def test_plain_graphs_are_valid(case: str) -> None:
    check_graph(family_model(case).graph)


def kinds(graph: Graph) -> Counter[str]:
    return Counter(op.kind for op in graph.ops)


@pytest.mark.parametrize("case", ["llama", "mistral", "qwen2"])
def test_a_llama_layer_becomes_eight_ops(case: str) -> None:
    graph = apply_passes(family_model(case).graph)
    assert [op.kind for op in graph.layer_ops(1)] == [
        "linear", "rope_kv_write", "attention", "linear", "add_rms_norm", "linear", "linear", "add_rms_norm",
    ]  # fmt: skip
    qkv, _, gate_up, _ = (op for op in graph.layer_ops(1) if op.kind == "linear")
    assert len(qkv.attrs["splits"]) == 3
    assert gate_up.attrs["epilogue"] == "silu_mul"
    assert bool(qkv.weights[1]) == (case == "qwen2")


def test_phi_keeps_one_norm_for_both_branches() -> None:
    plain, graph = family_model("phi").graph, apply_passes(family_model("phi").graph)
    norms = kinds(plain)["layer_norm"]
    assert (norms, kinds(graph)["add_layer_norm"], kinds(graph)["layer_norm"]) == (4, 3, 1)
    first = graph.layer_ops(0)[0]
    assert Counter(b for op in graph.ops for b in op.inputs)[first.outputs[0]] == 2


def test_gpt2_qkv_becomes_the_whole_stored_tensor() -> None:
    graph = apply_passes(family_model("gpt2").graph)
    weight = graph.weights["layers.0.qkv_proj.weight"]
    assert weight.shape == (180, 60)
    assert [(p.tensor, p.transpose, p.rows) for p in weight.parts] == [
        ("transformer.h.0.attn.c_attn.weight", True, (0, 180))
    ]
    assert kinds(graph)["rope_kv_write"] == 0


def quantized(graph: Graph, schemes: dict[str, QuantScheme]) -> Graph:
    weights = {n: replace(w, quant=schemes.get(n.split(".")[-2])) for n, w in graph.weights.items()}
    return replace(graph, weights=weights)


def test_merges_need_one_scheme_without_act_order() -> None:
    plain = family_model("llama").graph
    four, eight = QuantScheme(4, 20, False), QuantScheme(8, 20, False)
    roles = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    same = apply_passes(quantized(plain, dict.fromkeys(roles, four)))
    assert same.weights["layers.0.qkv_proj.weight"].quant == four
    mixed = apply_passes(quantized(plain, {**dict.fromkeys(roles, four), "k_proj": eight, "up_proj": eight}))
    ordered = apply_passes(quantized(plain, dict.fromkeys(roles, replace(four, act_order=True))))
    for graph in (mixed, ordered):
        check_graph(graph)
        assert "layers.0.q_proj.weight" in graph.weights
        assert "layers.0.gate_proj.weight" in graph.weights


def with_op(graph: Graph, name: str, /, **changes: Any) -> Graph:
    """The graph with one op changed, and without the weights that leaves unused."""
    ops = tuple(op.with_(**changes) if op.name == name else op for op in graph.ops)
    used = {w for op in ops for w in op.weights}
    return replace(graph, ops=ops, weights={n: w for n, w in graph.weights.items() if n in used})


def test_what_looks_alike_is_left_alone() -> None:
    plain = family_model("llama_biases_tied").graph
    shared = with_op(plain, "layers.1.k_proj", weights=("layers.1.q_proj.weight", "layers.1.k_proj.bias"))
    no_bias = with_op(plain, "layers.1.k_proj", weights=("layers.1.k_proj.weight", ""))
    other_input = with_op(plain, "layers.1.k_proj", inputs=("layers.0.mlp_residual",))
    for graph in (shared, no_bias, other_input):
        check_graph(graph)
        merged = apply_passes(graph, ["merge_qkv"])
        check_graph(merged)
        assert [op.name for op in merged.layer_ops(1)] == [op.name for op in graph.layer_ops(1)]
        assert "layers.0.qkv_proj" in [op.name for op in merged.ops]

    halves = apply_passes(plain, ["merge_gate_up"])
    gate, up = next(op for op in halves.ops if op.name == "layers.1.gate_up_proj").outputs
    up_first = with_op(halves, "layers.1.gate_up_proj", outputs=(up, gate))
    used_twice = with_op(halves, "layers.1.gate_mul", inputs=("layers.1.act", "layers.1.act"))
    for graph in (up_first, used_twice):
        fused = apply_passes(graph, ["fuse_gated_activation"])
        assert [op.kind for op in fused.layer_ops(1)] == [op.kind for op in graph.layer_ops(1)]
        assert kinds(fused)["mul"] == 1

    key_as_value = with_op(plain, "layers.1.kv_write", inputs=("layers.1.rope.1", "layers.1.rope.1"))
    assert kinds(apply_passes(key_as_value, ["fuse_rope_kv"]))["rope_kv_write"] == 2


def test_parallel_residuals_are_added_by_the_linear() -> None:
    plain, graph = (apply_passes(family_model("phi").graph, passes) for passes in (DEFAULT_PASSES, CUDA_PASSES))
    assert kinds(plain)["add"] == plain.num_layers
    assert kinds(graph)["add"] == 0
    added = [op for op in graph.ops if "residual" in op.attrs]
    assert len(added) == graph.num_layers
    assert all(graph.buffers[op.inputs[-1]].width == graph.hidden_size for op in added)
    # A Llama's adds are its norms'.
    llama = apply_passes(family_model("llama").graph, CUDA_PASSES)
    assert not [op for op in llama.ops if "residual" in op.attrs]


def test_int8_rows_come_from_the_norm_where_it_can_be() -> None:
    plain = family_model("llama").graph
    roles = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    eight = QuantScheme(8, -1, symmetric=True)
    graph = apply_passes(quantized(plain, dict.fromkeys(roles, eight)), (*CUDA_PASSES, "int8_activations"))
    check_graph(graph)
    assert graph_from_dict(graph_to_dict(graph)) == graph
    assert [op.kind for op in graph.layer_ops(1)] == [
        "linear", "rope_kv_write", "attention", "quantize", "linear", "add_rms_norm_s8", "linear", "quantize", "linear",
        "add_rms_norm_s8",
    ]  # fmt: skip
    assert (kinds(graph)["rms_norm_s8"], graph.layer_ops(2)[-1].kind) == (1, "add_rms_norm")
    assert all(op.attrs["activations"] == "int8" for op in graph.linears() if op.name != "lm_head")

    # Other weights, too, read what feeds q: the norm's result is needed as it is.
    mixed = quantized(
        plain, {"q_proj": eight, "k_proj": replace(eight, symmetric=False), "v_proj": replace(eight, bits=4)}
    )
    shared = apply_passes(mixed, (*CUDA_PASSES, "int8_activations"))
    check_graph(shared)
    assert [op.kind for op in shared.layer_ops(0)][:5] == ["rms_norm", "quantize", "linear", "linear", "linear"]
    assert [op.name for op in shared.linears() if "activations" in op.attrs] == [f"layers.{i}.q_proj" for i in range(3)]
    for scheme in (QuantScheme(4, -1, True), QuantScheme(8, -1, False), QuantScheme(8, 20, True, act_order=True)):
        graph = quantized(plain, dict.fromkeys(roles, scheme))
        assert apply_passes(graph, ["int8_activations"]).ops == graph.ops


def test_unknown_pass() -> None:
    with pytest.raises(UsageError, match="unknown pass 'fuse_everything'; known passes: merge_qkv"):
        apply_passes(family_model("llama").graph, ["fuse_everything"])
