"""Which kernel an op gets, and the reason each candidate gives when it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llmctl.errors import CompileError
from llmctl.graph.graph import LOGITS, Buffer, Graph, KVLayer, Op, QuantScheme, Weight, WeightPart
from llmctl.kernels.compile import compile_modules
from llmctl.kernels.registry import FALLBACK, OpFacts, choose, choose_all, sources_of

W4 = QuantScheme(4, 64, symmetric=False)


def graph_of(op: Op, weight: Weight | None = None, width: int = 128, vocab: int = 10, head_dim: int = 64) -> Graph:
    buffers = {name: Buffer(name, width) for name in (*op.inputs, *op.outputs)}
    weights = {} if weight is None else {weight.name: weight}
    return Graph("llama", vocab, 128, 1, 64, (KVLayer(2, head_dim),), buffers, weights, (op,))


def op_graph(kind: str, inputs: str, outputs: str, width: int = 128, head_dim: int = 64, **attrs: object) -> Graph:
    if kind != "kv_write":  # it has the head size from the graph alone
        attrs["head_dim"] = head_dim
    return graph_of(Op(kind, kind, tuple(inputs.split()), tuple(outputs.split()), (), attrs), None, width, 10, head_dim)


def linear(quant: QuantScheme | None = W4, columns: int = 128, **attrs: str) -> Graph:
    weight = Weight("w", (256, columns), (WeightPart("w"),), quant)
    return graph_of(Op("linear", "lin", ("x",), ("y",), ("w", ""), attrs), weight)


def norm(width: int = 128, kind: str = "add_rms_norm") -> Graph:
    weight = Weight("w", (width,), (WeightPart("w"),))
    return graph_of(Op(kind, "norm", ("x", "r"), ("y", "s"), ("w",), {"eps": 1e-5, "plus_one": False}), weight, width)


def chosen(
    graph: Graph, dtype: str = "bfloat16", device: str = "cuda", scales: str = "F16", kv_dtype: str = "auto"
) -> tuple[str, list[str]]:
    choice = choose(OpFacts(graph.ops[0], graph, dtype, {"w.scales": scales}, kv_dtype), device)
    return choice.kernel, [refusal.reason for refusal in choice.refused]


def test_a_plain_4_bit_linear_gets_a_kernel() -> None:
    assert chosen(linear())[0] != FALLBACK
    assert chosen(linear(QuantScheme(4, -1, symmetric=True)))[0] != FALLBACK


@pytest.mark.parametrize("kind", ["rms_norm", "add_rms_norm"])
def test_norms(kind: str) -> None:
    assert chosen(norm(kind=kind)) == ("rms_norm", [])


@pytest.mark.parametrize(
    ("graph", "dtype", "reason"),
    [
        (linear(None), "float16", "the weight is dense"),
        (linear(replace(W4, bits=3)), "float16", "3-bit codes"),
        (linear(replace(W4, act_order=True)), "float16", "activation order"),
        (linear(W4, columns=72), "float16", "72 columns in groups of 64"),
        (linear(), "float32", "activations are float32"),
        (norm(100), "float16", "width 100"),
        (norm(), "float32", "activations are float32"),
        (linear(None, epilogue="silu_mul"), "float32", "activations are float32"),
        (linear(replace(W4, bits=3), epilogue="silu_mul"), "float16", "product before this kernel is torch's"),
        (op_graph("head_rms_norm", "x", "y", head_dim=36), "float16", "head size 36"),
        (op_graph("add", "x y", "z", width=12), "bfloat16", "width 12"),
        (op_graph("rope_kv_write", "q k v positions", "q2", head_dim=264, layer=0), "float16", "head size 264"),
        (op_graph("kv_write", "k v", "", head_dim=6, layer=0), "float16", "head size 6"),
    ],
)
def test_refusals_say_why(graph: Graph, dtype: str, reason: str) -> None:
    kernel, reasons = chosen(graph, dtype)
    assert kernel == FALLBACK
    assert reasons
    assert any(reason in text for text in reasons)


def test_scales_of_another_dtype_are_refused() -> None:
    kernel, reasons = chosen(linear(), scales="F32")
    assert kernel == FALLBACK
    assert any("F32" in reason for reason in reasons)


PLAIN = [
    (op_graph("embed", "ids", "x", scale=1.0), "embed", "embed_bf16"),
    (op_graph("gather_rows", "x", "y"), "embed", "embed_bf16"),
    (op_graph("pos_embed", "x positions", "y", offset=0), "pos_embed", "pos_embed_bf16"),
    (norm(kind="layer_norm"), "layer_norm", "layer_norm_bf16"),
    (norm(kind="add_layer_norm"), "layer_norm", "add_layer_norm_bf16"),
    (op_graph("head_rms_norm", "x", "y", head_dim=64), "head_rms_norm", "head_rms_norm_bf16"),
    (op_graph("act", "x", "y", fn="gelu_tanh"), "elementwise", "act_gelu_tanh_bf16"),
    (op_graph("mul", "x y", "z"), "elementwise", "mul_bf16"),
    (op_graph("rope", "q k positions", "q2 k2", head_dim=64), "rope_kv", "rope_kv_bf16_bf16"),
    (op_graph("kv_write", "k v", "", layer=0), "rope_kv", "rope_kv_bf16_bf16"),
    (op_graph("rope_kv_write", "q k v positions", "q2", head_dim=64, layer=0), "rope_kv", "rope_kv_bf16_bf16"),
    (linear(None, epilogue="relu_mul"), "dense_gated", "relu_mul_bf16"),
]


@pytest.mark.parametrize(("graph", "kernel", "entry"), PLAIN, ids=lambda value: value if isinstance(value, str) else "")
def test_every_other_kind_has_a_kernel(graph: Graph, kernel: str, entry: str) -> None:
    choice = choose(OpFacts(graph.ops[0], graph, "bfloat16", {}), "cuda")
    assert (choice.kernel, choice.entries) == (kernel, (entry,))


def test_the_cache_has_a_dtype_of_its_own() -> None:
    graph = op_graph("rope_kv_write", "q k v positions", "q2", head_dim=64, layer=0)
    choice = choose(OpFacts(graph.ops[0], graph, "float16", {}, "fp8_e4m3"), "cuda")
    assert choice.entries == ("rope_kv_f16_e4m3",)
    kernel, reasons = chosen(graph, "float16", kv_dtype="bfloat16")
    assert kernel == FALLBACK
    assert "the KV cache is bfloat16" in reasons[0]
    assert chosen(op_graph("rope", "q k positions", "a b", head_dim=64), "float16", kv_dtype="bfloat16")[1] == []


def test_sampling_comes_after_the_graph_of_a_cuda_engine() -> None:
    choices = choose_all(norm(), "float16", {}, "cuda")
    assert [choice.op for choice in choices] == ["norm", "sample", "adjust_logits", "logprobs"]
    assert choices[1].entries == ("sample_f16", "sample_f32")
    huge = graph_of(Op("sample", "sample", (LOGITS,), ("tokens",)), vocab=2**24)
    assert "vocabulary" in chosen(huge)[1][0]


def test_the_reference_target_has_no_kernels() -> None:
    assert chosen(linear(), device="reference") == (FALLBACK, [])


def test_chosen_entry_points_exist_in_the_compiled_module() -> None:
    choices = tuple(
        choice
        for graph in (linear(), norm(), norm(kind="rms_norm"), *(graph for graph, _, _ in PLAIN))
        for dtype in ("float16", "bfloat16")
        for choice in choose_all(graph, dtype, {"w.scales": "F16"}, "cuda")
    )
    try:
        modules = compile_modules(sources_of(choices), ["sm_80"])
    except CompileError as error:
        pytest.skip(str(error))
    assert all(choice.entries for choice in choices)
    compiled = {kernel.name for module in modules for kernel in module.resources}
    assert {entry for choice in choices for entry in choice.entries} <= compiled
