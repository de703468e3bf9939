"""A tiny random transformers model of every family and variant in ``graph/family_table.py``, odd sizes on purpose."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from llmctl.checkpoint.assemble import checkpoint_graph
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.checkpoint.reader import Checkpoint
from llmctl.graph.graph import Graph

VOCAB = 131
_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 60,
    "intermediate_size": 84,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "max_position_embeddings": 128,
}
_QWEN = {**_SMALL, "num_attention_heads": 6, "num_key_value_heads": 2}


def _rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 1000.0, **parameters}}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**_SMALL, "num_key_value_heads": 1}),
    "llama_biases_tied": (
        "Llama",
        {**_SMALL, "num_key_value_heads": 5, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama_gelu_wide_heads": (
        "Llama",
        {**_SMALL, "num_key_value_heads": 1, "head_dim": 14, "hidden_act": "gelu_pytorch_tanh"},
    ),
    "llama_linear": ("Llama", {**_SMALL, **_rope(rope_type="linear", factor=4.0)}),
    "llama_llama3": (
        "Llama",
        {
            **_SMALL,
            **_rope(
                rope_type="llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=32,
            ),
        },
    ),
    "llama_yarn": ("Llama", {**_SMALL, **_rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)}),
    "llama_yarn_mscale": (
        "Llama",
        {
            **_SMALL,
            **_rope(
                rope_type="yarn",
                factor=4.0,
                original_max_position_embeddings=32,
                mscale=0.7,
                mscale_all_dim=1.3,
                beta_fast=8.0,
                beta_slow=2.0,
                truncate=False,
            ),
        },
    ),
    "mistral": ("Mistral", {**_SMALL, "num_attention_heads": 10, "num_key_value_heads": 2, "sliding_window": 7}),
    "mistral_full": ("Mistral", {**_SMALL, "num_key_value_heads": 1, "sliding_window": None}),
    "qwen2": ("Qwen2", dict(_QWEN)),
    "qwen2_window": (
        "Qwen2",
        {**_QWEN, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {**_QWEN, "num_attention_heads": 4, "head_dim": 12, "tie_word_embeddings": True}),
    "qwen3_bias": ("Qwen3", {**_QWEN, "head_dim": 18, "attention_bias": True}),
    "phi": ("Phi", dict(_SMALL)),
    "phi_partial": ("Phi", {**_SMALL, "num_key_value_heads": 1, **_rope(partial_rotary_factor=0.4)}),
    "phi3": ("Phi3", {**_SMALL, "num_key_value_heads": 1, "pad_token_id": 0}),
    "phi3_partial_window": (
        "Phi3",
        {
            **{**_QWEN, "num_attention_heads": 5, "num_key_value_heads": 5, "sliding_window": 7, "pad_token_id": 0},
            **{"tie_word_embeddings": True, **_rope(rope_type="default", partial_rotary_factor=0.7)},
        },
    ),
    "gpt2": (
        "GPT2",
        {"vocab_size": VOCAB, "n_embd": 60, "n_layer": 3, "n_head": 5, "n_positions": 128},
    ),
    "gpt2_untied": (
        "GPT2",
        {
            **{"vocab_size": VOCAB, "n_embd": 60, "n_layer": 2, "n_head": 3, "n_positions": 128, "n_inner": 84},
            "tie_word_embeddings": False,
        },
    ),
}
MORE_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ministral3": (
        "Ministral3",
        {
            **{**_SMALL, "num_key_value_heads": 1, "head_dim": 14},
            **_rope(
                rope_type="yarn",
                factor=4.0,
                original_max_position_embeddings=96,
                mscale=1.0,
                mscale_all_dim=1.0,
                llama_4_scaling_beta=0.1,
                max_position_embeddings=128,
            ),
        },
    ),
    "internlm3": (
        "InternLM3",
        {**_SMALL, "num_key_value_heads": 1, "head_dim": 14, "attention_bias": True, "mlp_bias": True},
    ),
    "phi3_longrope": (
        "Phi3",
        {
            **{**_SMALL, "num_key_value_heads": 1, "pad_token_id": 0, "original_max_position_embeddings": 96},
            **_rope(
                rope_type="longrope",
                partial_rotary_factor=0.7,
                short_factor=[1.0, 1.3, 1.7, 2.5],
                long_factor=[2.0, 3.0, 5.0, 9.0],
            ),
        },
    ),
    "seed_oss": ("SeedOss", {**_SMALL, "num_key_value_heads": 1, "head_dim": 14, "attention_out_bias": True}),
    "starcoder2": ("Starcoder2", {**_SMALL, "num_key_value_heads": 1, "sliding_window": 7}),
    "arcee": ("Arcee", {**_SMALL, "num_key_value_heads": 1, "mlp_bias": True}),
    "gemma": ("Gemma", {**_SMALL, "num_key_value_heads": 1, "head_dim": 14}),
    "gemma2": (
        "Gemma2",
        {
            **{**_SMALL, "num_key_value_heads": 1, "head_dim": 14, "sliding_window": 7, "query_pre_attn_scalar": 11},
            **{"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            **{**_SMALL, "num_key_value_heads": 1, "head_dim": 14, "sliding_window": 7, "query_pre_attn_scalar": 11},
            **{"num_hidden_layers": 4, "sliding_window_pattern": 3},
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "granite": (
        "Granite",
        {
            **{**_SMALL, "num_key_value_heads": 1, "attention_bias": True, "tie_word_embeddings": True},
            **{"embedding_multiplier": 12.0, "attention_multiplier": 0.4, "residual_multiplier": 0.22},
            **{"logits_scaling": 3.0, "rms_norm_eps": 1e-3},
        },
    ),
    "olmo2": ("Olmo2", {**_SMALL, "num_key_value_heads": 1}),
    "olmo3": (
        "Olmo3",
        {
            **{**_SMALL, "num_key_value_heads": 1, "sliding_window": 7, "num_hidden_layers": 4},
            "rope_parameters": {
                "full_attention": {
                    **{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
                    "rope_theta": 1000.0,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
            },
        },
    ),
    "smollm3": ("SmolLM3", {**_SMALL, "num_key_value_heads": 1, "pad_token_id": 0, "no_rope_layer_interval": 2}),
    "cohere": ("Cohere", {**_SMALL, "num_key_value_heads": 1, "logit_scale": 0.3}),
    "cohere2": (
        "Cohere2",
        {
            **{**_SMALL, "num_key_value_heads": 1, "sliding_window": 7, "logit_scale": 0.3},
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "exaone4": (
        "Exaone4",
        {**_SMALL, "num_key_value_heads": 1, "sliding_window": 7, "sliding_window_pattern": 3},
    ),
    "exaone4_full": (
        "Exaone4",
        {**_SMALL, "num_key_value_heads": 1, "sliding_window": None, "layer_types": ["full_attention"] * 3},
    ),
    "glm": ("Glm", {**_SMALL, "num_key_value_heads": 1, "head_dim": 12, "pad_token_id": 0}),
    "glm4": ("Glm4", {**_SMALL, "num_key_value_heads": 1, "head_dim": 12, "pad_token_id": 0}),
    "ernie4_5": ("Ernie4_5", {**_SMALL, "num_key_value_heads": 1, "head_dim": 14, "use_bias": True}),
    "gpt_neox": ("GPTNeoX", {**_SMALL, **_rope(partial_rotary_factor=0.4)}),
    "gpt_neox_serial": ("GPTNeoX", {**_SMALL, "use_parallel_residual": False, **_rope(partial_rotary_factor=1.0)}),
    "nemotron": ("Nemotron", {**_SMALL, "num_key_value_heads": 1, **_rope(partial_rotary_factor=0.4)}),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            **{**_QWEN, "num_hidden_layers": 4, "decoder_sparse_step": 2, "moe_intermediate_size": 22},
            **{"shared_expert_intermediate_size": 36, "num_experts": 5, "num_experts_per_tok": 2},
        },
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            **{**_QWEN, "num_attention_heads": 4, "head_dim": 12, "mlp_only_layers": [1], "moe_intermediate_size": 22},
            **{"num_experts": 7, "num_experts_per_tok": 3, "norm_topk_prob": True},
        },
    ),
    "mixtral": (
        "Mixtral",
        {**_SMALL, "num_key_value_heads": 1, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 7},
    ),
    "olmoe": ("Olmoe", {**_SMALL, "num_key_value_heads": 1, "num_experts": 6, "num_experts_per_tok": 4}),
    "granitemoe": (
        "GraniteMoe",
        {
            **{**_SMALL, "num_key_value_heads": 1, "num_local_experts": 5, "num_experts_per_tok": 3},
            **{"embedding_multiplier": 12.0, "attention_multiplier": 0.4, "residual_multiplier": 0.22},
            **{"logits_scaling": 3.0, "rms_norm_eps": 1e-3, "tie_word_embeddings": True},
        },
    ),
    "glm4_moe": (
        "Glm4Moe",
        {
            **{**_SMALL, "num_key_value_heads": 1, "head_dim": 12, "use_qk_norm": True, "attention_bias": True},
            **{"n_routed_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 22, "n_shared_experts": 2},
            **{"n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.7, "first_k_dense_replace": 1},
        },
    ),
    "glm4_moe_air": (
        "Glm4Moe",
        {
            **{**_SMALL, "num_key_value_heads": 1, "head_dim": 12, "norm_topk_prob": False},
            **{"n_routed_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 22},
        },
    ),
    "llama_dynamic": ("Llama", {**_SMALL, **_rope(rope_type="dynamic", factor=4.0)}),
}
"""Families that differ from those of ``CASES`` by a fact or two; most of their tests are slow."""
_CONFIGS = {"Gemma3": "Gemma3TextConfig"}
_MODELS = {"GPT2": "GPT2LMHeadModel", "InternLM3": "LlamaForCausalLM"}


def slow(cases: Iterable[str]) -> list[Any]:
    """Parameters of a test that runs for some cases with the slow ones alone."""
    return [pytest.param(case, marks=pytest.mark.slow, id=case) for case in cases]


def config_of(case: str) -> Any:
    """transformers' config of a case."""
    name, settings = {**CASES, **MORE_CASES}[case]
    return _config(name, settings)


