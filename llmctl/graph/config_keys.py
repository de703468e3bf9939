"""Keys of config.json that mean the same in every family, and the activations' names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FACTORS = (
    "attention_multiplier",
    "attn_logit_softcapping",
    "embedding_multiplier",
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "query_pre_attn_scalar",
    "residual_multiplier",
)
"""What embeddings, attention's scores, branches or logits are multiplied by, divided by (``logits_scaling``; the root
of ``query_pre_attn_scalar``) or capped at (``*_softcapping``)."""

_OFF: tuple[Any, ...] = (None, False)
_ONE: tuple[Any, ...] = (None, 1, 1.0)

# Keys that change the forward pass of some model in the wild. A config that sets one to anything else is refused
# unless its family honours the key.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "add_cross_attention": _OFF,
    "alibi": _OFF,
    "attention_bias": _OFF,
    "attention_chunk_size": _OFF,
    "attention_multiplier": (None,),
    "attn_logit_softcapping": _OFF,
    "clip_qkv": _OFF,
    "embedding_multiplier": _ONE,
    "final_logit_softcapping": _OFF,
    "is_encoder_decoder": _OFF,
    "lm_head_bias": _OFF,
    "logit_scale": _ONE,
    "logits_scaling": _ONE,
    "mlp_bias": _OFF,
    "moe_intermediate_size": _OFF,
    "n_routed_experts": (None, 0),
    "no_rope_layers": (None, []),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "parallel_attn": _OFF,
    "position_embedding_type": (None, "absolute", "rope"),
    "qk_layernorm": _OFF,
    "qk_norm": _OFF,
    "query_pre_attn_scalar": (None,),
    "residual_multiplier": _ONE,
    "rope_interleaved": _OFF,
    "scale_attn_by_inverse_layer_idx": _OFF,
    "scale_attn_weights": (None, True),
    "sliding_window": _OFF,
    "use_bidirectional_attention": _OFF,
    "use_mrope": _OFF,
    "use_parallel_residual": _OFF,
    "use_qk_norm": _OFF,
    "use_sliding_window": _OFF,
}

# HF's activation names -> the act op's fn; relu2 is relu, squared by a mul. gelu_new and its relatives differ only in
# how the tanh formula is evaluated.
ACTIVATIONS: Mapping[str, str] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
