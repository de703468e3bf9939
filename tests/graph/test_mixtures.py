"""Mixtures of experts: what configs say of them, what is refused, and the graph that is made."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from family_models import family_model
from random_models import CONFIGS, write_model

from llmctl.checkpoint.assemble import assemble, checkpoint_graph
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.checkpoint.safetensors_io import tensor_spec, write_safetensors
from llmctl.checkpoint.tensor_info import TensorInfo
from llmctl.errors import CheckpointError, UnsupportedModelError
from llmctl.graph.check import check_graph
from llmctl.graph.experts import apart, linears
from llmctl.graph.families import build_graph
from llmctl.graph.graph import Buffer, Graph, QuantScheme
from llmctl.graph.passes import apply_passes
from llmctl.graph.serial import graph_from_dict, graph_to_dict

QWEN3 = {**CONFIGS["qwen3_moe"], "vocab_size": 97}
GLM = {
    **{**CONFIGS["qwen3_moe"], "vocab_size": 97, "model_type": "glm4_moe", "n_routed_experts": 8},
    **{"num_hidden_layers": 3, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
}
del GLM["num_experts"]


def mixed_layers(config: dict[str, Any]) -> list[int]:
    return [op.layer for op in build_graph(config).ops if op.kind == "route"]


def test_layers_with_experts_by_family() -> None:
    qwen = {**QWEN3, "num_hidden_layers": 6}
    assert mixed_layers(qwen) == [0, 1, 2, 3, 4, 5]
    assert mixed_layers({**qwen, "decoder_sparse_step": 2}) == [1, 3, 5]
    assert mixed_layers({**qwen, "decoder_sparse_step": 2, "mlp_only_layers": [3]}) == [1, 5]
    assert mixed_layers(GLM) == [1, 2]
    assert mixed_layers({**GLM, "first_k_dense_replace": 0}) == [0, 1, 2]


def test_routing_by_family() -> None:
    def routing(config: dict[str, Any]) -> tuple[Any, ...]:
        attrs = next(op.attrs for op in build_graph(config).ops if op.kind == "route")
        return tuple(attrs[name] for name in ("top_k", "scores", "renormalise", "scale", "groups", "top_groups"))

    assert routing(QWEN3) == (2, "softmax", False, 1.0, 1, 1)
    assert routing({**QWEN3, "norm_topk_prob": True}) == (2, "softmax", True, 1.0, 1, 1)
    assert routing(GLM) == (2, "sigmoid", True, 2.5, 4, 2)


@pytest.mark.parametrize(
    ("config", "changes", "words"),
    [
        (QWEN3, {"num_experts_per_tok": 7}, "num_experts_per_tok: expected at most 6 experts, found 7"),
        (QWEN3, {"num_experts": 5000}, "expected at most 4096 experts, found 5000"),
        (QWEN3, {"num_experts": 0}, "num_experts must be a positive integer, found 0"),
        (QWEN3, {"moe_intermediate_size": None}, "moe_intermediate_size must be a positive integer"),
        (QWEN3, {"mlp_only_layers": ["1"]}, "mlp_only_layers must be a list of layers, found ['1']"),
        (GLM, {"n_group": 3}, "n_group: expected groups of two or more of 8 experts, found 3"),
        (GLM, {"n_group": 8}, "n_group: expected groups of two or more of 8 experts, found 8"),
        (GLM, {"topk_group": 5}, "topk_group: expected up to 4 groups that hold 2 experts, found 5"),
        (GLM, {"topk_group": 1, "num_experts_per_tok": 3}, "expected up to 4 groups that hold 3 experts, found 1"),
        (GLM, {"routed_scaling_factor": 0}, "routed_scaling_factor must be a positive number, found 0.0"),
        (GLM, {"first_k_dense_replace": -1}, "first_k_dense_replace must be a whole number from 0 on, found -1"),
        (GLM, {"n_shared_experts": "1"}, "n_shared_experts must be a whole number from 0 on, found '1'"),
        (CONFIGS["qwen2_moe"], {"vocab_size": 97, "use_sliding_window": True}, "use_sliding_window=True"),
    ],
)
def test_settings_that_make_no_sense_are_refused(config: dict[str, Any], changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        build_graph({**config, **changes})
    assert words in str(caught.value)


def stored(change: Callable[[str], QuantScheme | None]) -> Graph:
    """The graph of a checkpoint whose tensors are quantized as ``change`` says of their names."""
    plain = build_graph(QWEN3)
    shapes = {}
    for weight in plain.weights.values():
        for part in weight.parts:
            shapes[part.tensor] = (weight.shape[0] // len(weight.parts), *weight.shape[1:])
    return build_graph(QWEN3, lambda name: TensorInfo(shapes[name], "F16", change(name), 0) if name in shapes else None)


def test_experts_are_one_weight_a_projection() -> None:
    scheme = QuantScheme(4, 16, symmetric=True)
    graph = stored(lambda name: scheme if ".experts." in name else None)
    check_graph(graph)
    weight = graph.weights["layers.0.experts.down_proj.weight"]
    assert (weight.shape, weight.quant, len(weight.parts)) == ((6 * 64, 48), scheme, 6)
    fused = apply_passes(graph).weights["layers.0.experts.gate_up_proj.weight"]
    assert (fused.shape, fused.quant) == ((6 * 2 * 48, 64), scheme)
    assert [part.tensor.rpartition(".mlp.")[2] for part in fused.parts[:3]] == [
        "experts.0.gate_proj.weight",
        "experts.0.up_proj.weight",
        "experts.1.gate_proj.weight",
    ]


def test_experts_that_differ_are_refused() -> None:
    four, eight = QuantScheme(4, 16, symmetric=True), QuantScheme(8, 16, symmetric=True)
    with pytest.raises(
        UnsupportedModelError, match=r"'model.layers.0.mlp.experts.3.up_proj.weight' is stored as 8 bits"
    ):
        stored(lambda name: eight if ".experts.3.up_proj" in name else four if ".experts." in name else None)
    with pytest.raises(UnsupportedModelError, match="is stored as a dense weight"):
        stored(lambda name: four if ".experts." in name and ".5." not in name else None)
    ordered = QuantScheme(4, 16, symmetric=True, act_order=True)
    with pytest.raises(UnsupportedModelError, match="experts with act-order groups are not read"):
        stored(lambda name: ordered if ".experts." in name else None)


def test_an_expert_that_is_missing_or_has_another_shape_is_named(tmp_path: Path) -> None:
    source = open_checkpoint(write_model(tmp_path / "model", "qwen3_moe"))
    name = "model.layers.1.mlp.experts.4.down_proj.weight"
    with pytest.raises(CheckpointError, match=f"tensor '{name}' is missing"):
        build_graph(source.config, lambda n: source.describe(n) if source.has(n) and n != name else None)
    other = TensorInfo((64, 40), "F32", None, 0)
    with pytest.raises(CheckpointError, match=rf"tensor '{name}': expected shape \[64, 48\], found \[64, 40\]"):
        build_graph(source.config, lambda n: other if n == name else source.describe(n) if source.has(n) else None)


def test_one_tensor_for_all_experts_is_read_as_a_tensor_for_each(tmp_path: Path) -> None:
    source = open_checkpoint(write_model(tmp_path / "model", "qwen3_moe"))
    whole = {name: source.weight(name) for name in source.names() if ".experts." not in name}
    for layer in range(2):
        start = f"model.layers.{layer}.mlp.experts"
        each = {
            role: [source.weight(f"{start}.{e}.{role}_proj.weight") for e in range(6)]
            for role in ("gate", "up", "down")
        }
        whole[f"{start}.gate_up_proj"] = torch.cat([torch.stack(each["gate"]), torch.stack(each["up"])], dim=1)
        whole[f"{start}.down_proj"] = torch.stack(each["down"])
    write_safetensors(tmp_path / "model" / "model.safetensors", {n: tensor_spec(t) for n, t in whole.items()})
    made = open_checkpoint(tmp_path / "model")
    assert made.names() == source.names()
    graph = checkpoint_graph(made)
    for weight in graph.weights.values():
        assert torch.equal(assemble(weight, made), assemble(weight, source))
        assert all(made.describe(part.tensor).nbytes == source.describe(part.tensor).nbytes for part in weight.parts)


@pytest.mark.parametrize("shape", [(2, 0, 4), (0, 6, 4), (2, 5, 4)], ids=str)
def test_a_tensor_of_all_experts_that_has_no_halves_is_left_as_it_is(shape: tuple[int, ...], tmp_path: Path) -> None:
    folder, name = write_model(tmp_path / "model", "qwen3_moe"), "model.layers.0.mlp.experts.gate_up_proj"
    write_safetensors(folder / "model.safetensors", {name: tensor_spec(torch.zeros(shape))})
    made = open_checkpoint(folder)
    assert [(n, tuple(made.describe(n).shape)) for n in made.names()] == [(name, shape)]


def test_experts_apart_are_linears_of_their_own() -> None:
    plain = family_model("qwen2_moe").graph
    graph = apart(plain)
    check_graph(graph)
    assert graph_from_dict(graph_to_dict(graph)) == graph
    names = [op.name for op in linears(graph) if op.layer == 1]
    assert names[:5] == [f"layers.1.{role}" for role in ("q_proj", "k_proj", "v_proj", "o_proj", "router")]
    assert names[5:7] == ["layers.1.experts.gate_proj.0", "layers.1.experts.gate_proj.1"]
    assert names[-4:] == [f"layers.1.shared.{role}" for role in ("gate_proj", "up_proj", "down_proj", "switch")]
    assert len(names) == 5 + 3 * 5 + 4


def changed(name: str, **changes: Any) -> Callable[[Graph], Graph]:
    """A graph with an op's attributes (``attrs``, added to its own) or fields replaced."""

    def change(graph: Graph) -> Graph:
        op = next(op for op in graph.ops if op.name == name)
        new = op.with_(**{**changes, "attrs": {**op.attrs, **changes.get("attrs", {})}})
        return replace(graph, ops=tuple(new if one is op else one for one in graph.ops))

    return change


