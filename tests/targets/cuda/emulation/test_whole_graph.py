"""Whole tiny models on the CUDA kernels, op by op, give the reference runtime's greedy tokens: a Llama, dense and
quantized, and the families whose ops it lacks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cuda_model import emulated_runtime
from emulator import missing
from machine import launch
from tiny_models import FAMILIES, GPT2, LLAMA, MIXTURES, PHI, QWEN3, tiny_model

from llmctl.engine.step import SequenceSlice, StepPlan
from llmctl.graph.graph import QuantScheme
from llmctl.graph.lora import insert_lora
from llmctl.graph.passes import apply_passes
from llmctl.targets.cuda import buffers as cuda_buffers
from llmctl.targets.cuda import ops as cuda_ops
from llmctl.targets.cuda.registry import FALLBACK
from llmctl.targets.cuda.target import CUDA_PASSES
from llmctl.targets.reference.kernels import AdapterWeights
from llmctl.targets.reference.runtime import ReferenceRuntime

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
SIZES = {"num_blocks": 12, "block_size": 16}
PROMPTS = [[5, 17, 3, 88, 41, 9, 9, 60, 2, 33, 71, 12, 50, 4, 28, 19, 7, 90], [66, 1, 30], [8]]


def _generate(
    runtime: ReferenceRuntime, steps: int, path: list[list[int]] | None = None
) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Greedy continuations: prompts in one step, then one token each; the second prompt comes a step later.

    With a ``path`` its tokens go on, whatever the scores are.
    """
    blocks = [list(range(i * 4, i * 4 + 4)) for i in range(len(PROMPTS))]
    texts, done, scores = [list(p) for p in PROMPTS], [0] * len(PROMPTS), []
    for step in range(steps):
        active = [i for i in range(len(PROMPTS)) if i != 1 or step]
        plan = StepPlan(tuple(SequenceSlice(str(i), texts[i][done[i] :], done[i], blocks[i], True) for i in active))
        logits = runtime.logits(plan)
        tokens = logits.argmax(-1).tolist()
        for i, token, row in zip(active, tokens, logits, strict=True):
            done[i] = len(texts[i])
            texts[i].append(path[i][len(texts[i]) - len(PROMPTS[i])] if path else token)
            scores.append(row)
    return [text[len(p) :] for text, p in zip(texts, PROMPTS, strict=True)], scores


@pytest.mark.parametrize(
    "quant",
    [None, QuantScheme(4, 64, symmetric=False), QuantScheme(8, -1, symmetric=True)],
    ids=["dense", "w4", "w8"],
)
def test_greedy_tokens_are_those_of_the_reference(quant):
    _check(*tiny_model(LLAMA, quant))


@pytest.mark.parametrize(
    ("config", "passes"),
    [(GPT2, None), (QWEN3, None), (PHI, None), (LLAMA, ())],
    ids=["gpt2", "qwen3", "phi", "unfused"],
)
def test_other_families_and_plain_ops(config, passes):
    _check(*tiny_model(config, None, passes))