def _config(name: str, settings: dict[str, Any]) -> Any:
    import transformers

    return getattr(transformers, _CONFIGS.get(name, f"{name}Config"))(**settings)


@dataclass(frozen=True)
class FamilyModel:
    """A transformers model, the same weights as an opened checkpoint, and its plain Graph."""

    model: Any
    checkpoint: Checkpoint
    graph: Graph

    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """transformers' logits f32 [T, vocab] of one sequence."""
        with torch.no_grad():
            return self.model(torch.tensor([token_ids])).logits[0]


_FOLDERS: list[TemporaryDirectory[str]] = []


@cache
def family_model(case: str) -> FamilyModel:
    """The model of a case; made once a process."""
    return random_family_model(*{**CASES, **MORE_CASES}[case], seed=sum(case.encode()))


def random_family_model(name: str, settings: dict[str, Any], seed: int) -> FamilyModel:
    """A model of transformers' classes of a name."""
    import transformers

    torch.manual_seed(seed)
    model = getattr(transformers, _MODELS.get(name, f"{name}ForCausalLM"))
    made = model(_config(name, settings)).eval()
    made.set_experts_implementation("eager")  # what it takes by itself wants widths that are multiples of 16 bytes
    for parameter in made.parameters():
        _randomise(parameter.data)
    for name, buffer in made.named_buffers():
        if name.endswith("e_score_correction_bias"):
            _randomise(buffer.data)
    _FOLDERS.append(TemporaryDirectory())
    made.save_pretrained(_FOLDERS[-1].name)
    checkpoint = open_checkpoint(Path(_FOLDERS[-1].name))
    return FamilyModel(made, checkpoint, checkpoint_graph(checkpoint))


def _randomise(parameter: torch.Tensor) -> None:
    """Far from the initial values, under which biases are zero, norms one and attention nearly uniform."""
    if parameter.ndim == 1:
        parameter.add_(torch.randn_like(parameter) * 0.3)
    else:
        parameter.copy_(torch.randn_like(parameter) * 1.5 * parameter.shape[-1] ** -0.5)