ROUTE, DOWN, FUSED = "layers.0.route", "layers.0.experts.down_proj", "layers.0.experts.gate_up_proj"
BROKEN: dict[str, tuple[Callable[[Graph], Graph], str]] = {
    "more experts than columns": (
        changed(ROUTE, attrs={"top_k": 3}),
        "width of 'layers.0.route.0': expected 3, found 2",
    ),
    "scores": (changed(ROUTE, attrs={"scores": "tanh"}), "scores are known"),
    "groups": (changed(ROUTE, attrs={"groups": 4}), "experts left over by whole groups"),
    "top groups": (changed(ROUTE, attrs={"groups": 6}), "top_groups hold top_k"),
    "bias": (changed(ROUTE, weights=("layers.0.mlp_norm.weight",)), "shape of 'layers.0.mlp_norm.weight'"),
    "experts left over": (changed(DOWN, attrs={"count": 5}), "rows left over by whole experts"),
    "fewer experts": (changed(DOWN, attrs={"count": 3}), "width of the result: expected 256, found 128"),
    "rows of another width": (changed(DOWN, inputs=("layers.0.mlp_norm", "layers.0.route.0")), "width of x"),
    "epilogue": (changed(FUSED, attrs={"epilogue": "tanh_mul"}), "epilogue is known"),
    "half of gate and up": (
        changed(FUSED, outputs=("layers.0.mlp_norm2",)),
        "rows of gate and up: expected 768, found 576",
    ),
    "shares": (changed("layers.0.experts.sum", inputs=(DOWN, "layers.0.router")), "width of the parts"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_mixture_that_does_not_fit_together_is_refused(how: str) -> None:
    change, words = BROKEN[how]
    graph = apply_passes(build_graph(QWEN3))
    graph = replace(graph, buffers={**graph.buffers, "layers.0.mlp_norm2": Buffer("layers.0.mlp_norm2", 128)})
    with pytest.raises(ValueError, match=re.escape(words)):
        check_graph(change(graph))


def test_experts_apart_are_of_one_shape() -> None:
    graph = apart(build_graph(QWEN3))
    odd = graph.weights["layers.0.experts.up_proj.4.weight"]
    weights = {**graph.weights, odd.name: replace(odd, shape=(48, 60))}
    with pytest.raises(ValueError, match=re.escape("up_proj.4.weight': expected (48, 64), found (48, 60)")):
        check_graph(replace(graph, weights=weights))


def test_a_window_is_on_every_layer_or_none() -> None:
    def windows(**changes: Any) -> list[int]:
        return [kv.window for kv in build_graph({**QWEN3, **changes}).kv]

    assert windows(sliding_window=9) == windows(sliding_window=None, use_sliding_window=True) == [0, 0]
    assert windows(sliding_window=9, use_sliding_window=True) == [9, 9]


def test_an_expert_that_is_stored_twice_is_named(tmp_path: Path) -> None:
    source = open_checkpoint(write_model(tmp_path / "model", "qwen3_moe"))
    tensors = {name: source.weight(name) for name in source.names()}
    tensors["model.layers.0.mlp.experts.down_proj"] = torch.zeros(6, 64, 48)
    write_safetensors(tmp_path / "model" / "model.safetensors", {n: tensor_spec(t) for n, t in tensors.items()})
    with pytest.raises(
        CheckpointError, match=re.escape("holds 'model.layers.0.mlp.experts.0.down_proj.weight', which")
    ):
        open_checkpoint(tmp_path / "model")