_SMALL = {**FAMILIES["llama"], "head_dim": 64}
MORE: dict[str, dict[str, Any]] = {
    "gemma3": {
        **{**_SMALL, "model_type": "gemma3_text", "num_hidden_layers": 3, "query_pre_attn_scalar": 40},
        **{"hidden_act": None, "hidden_activation": "gelu_pytorch_tanh"},
        **{"sliding_window": 7, "sliding_window_pattern": 2},
        **{"attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0},
    },
    "granite": {
        **{**_SMALL, "model_type": "granite", "embedding_multiplier": 2.0, "attention_multiplier": 0.2},
        **{"residual_multiplier": 0.5, "logits_scaling": 1.5},
    },
    "olmo2": {**_SMALL, "model_type": "olmo2"},
    "cohere2": {
        **{**_SMALL, "model_type": "cohere2", "layer_norm_eps": 1e-5, "sliding_window": 7},
        **{"sliding_window_pattern": 2, "logit_scale": 0.5},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("family", MORE)
def test_more_families(family: str) -> None:
    """Soft caps, norms of whole rows of a merged linear, layers without RoPE, interleaved pairs, scaled logits."""
    _check(*tiny_model(MORE[family], None))


_NF4 = QuantScheme(4, 32, symmetric=True, book="nf4")
_EXPERTS_IN_NF4 = {"": None, **{f"layers.{i}.experts.{r}_proj": _NF4 for i in (0, 1) for r in ("gate", "up", "down")}}


@pytest.mark.parametrize(
    ("family", "quant", "product"),
    [
        ("qwen3_moe", QuantScheme(4, 32, symmetric=False), "w4a16_f16_g32"),
        pytest.param("qwen3_moe", None, "dense_f16", marks=pytest.mark.slow),
        pytest.param("glm4_moe", None, "dense_f16", marks=pytest.mark.slow),
        pytest.param("glm4_moe", QuantScheme(8, -1, symmetric=True), "w8a16_f16_g64", marks=pytest.mark.slow),
        pytest.param("qwen2_moe", QuantScheme(4, -1, symmetric=True), "w4a16_f16_g128", marks=pytest.mark.slow),
        pytest.param("qwen3_moe", QuantScheme(6, 16, symmetric=True), "k8a16_f16_g16", marks=pytest.mark.slow),
        pytest.param("qwen2_moe", _EXPERTS_IN_NF4, "book4a16_f16_g32", marks=pytest.mark.slow),
    ],
)
def test_mixtures_of_experts(family: str, quant: Any, product: str) -> None:
    launched = _check(*tiny_model(MIXTURES[family], quant))
    assert {"route_f16", "weighted_sum_f16", "group_slots_m8", f"grouped_{product}_m8"} <= launched


_K_TYPES = {"": QuantScheme(6, 16, symmetric=True), "layers.1.mlp.down_proj": QuantScheme(5, 32, False, minimum=True)}


@pytest.mark.parametrize(
    ("quant", "kinds"), [(QuantScheme(4, 32, symmetric=False, minimum=True), {"k4"}), (_K_TYPES, {"k8"})]
)
def test_k_types_and_many_rows(quant, kinds, monkeypatch):
    for module in (cuda_ops, cuda_buffers):
        monkeypatch.setattr(module, "GEMM_ROWS", 4)  # prompts go through dequantised weights then
    launched = _check(*tiny_model(LLAMA, quant))
    assert {f"dequantize_{kind}_f16" for kind in kinds} <= launched
    assert {name.partition("a16")[0] for name in launched if "a16_stream" in name} == kinds


def test_act_order_and_many_rows(monkeypatch):
    for module in (cuda_ops, cuda_buffers):
        monkeypatch.setattr(module, "GEMM_ROWS", 4)  # prompts go through dequantised weights then
    launched = _check(*tiny_model(LLAMA, QuantScheme(4, 64, symmetric=False, act_order=True), ("fuse_add_norm",)))
    assert {"permute_columns_f16", "dequantize_w4_f16", "w4a16_stream_f16_g64_m8"} <= launched


def test_int8_activations():
    """w8a8 throughout: rows quantized by the norms, or by themselves, as the reference quantizes them."""
    passes = (*CUDA_PASSES, "int8_activations")
    graph, weights = tiny_model(LLAMA, QuantScheme(8, -1, symmetric=True), passes)
    # Of two computations that round apart a code may differ: 1/127 of a row's largest value, a hundred times as much as
    # float16 rounds, and as much between the reference's own float16 and float32.
    launched = _check(graph, weights)
    assert {"rms_norm_s8_f16", "add_rms_norm_s8_f16", "quantize_s8_f16", "w8a8_gemm_f16_t32"} <= launched
    assert not [entry for entry in launched if "w8a16" in entry]


@pytest.mark.parametrize(
    ("quant", "passes"),
    [(None, CUDA_PASSES), (QuantScheme(8, -1, symmetric=True), (*CUDA_PASSES, "int8_activations"))],
    ids=["dense", "w8a8"],
)
def test_parallel_residuals(quant, passes):
    graph, weights = tiny_model(PHI, quant, passes)
    assert any("residual" in op.attrs for op in graph.ops)
    _check(graph, weights)


@pytest.mark.parametrize(
    ("quant", "more", "gating"),
    [
        (QuantScheme(4, 64, symmetric=False), (), "silu_mul_f16"),
        (QuantScheme(8, -1, symmetric=True), ("int8_activations",), "silu_mul_s8_f16"),
    ],
    ids=["w4a16", "w8a8"],
)
def test_adapters_in_one_batch(quant, more, gating):
    """Sequences with two adapters and with none; the reference adds them in torch."""
    # Not down_proj: the gating before it then makes int8 rows, which adapters could not read.
    targets = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj")
    graph, weights = tiny_model(LLAMA, quant, CUDA_PASSES, lambda g: apply_passes(insert_lora(g, targets, 8), more))
    rng = torch.Generator().manual_seed(3)
    adapters = {}
    for op in (op for op in graph.ops if op.kind == "lora"):
        k, n = graph.buffers[op.inputs[0]].width, op.attrs["rows"]
        a, b = torch.randn(2, 8, k, generator=rng) * k**-0.5, torch.randn(2, n, 8, generator=rng) * 0.3
        adapters[op.name] = AdapterWeights(a.half(), b.half(), torch.tensor([1.0, 0.5]))
    launched = _check(graph, weights, adapters, near=bool(more))
    assert {"lora_shrink_f16_r16", "lora_expand_f16_r16", gating} <= launched


def _adapt(runtime, adapters):
    """Sequence i of a step's prompts uses adapter i - 1."""
    plain = runtime.interpreter.context

    def context(batch, *places):
        ctx = plain(batch, *places)
        # A block table starts with block 4 i of prompt i.
        chosen = torch.from_numpy(batch.block_tables[:, 0] // 4 - 1)
        ctx.adapters = chosen.repeat_interleave(torch.from_numpy(np.diff(batch.query_start_loc))).int()
        return ctx

    runtime.interpreter.adapters.update(adapters)
    runtime.interpreter.context = context
    return runtime


def _check(graph, weights, adapters=None, near=False):
    """The reference's tokens exactly; with ``near`` they may be others that the reference's own rounding cannot tell
    from its best."""
    emulated = emulated_runtime(
        graph, weights, "float16", **SIZES, lora=adapters, adapter_of=lambda piece: piece.block_ids[0] // 4 - 1
    )
    half, single = (ReferenceRuntime(graph, weights, dtype=dtype, **SIZES) for dtype in ("float16", "float32"))
    for runtime in (half, single) if adapters else ():
        _adapt(runtime, adapters)
    emulated.machine.launched.clear()
    found, found_logits = _generate(emulated, 3)
    path = found if near else None
    expected, logits = _generate(half, 3, path)
    exact = _generate(single, 3, path)[1]
    assert found == expected
    noise = max((a - b).abs().max() for a, b in zip(logits, exact, strict=True))
    error = max((a - b).abs().max() for a, b in zip(found_logits, exact, strict=True))
    for row, best in zip(exact, found_logits, strict=True):
        assert row[best.argmax()] >= row.max() - 2 * noise
    assert error <= 2 * noise + 1e-3
    # Every op but dense products, which are cuBLAS's.
    by_torch = {op for op, choice in emulated.choices.items() if choice.kernel == FALLBACK}
    assert by_torch <= {
        op.name for op in graph.ops if op.kind == "linear" and graph.weights[op.weights[0]].quant is None
    }
    return set(emulated.machine.launched)


def test_the_kernels_sample_the_same_greedy_tokens():
    graph, weights = tiny_model(LLAMA, None)
    runtime = ReferenceRuntime(graph, weights, dtype="float16", **SIZES)
    logits = runtime.logits(StepPlan((SequenceSlice("a", PROMPTS[0], 0, [3, 5], True),)))
    tokens = torch.empty(1, dtype=torch.int32)
    launch("sample_f32", logits=logits, temperature=torch.zeros(1), seeds=torch.zeros(1, dtype=torch.int64),
           positions=torch.zeros(1, dtype=torch.int64), tokens=tokens)  # fmt: skip
    assert tokens.tolist() == logits.argmax(-1).tolist()
