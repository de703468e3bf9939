"""Quantization schemes: what contradicts itself, what a manifest says of them, what passes make of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tiny_models import GPT2, LLAMA, tiny_graph

from llmctl.graph.families import build_graph
from llmctl.graph.graph import QuantScheme
from llmctl.graph.passes import apply_passes
from llmctl.graph.serial import scheme_from_dict, scheme_to_dict
from llmctl.targets.base import BuildOptions
from llmctl.targets.cuda.packing import cuda_formats
from llmctl.targets.cuda.target import CUDA_PASSES
from llmctl.targets.table import parse_target

FP8 = QuantScheme(8, 64, True, book="fp8_e4m3", block_rows=64)
NESTED = QuantScheme(4, 32, False, minimum=True, nested=8, nested_bits=6)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"book": "fp9"}, "no code book 'fp9' of 8 bits; known: fp8_e4m3"),
        ({"book": "fp8_e4m3", "bits": 4}, "no code book 'fp8_e4m3' of 4 bits"),
        ({"book": "fp8_e4m3", "symmetric": False}, "has its own zero"),
        ({"minimum": True}, "a symmetric weight has no minimum"),
        ({"block_rows": 0}, "block_rows: expected 1, or more"),
        ({"block_rows": 2, "symmetric": False}, "block_rows: expected 1, or more of a symmetric weight"),
        ({"nested": 8, "symmetric": False}, "nested: expected 0, or more of integers without a zero a group or a book"),
        ({"nested": -1, "symmetric": False, "minimum": True}, "nested: expected 0, or more"),
        ({"nested": 8, "symmetric": False, "minimum": True, "act_order": True}, "nested: expected 0, or more"),
        ({"nested": 8, "symmetric": False, "minimum": True, "nested_bits": 5}, "nested_bits: expected 8, or 4 or 6"),
        ({"nested_bits": 6}, "nested_bits: expected 8"),
    ],
)
def test_attributes_that_contradict_one_another(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        QuantScheme(**{"bits": 8, "group_size": 64, "symmetric": True, **changes})
    fields = {**scheme_to_dict(QuantScheme(8, 64, True)), **changes}
    with pytest.raises(ValueError, match=f"graph.weights.*{reason}"):
        scheme_from_dict(fields, "graph.weights[0].quant")


@pytest.mark.parametrize(
    "scheme", [FP8, QuantScheme(4, 32, False, minimum=True), QuantScheme(3, -1, False, True), NESTED]
)
def test_schemes_are_written_whole(scheme: QuantScheme) -> None:
    fields = scheme_to_dict(scheme)
    assert scheme_from_dict(fields) == scheme
    for name in fields:
        with pytest.raises(ValueError, match=f"key '{name}' is missing"):
            scheme_from_dict({key: value for key, value in fields.items() if key != name})


@pytest.mark.parametrize(("block_rows", "kept"), [(64, 64), (128, 128), (256, 1)])
def test_a_seam_that_cuts_a_block_gives_each_row_its_scale(block_rows: int, kept: int) -> None:
    """Of q, k and v with 256, 128 and 128 rows; the last part may end within a block."""
    scheme = replace(FP8, block_rows=block_rows)
    graph = tiny_graph(LLAMA, scheme, ("merge_qkv",))
    assert graph.weights["layers.0.qkv_proj.weight"].quant == replace(scheme, block_rows=kept)


def test_a_slice_of_a_fused_projection_has_a_scale_a_row() -> None:
    described = build_graph(GPT2)

    class Stored:
        """Every tensor, as it must be; attention's projections quantized by blocks."""

        def __init__(self, tensor: str) -> None:
            parts = [w for w in described.weights.values() if w.parts[0].tensor == tensor]
            shape = (sum(w.shape[0] for w in parts), *parts[0].shape[1:])
            self.quant = FP8 if "attn.c_" in tensor and tensor.endswith("weight") else None
            self.shape = shape if self.quant or not parts[0].parts[0].transpose else shape[::-1]

    graph = build_graph(GPT2, lambda tensor: None if tensor == "lm_head.weight" else Stored(tensor))
    assert graph.weights["layers.0.k_proj.weight"].quant == replace(FP8, block_rows=1)
    assert graph.weights["layers.0.o_proj.weight"].quant == FP8


def test_only_integers_meet_int8_activations() -> None:
    float8, five, four = replace(FP8, block_rows=1), QuantScheme(5, -1, True), QuantScheme(4, -1, True)
    for scheme, wanted in ((QuantScheme(8, -1, True), True), (five, True), (four, False), (float8, False)):
        graph = apply_passes(tiny_graph(LLAMA, scheme, ()), ("int8_activations",))
        assert any("activations" in op.attrs for op in graph.linears()) is wanted


def test_a_quantized_table_is_kept_plain_on_cuda() -> None:
    """Its kernel reads rows dense, and so then does the tied output head, whose refusal is recorded."""
    graph = tiny_graph({**LLAMA, "tie_word_embeddings": True}, QuantScheme(4, 64, True), CUDA_PASSES)
    table = replace(graph.weights["embed.weight"], quant=QuantScheme(8, 32, True))
    graph = replace(graph, weights={**graph.weights, "embed.weight": table})
    formats = cuda_formats(graph)
    assert "embed.weight" not in formats
    assert "layers.0.qkv_proj.weight" in formats
    options = BuildOptions("float16", 128, 16, "float16", graph.passes)
    head = next(c for c in parse_target("cuda:sm_90").choose_kernels(graph, options) if c.op == "lm_head")
    assert any("an embedding table as well" in refused.reason for refused in head.refused)
