"""The families as facts: one row per Hugging Face ``model_type``, those with experts in
``mixture_table.py``, those with LayerNorm in ``layer_norm_table.py``.
``families.py`` builds any row into a Graph.

A new model is a new row; a fact that no row can state yet is a new field of ``Family`` and a branch in the builder,
never a subclass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmctl.graph import family_names as names
from llmctl.graph.family import Family
from llmctl.graph.layer_norm_table import LAYER_NORMS
from llmctl.graph.mixture_table import MIXTURES

_QWEN_DEFAULTS = {
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "max_position_embeddings": 32768,
}

_GEMMA = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
_GEMMA2 = {**_GEMMA, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "sliding_window": 4096}
# A config.json with a picture tower (4B and larger) leaves out what transformers' class supplies.
_GEMMA3_SIZES = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
}
# Gemma's hidden_activation decides, and is the default where it is null.
_LEGACY_ACT: Mapping[str, tuple[Any, ...]] = {"hidden_act": (None, "gelu", "gelu_pytorch_tanh")}
_CAPS = ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")
_OLMO = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 2048}
_GLM = {
    "hidden_act": "silu",
    "rms_norm_eps": 1.5625e-07,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "partial_rotary_factor": 0.5,
    "max_position_embeddings": 131072,
    "attention_bias": True,
}

_ROWS = (
    Family(
        "llama",
        ("LlamaForCausalLM", "LlamaModel", "LLaMAForCausalLM"),
        models="Llama 1 to 3.3, CodeLlama, TinyLlama, SmolLM 1 and 2, Yi, DeepSeek LLM, distillations to Llama",
        defaults={"hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
        bias_qkv="attention_bias",
        bias_o="attention_bias",
        bias_mlp="mlp_bias",
    ),
    Family(
        "mistral",
        ("MistralForCausalLM", "MistralModel"),
        models="Mistral 7B, Nemo, Small, Codestral, Devstral",
        defaults={
            "hidden_act": "silu",
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-6,
            "sliding_window": 4096,
            "max_position_embeddings": 131072,
        },
        window="all",
    ),
    # Qwen2 always has q/k/v biases and none elsewhere; transformers does not read attention_bias for it.
    Family(
        "qwen2",
        ("Qwen2ForCausalLM", "Qwen2Model"),
        models="Qwen1.5, Qwen2, Qwen2.5, QwQ, distillations to Qwen",
        defaults=_QWEN_DEFAULTS,
        bias_qkv=True,
        window="by_layer",
        neutral={"attention_bias": (None, False, True)},
    ),
    Family(
        "qwen3",
        ("Qwen3ForCausalLM", "Qwen3Model"),
        models="Qwen3, dense",
        defaults={**_QWEN_DEFAULTS, "head_dim": 128},
        qk_norm="head",
        bias_qkv="attention_bias",
        bias_o="attention_bias",
        window="by_layer",
    ),
    # transformers reads a rope_type "yarn" of this family as its own "longrope".
    Family(
        "phi3",
        ("Phi3ForCausalLM", "Phi3Model"),
        models="Phi-3, Phi-3.5, Phi-4, Phi-4-mini",
        limits="contexts end where longrope takes its long factors",
        names=names.PHI3_NAMES,
        defaults={
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "partial_rotary_factor": 1.0,
            "max_position_embeddings": 4096,
        },
        partial_rotary=True,
        rope_types=("default", "longrope"),
        window="all",
        neutral={"full_attn_mod": (None, 1), "interpolate_factor": (None, 1)},
    ),
    Family(
        "ministral3",
        ("Ministral3ForCausalLM", "Ministral3Model"),
        models="Ministral 3",
        limits="contexts end where queries would be scaled by their position",
        defaults={
            "hidden_act": "silu",
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 262144,
        },
        query_scale=True,
        window="all",
    ),
    # Its own code has biases by other names; where they are not off, it is refused.
    Family(
        "internlm3",
        ("LlamaForCausalLM", "LlamaModel", "InternLM3ForCausalLM", "InternLM3Model"),
        models="InternLM3",
        defaults={
            "hidden_act": "silu",
            "num_key_value_heads": 2,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 32768,
        },
        bias_qkv="attention_bias",
        bias_o="attention_bias",
        bias_mlp="mlp_bias",
        neutral={"qkv_bias": (None, False), "bias": (None, False)},
    ),
    Family(
        "seed_oss",
        ("SeedOssForCausalLM", "SeedOssModel"),
        models="Seed-OSS",
        defaults={
            "hidden_act": "silu",
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 524288,
            "attention_bias": True,
        },
        bias_qkv="attention_bias",
        bias_o="attention_out_bias",
        bias_mlp="mlp_bias",
    ),
    Family(
        "arcee",
        ("ArceeForCausalLM", "ArceeModel"),
        models="Arcee AFM",
        defaults={"hidden_act": "relu2", "rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
        gated=False,
        bias_qkv="attention_bias",
        bias_o="attention_bias",
        bias_mlp="mlp_bias",
    ),
    # Its hidden_act, whatever it says, means gelu_pytorch_tanh.
    Family(
        "gemma",
        ("GemmaForCausalLM", "GemmaModel"),
        models="Gemma, CodeGemma",
        limits="not in float16",
        defaults={**_GEMMA, "hidden_activation": "gelu_pytorch_tanh", "num_key_value_heads": 16},
        plus_one=True,
        act_key="hidden_activation",
        sqrt_embed=True,
        wide_range=True,
        neutral=_LEGACY_ACT,
    ),
    Family(
        "gemma2",
        ("Gemma2ForCausalLM", "Gemma2Model"),
        models="Gemma 2",
        limits="not in float16",
        names=names.SANDWICH,
        defaults={
            **_GEMMA2,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window_pattern": 2,
        },
        plus_one=True,
        act_key="hidden_activation",
        window="typed",
        factors=_CAPS,
        sqrt_embed=True,
        wide_range=True,
        neutral=_LEGACY_ACT,
    ),
    Family(
        "gemma3_text",
        ("Gemma3ForCausalLM", "Gemma3TextModel"),
        models="Gemma 3, text",
        limits="not in float16; pictures are not read",
        names=names.SANDWICH,
        defaults={
            **_GEMMA2,
            **_GEMMA3_SIZES,
            "max_position_embeddings": 131072,
            "sliding_window_pattern": 6,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
        },
        plus_one=True,
        act_key="hidden_activation",
        local_theta="rope_local_base_freq",
        qk_norm="head",
        window="typed",
        factors=_CAPS,
        sqrt_embed=True,
        wide_range=True,
        neutral=_LEGACY_ACT,
    ),
    Family(
        "granite",
        ("GraniteForCausalLM", "GraniteModel"),
        models="Granite 3, dense",
        defaults={
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 2048,
            "attention_multiplier": 1.0,
        },
        bias_qkv="attention_bias",
        bias_o="attention_bias",
        bias_mlp="mlp_bias",
        factors=("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"),
    ),
    Family(
        "olmo2",
        ("Olmo2ForCausalLM", "Olmo2Model"),
        models="OLMo 2",
        names=names.POST_NORM,
        defaults=_OLMO,
        qk_norm="row",
        bias_qkv="attention_bias",
        bias_o="attention_bias",
    ),
    Family(
        "olmo3",
        ("Olmo3ForCausalLM", "Olmo3Model"),
        models="OLMo 3",
        names=names.POST_NORM,
        defaults={**_OLMO, "sliding_window": 4096, "sliding_window_pattern": 4, "rope_theta": 500_000.0},
        local_theta="rope_theta",
        qk_norm="row",
        bias_qkv="attention_bias",
        bias_o="attention_bias",
        window="typed",
    ),
    Family(
        "smollm3",
        ("SmolLM3ForCausalLM", "SmolLM3Model"),
        models="SmolLM3",
        limits="windows: refused",
        defaults={
            "hidden_act": "silu",
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 32768,
            "rope_theta": 2_000_000.0,
            "no_rope_layer_interval": 4,
            "tie_word_embeddings": True,
        },
        rope_layers="listed",
        bias_qkv="attention_bias",
        bias_o="attention_bias",
        bias_mlp="mlp_bias",
    ),
    # Command R says in max_position_embeddings what fitted into memory, in model_max_length what it was trained on.
    Family(
        "exaone4",
        ("Exaone4ForCausalLM", "Exaone4Model"),
        models="EXAONE 4",
        names=names.POST_NORM,
        defaults={
            "hidden_act": "silu",
            "num_key_value_heads": 32,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 2048,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
        },
        rope_layers="sliding_if_any",
        qk_norm="head",
        window="typed",
    ),
    Family(
        "glm",
        ("GlmForCausalLM", "GlmModel"),
        models="GLM-4 9B",
        names=names.GLM_NAMES,
        defaults=_GLM,
        partial_rotary=True,
        rope_style="gptj",
        bias_qkv="attention_bias",
    ),
    Family(
        "glm4",
        ("Glm4ForCausalLM", "Glm4Model"),
        models="GLM-4 0414",
        names=names.GLM4_NAMES,
        defaults=_GLM,
        partial_rotary=True,
        rope_style="gptj",
        bias_qkv="attention_bias",
    ),
    Family(
        "ernie4_5",
        ("Ernie4_5ForCausalLM", "Ernie4_5Model", "Ernie4_5_ForCausalLM"),
        models="ERNIE 4.5, dense",
        defaults={
            "hidden_act": "silu",
            "num_key_value_heads": 2,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131072,
            "rope_theta": 500_000.0,
            "tie_word_embeddings": True,
        },
        rope_style="gptj",
        bias_qkv="use_bias",
        bias_o="use_bias",
        bias_mlp="use_bias",
        neutral={"compression_ratio": (None, 1, 1.0), "use_rmsnorm": (None, True)},
    ),
)

FAMILIES: Mapping[str, Family] = {row.name: row for row in (*_ROWS, *LAYER_NORMS, *MIXTURES)}
