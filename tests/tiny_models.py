"""Tiny random models of every family in the sizes that the CUDA kernels take, dense and quantized."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.graph.families import build_graph
from llmctl.graph.graph import Graph, QuantScheme, Weight
from llmctl.graph.passes import apply_passes

Weights = dict[str, Tensor | QuantizedWeight]

VOCAB = 96
LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
GPT2: dict[str, Any] = {
    "model_type": "gpt2", "vocab_size": VOCAB, "n_embd": 128, "n_layer": 2, "n_head": 2, "n_positions": 128,
    "activation_function": "gelu_new", "tie_word_embeddings": True,
}  # fmt: skip
QWEN3 = {**LLAMA, "model_type": "qwen3"}
PHI = {
    **LLAMA, "model_type": "phi", "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64,
    "partial_rotary_factor": 0.5, "hidden_act": "gelu_new", "layer_norm_eps": 1e-5, "qk_layernorm": False,
}  # fmt: skip

_SMALL = {**LLAMA, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _SMALL,
    "mistral": {**_SMALL, "model_type": "mistral", "sliding_window": 19},
    "qwen2": {
        **_SMALL, "model_type": "qwen2", "tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 21,
        "max_window_layers": 1,
    },
    "qwen3": {**_SMALL, "model_type": "qwen3"},
    "phi": {**PHI, "intermediate_size": 128},
    "phi3": {**_SMALL, "model_type": "phi3", "partial_rotary_factor": 0.75, "sliding_window": 23},
    "gpt2": {**GPT2, "n_inner": 128},
}  # fmt: skip
"""One of every family: biases, tied heads, windows on some layers or all, and as little work as the kernels allow."""
MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        **{**_SMALL, "model_type": "qwen3_moe", "num_experts": 6, "num_experts_per_tok": 2},
        **{"moe_intermediate_size": 48, "norm_topk_prob": True, "mlp_only_layers": [1]},
    },
    "glm4_moe": {
        **{**_SMALL, "model_type": "glm4_moe", "n_routed_experts": 6, "num_experts_per_tok": 3, "n_group": 3},
        **{"topk_group": 2, "moe_intermediate_size": 48, "routed_scaling_factor": 1.5, "use_qk_norm": True},
    },
    "qwen2_moe": {
        **{**_SMALL, "model_type": "qwen2_moe", "num_experts": 5, "num_experts_per_tok": 2},
        **{"moe_intermediate_size": 40, "shared_expert_intermediate_size": 64},
    },
}
"""Of experts: dense layers among them, a shared one, one behind a switch; softmax, and sigmoid in groups."""

QUANTS: dict[str, QuantScheme | None] = {
    "dense": None,
    "w4": QuantScheme(4, 64, symmetric=False),
    "w4_act_order": QuantScheme(4, 64, symmetric=False, act_order=True),
    "w8": QuantScheme(8, -1, symmetric=False),
    "w8a8": QuantScheme(8, -1, symmetric=True),
    "nf4": QuantScheme(4, 64, symmetric=True, book="nf4"),
}


Quant = QuantScheme | None | Mapping[str, QuantScheme | None]
"""Of the layers' linears: one scheme, or each one's by its name, ``""`` for the others."""
MIXED: Mapping[str, QuantScheme | None] = {
    "": QuantScheme(4, 64, symmetric=True),
    "layers.0.v_proj": QuantScheme(8, 64, symmetric=True),
    "layers.0.o_proj": None,
    "layers.0.down_proj": QuantScheme(8, 32, symmetric=True),
    "layers.1.q_proj": QuantScheme(3, 64, symmetric=True),
    "layers.1.k_proj": QuantScheme(3, 64, symmetric=True),
    "layers.1.v_proj": QuantScheme(3, 64, symmetric=True),
    "layers.1.up_proj": None,
}


def tiny_graph(config: dict[str, Any], quant: Quant, passes: tuple[str, ...] | None = None) -> Graph:
    """A graph after its passes; what chooses among experts is dense, as the head is."""
    graph = build_graph(config)
    kept = ("lm_head", "router", "switch")
    names = {op.weights[0]: op.name for op in graph.products() if not op.name.endswith(kept)}
    weights = {n: replace(w, quant=_own(quant, names[n]) if n in names else None) for n, w in graph.weights.items()}
    return apply_passes(replace(graph, weights=weights), passes)


def _own(quant: Quant, name: str) -> QuantScheme | None:
    return quant.get(name, quant[""]) if isinstance(quant, Mapping) else quant


def tiny_model(
    config: dict[str, Any],
    quant: Quant,
    passes: tuple[str, ...] | None = None,
    change: Callable[[Graph], Graph] = lambda graph: graph,
) -> tuple[Graph, Weights]:
    """``change`` of that, with random weights."""
    graph = change(tiny_graph(config, quant, passes))
    rng = np.random.default_rng(5)
    return graph, {name: _random(weight, rng) for name, weight in graph.weights.items()}


def _random(weight: Weight, rng: np.random.Generator) -> Tensor | QuantizedWeight:
    """Values that keep activations near one."""
    if weight.quant is not None:
        return _quantized(weight, weight.quant, rng)
    if len(weight.shape) == 1:
        return torch.from_numpy(rng.uniform(0.5, 1.5, weight.shape)).half()
    spread = 1.0 if "embed" in weight.name else weight.shape[1] ** -0.5
    return torch.from_numpy(rng.standard_normal(weight.shape) * spread).half()


def _quantized(weight: Weight, quant: QuantScheme, rng: np.random.Generator) -> QuantizedWeight:
    groups = (quant.row_blocks(weight.shape[0]), quant.groups(weight.shape[1]))
    codes = torch.from_numpy(rng.integers(0, 2**quant.bits, weight.shape, np.uint8))
    zeros = torch.full(groups, 0 if quant.book or quant.minimum else 2 ** (quant.bits - 1), dtype=torch.uint8)
    if quant.has_zeros:
        zeros = torch.from_numpy(rng.integers(2, 2**quant.bits - 2, groups, np.uint8))
    spread = 8 if quant.book else 2**quant.bits * 4
    if quant.book == "fp8_e4m3":
        codes &= 0xBF  # of magnitudes up to 1.875
    scales = torch.from_numpy(rng.uniform(0.5, 1.5, groups)).half() / spread
    minimums = -scales * 2 ** (quant.bits - 1) if quant.minimum else None
    order = None
    if quant.act_order:
        order = torch.from_numpy(rng.permutation(np.arange(weight.shape[1]) // quant.group_size)).int()
    return QuantizedWeight(codes, scales, zeros, quant, order, minimums)
