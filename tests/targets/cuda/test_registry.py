"""Which kernel an op gets, and the reason each candidate gives when it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llmctl.errors import CompileError
from llmctl.graph.graph import LOGITS, Buffer, Graph, KVLayer, Op, QuantScheme, Weight, WeightPart
from llmctl.graph.mixture_config import MOST_EXPERTS
from llmctl.targets.base import FALLBACK
from llmctl.targets.cuda.compile import compile_modules
from llmctl.targets.cuda.experts import MAX_EXPERTS
from llmctl.targets.cuda.registry import OpFacts, choose, choose_all, sources_of

W4 = QuantScheme(4, 64, symmetric=False)
Q4_K = QuantScheme(4, 32, symmetric=False, minimum=True)
NF4 = QuantScheme(4, 64, symmetric=True, book="nf4")


def facts(op: Op, graph: Graph, dtype: str, kv_dtype: str = "auto", block_size: int = 16) -> OpFacts:
    return OpFacts(op, graph, dtype, dtype if kv_dtype == "auto" else kv_dtype, block_size)


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


def norm(width: int = 128, kind: str = "add_rms_norm", plus_one: bool = False) -> Graph:
    weight = Weight("w", (width,), (WeightPart("w"),))
    attrs = {"eps": 1e-5, "plus_one": plus_one}
    return graph_of(Op(kind, "norm", ("x", "r"), ("y", "s"), ("w",), attrs), weight, width)


def chosen(graph: Graph, dtype: str = "bfloat16", kv_dtype: str = "auto") -> tuple[str, list[str]]:
    choice = choose(facts(graph.ops[0], graph, dtype, kv_dtype))
    return choice.kernel, [refusal.reason for refusal in choice.refused]


@pytest.mark.parametrize(
    ("graph", "kernel"),
    [
        (linear(), "w4a16"),
        (linear(QuantScheme(4, -1, symmetric=True)), "w4a16"),
        (linear(replace(W4, bits=3)), "w4a16"),
        (linear(replace(W4, bits=8)), "w8a16"),
        (linear(replace(W4, act_order=True)), "w4a16"),
        (linear(epilogue="silu_mul"), "w4a16"),
        (linear(NF4), "book4a16"),
        (linear(QuantScheme(8, 128, symmetric=True, book="fp8_e4m3", block_rows=128)), "fp8a16"),
        (linear(QuantScheme(8, -1, symmetric=True, book="fp8_e4m3")), "fp8a16"),
        (linear(replace(NF4, book="fp4"), epilogue="silu_mul"), "book4a16"),
        (linear(Q4_K), "k4a16"),
        (linear(replace(Q4_K, bits=2, group_size=16)), "k4a16"),
        (linear(QuantScheme(3, 16, symmetric=True)), "k4a16"),
        (linear(replace(Q4_K, bits=5)), "k8a16"),
        (linear(QuantScheme(6, 16, symmetric=True)), "k8a16"),
    ],
)
def test_quantized_linears_have_kernels_for_every_number_of_rows(graph: Graph, kernel: str) -> None:
    choice = choose(facts(graph.ops[0], graph, "float16"))
    assert choice.kernel == kernel
    assert choice.sources == (f"{kernel}_stream.cu", f"{kernel}_gemm.cu", "dequantize.cu")
    assert [entry.split("_")[1] for entry in choice.entries[:4]] == ["stream", "stream", "gemm", "gemm"]
    scheme = graph.weights["w"].quant
    assert scheme is not None
    assert ("permute_columns_f16" in choice.entries) == scheme.act_order


W8 = QuantScheme(8, -1, symmetric=True)


def int8_linear(quant: QuantScheme = W8, columns: int = 128) -> Graph:
    weight = Weight("w", (256, columns), (WeightPart("w"),), quant)
    op = Op("linear", "lin", ("x.q", "x.scale"), ("y",), ("w", ""), {"activations": "int8"})
    return graph_of(op, weight)


def lora(rank: int = 16, **changes: int) -> Graph:
    attrs = {"module": "q_proj", "first_row": 0, "rows": 64, "column": 0, "rank": rank, **changes}
    return graph_of(Op("lora", "lora", ("x", "y"), ("z",), (), attrs))


def test_int8_activations_have_their_own_kernel() -> None:
    graph = int8_linear()
    choice = choose(facts(graph.ops[0], graph, "float16"))
    assert (choice.kernel, choice.sources, choice.max_rows) == ("w8a8", ("w8a8_gemm.cu",), 0)
    assert choice.entries == tuple(f"w8a8_gemm_f16_t{tokens}" for tokens in (8, 16, 32, 64))
    assert {r.kernel: r.reason for r in choice.refused}["w8a16"] == "activations are int8; the kernel takes 16-bit ones"
    assert chosen(linear(W8))[0] == "w8a16"
    refused = choose(facts(linear(None).ops[0], linear(None), "float16")).refused
    assert "int8_activations was not asked for" in {r.kernel: r.reason for r in refused}["w8a8"]


def grouped(quant: QuantScheme | None = W4, columns: int = 128, experts: int = 4) -> Graph:
    weight = Weight("w", (experts * 64, columns), (WeightPart("w"),), quant)
    graph = graph_of(Op("grouped_linear", "experts", ("x", "chosen"), ("y",), ("w",), {"count": experts}), weight)
    return replace(graph, buffers={**graph.buffers, "chosen": Buffer("chosen", 2)})


def route(experts: int) -> Graph:
    attrs = {"top_k": 2, "scores": "softmax", "renormalise": True, "scale": 1.0, "groups": 1, "top_groups": 1}
    return graph_of(Op("route", "route", ("x",), ("chosen", "shares"), ("",), attrs), width=experts)


@pytest.mark.parametrize(
    ("graph", "kind"),
    [
        (grouped(), "w4a16"),
        (grouped(W8), "w8a16"),
        (grouped(NF4), "book4a16"),
        (grouped(QuantScheme(8, -1, symmetric=True, book="fp8_e4m3")), "fp8a16"),
        (grouped(Q4_K), "k4a16"),
        (grouped(QuantScheme(6, 16, symmetric=True)), "k8a16"),
        (grouped(None), "dense"),
        (grouped(replace(W4, act_order=True)), "dense"),
        (grouped(replace(W4, act_order=True), experts=1), "dense"),
        (grouped(replace(W4, group_size=16)), "dense"),  # dequantized once, as a linear of such a format is
    ],
)
def test_products_of_experts(graph: Graph, kind: str) -> None:
    choice = choose(facts(graph.ops[0], graph, "float16"))
    assert (choice.kernel, choice.sources) == (f"grouped_{kind}", (f"grouped_{kind}.cu", "experts.cu"))
    products = [entry for entry in choice.entries if entry.startswith(f"grouped_{kind}_f16")]
    assert sorted(entry.rpartition("_")[2] for entry in products) == ["m16", "m8"]
    assert {*choice.entries} - {*products} == {"group_slots_m8", "group_slots_m16"}


def test_the_kernels_take_as_many_experts_as_a_config_may_have() -> None:
    assert MAX_EXPERTS >= MOST_EXPERTS


@pytest.mark.parametrize(("rank", "ranks"), [(8, 16), (16, 16), (24, 64), (64, 64)])
def test_adapters(rank: int, ranks: int) -> None:
    graph = lora(rank)
    choice = choose(facts(graph.ops[0], graph, "bfloat16"))
    assert (choice.kernel, choice.sources) == ("lora", ("lora.cu",))
    assert choice.entries == (f"lora_shrink_bf16_r{ranks}", f"lora_expand_bf16_r{ranks}")


@pytest.mark.parametrize("kind", ["rms_norm", "add_rms_norm"])
def test_norms(kind: str) -> None:
    assert chosen(norm(kind=kind)) == ("rms_norm", [])


@pytest.mark.parametrize(
    ("graph", "dtype", "reason"),
    [
        (linear(None), "float16", "the weight is dense"),
        (linear(replace(W4, group_size=48)), "float16", "groups of 48"),
        (linear(replace(W4, bits=8, group_size=16)), "float16", "groups of 16 with zeros"),
        (linear(replace(Q4_K, group_size=64)), "float16", "minimums in groups of 64"),
        (int8_linear(QuantScheme(8, 16, symmetric=True)), "float16", "the weight has 8-bit integers in groups of 16"),
        (linear(W4, columns=100), "float16", "100 columns"),
        (linear(replace(NF4, group_size=16)), "float16", "groups of 16"),
        (linear(NF4), "float32", "activations are float32"),
        (linear(NF4), "float32", "the weight has 4-bit codes of a code book; the kernel reads 8-bit integers"),
        (linear(replace(NF4, bits=8, group_size=16, book="fp8_e4m3")), "float16", "groups of 16"),
        (linear(), "float32", "activations are float32"),
        (int8_linear(columns=136), "float16", "136 columns are not a multiple of 16"),
        (int8_linear(replace(W8, group_size=48)), "float16", "groups of 48"),
        (int8_linear(), "float32", "activations are float32"),
        (grouped(None, columns=100), "float16", "100 columns are not a multiple of 8"),
        (grouped(), "float32", "activations are float32"),
        (route(8), "float32", "activations are float32"),
        (lora(65), "float16", "rank 65; the kernels take multiples of 8 up to 64"),
        (lora(20), "float16", "rank 20; the kernels take multiples of 8 up to 64"),
        (lora(rows=60), "float16", "width 60"),
        (lora(column=4), "float16", "width 4"),
        (lora(), "float32", "activations are float32"),
        (norm(100), "float16", "width 100"),
        (norm(), "float32", "activations are float32"),
        (linear(None, epilogue="silu_mul"), "float32", "activations are float32"),
        (linear(replace(W4, group_size=48), epilogue="silu_mul"), "float16", "product before this kernel is torch's"),
        (op_graph("head_rms_norm", "x", "y", head_dim=36), "float16", "head size 36"),
        (op_graph("add", "x y", "z", width=12), "bfloat16", "width 12"),
        (op_graph("rope_kv_write", "q k v positions", "q2", head_dim=264, layer=0), "float16", "head size 264"),
        (op_graph("kv_write", "k v", "", head_dim=6, layer=0), "float16", "head size 6"),
        (norm(kind="layer_norm", plus_one=True), "bfloat16", "the kernel does not add one to the weight"),
    ],
)
def test_refusals_say_why(graph: Graph, dtype: str, reason: str) -> None:
    kernel, reasons = chosen(graph, dtype)
    assert kernel == FALLBACK
    assert reasons
    assert any(reason in text for text in reasons)


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
    (op_graph("act_mul", "x", "y", fn="gelu"), "elementwise", "gelu_mul_bf16"),
    (op_graph("quantize", "x", "q scale"), "quantize_rows", "quantize_s8_bf16"),
    (op_graph("act_mul_s8", "x", "q scale", fn="silu"), "quantize_rows", "silu_mul_s8_bf16"),
    (norm(kind="rms_norm_s8"), "rms_norm", "rms_norm_s8_bf16"),
    (norm(kind="add_layer_norm_s8"), "layer_norm", "add_layer_norm_s8_bf16"),
]


@pytest.mark.parametrize(("graph", "kernel", "entry"), PLAIN, ids=lambda value: value if isinstance(value, str) else "")
def test_every_other_kind_has_a_kernel(graph: Graph, kernel: str, entry: str) -> None:
    choice = choose(facts(graph.ops[0], graph, "bfloat16"))
    assert (choice.kernel, choice.entries) == (kernel, (entry,))


def test_the_cache_has_a_dtype_of_its_own() -> None:
    graph = op_graph("rope_kv_write", "q k v positions", "q2", head_dim=64, layer=0)
    choice = choose(facts(graph.ops[0], graph, "float16", "fp8_e4m3"))
    assert choice.entries == ("rope_kv_f16_e4m3",)
    kernel, reasons = chosen(graph, "float16", kv_dtype="bfloat16")
    assert kernel == FALLBACK
    assert "the KV cache is bfloat16" in reasons[0]
    assert chosen(op_graph("rope", "q k positions", "a b", head_dim=64), "float16", kv_dtype="bfloat16")[1] == []


def attention(head_dim: int = 64, kv_heads: int = 2) -> Graph:
    attrs = {"layer": 0, "heads": 4, "kv_heads": kv_heads, "scale": 0.1, "window": 0, "softcap": 0.0}
    return op_graph("attention", "q", "o", head_dim=head_dim, **attrs)


@pytest.mark.parametrize(("kv_dtype", "tag"), [("auto", "bf16"), ("int8", "s8"), ("fp8_e4m3", "e4m3")])
def test_attention_needs_three_kernels(kv_dtype: str, tag: str) -> None:
    graph = attention(96)
    choice = choose(facts(graph.ops[0], graph, "bfloat16", kv_dtype, 32))
    assert choice.kernel == "paged_attention"
    assert choice.entries == (
        f"attention_decode_bf16_{tag}_d96",
        f"attention_prefill_bf16_{tag}_d96",
        "attention_combine_bf16",
    )
    assert choice.sources == ("attention_decode_d96.cu", "attention_prefill_d96.cu", "attention_combine.cu")


@pytest.mark.parametrize(
    ("graph", "dtype", "kv_dtype", "block_size", "reason"),
    [
        (attention(), "float32", "auto", 16, "activations are float32"),
        (attention(), "float16", "bfloat16", 16, "the KV cache is bfloat16"),
        (attention(), "float16", "float32", 16, "the KV cache is float32"),
        (attention(72), "float16", "auto", 16, "head size 72"),
        (attention(), "float16", "auto", 24, "block size 24"),
        (attention(kv_heads=3), "float16", "auto", 16, "4 heads are not a multiple of 3"),
    ],
)
def test_attention_refusals(graph: Graph, dtype: str, kv_dtype: str, block_size: int, reason: str) -> None:
    choice = choose(facts(graph.ops[0], graph, dtype, kv_dtype, block_size))
    assert choice.kernel == FALLBACK
    assert reason in choice.refused[0].reason


def test_sampling_comes_after_the_graph_of_a_cuda_engine() -> None:
    choices = choose_all(norm(), "float16", "float16", 16)
    assert [choice.op for choice in choices] == ["norm", "sample", "adjust_logits", "logprobs"]
    assert choices[1].entries == ("sample_f16", "sample_f32", "feed_tokens")
    huge = graph_of(Op("sample", "sample", (LOGITS,), ("tokens",)), vocab=2**24)
    assert "vocabulary" in chosen(huge)[1][0]


@pytest.mark.slow  # compiles what it names: make test-kernels
def test_chosen_entry_points_exist_in_the_compiled_module() -> None:
    choices = tuple(
        choice
        for graph in (
            linear(),
            linear(NF4),
            int8_linear(),
            lora(),
            lora(64),
            norm(),
            norm(kind="rms_norm"),
            *(graph for graph, _, _ in PLAIN),
        )
        for dtype in ("float16", "bfloat16")
        for choice in choose_all(graph, dtype, dtype, 16)
    )
    try:
        modules = compile_modules(sources_of(choices), ["sm_80"])
    except CompileError as error:
        pytest.skip(str(error))
    assert all(choice.entries for choice in choices)
    compiled = {kernel.name for module in modules for kernel in module.resources}
    assert {entry for choice in choices for entry in choice.entries} <= compiled
