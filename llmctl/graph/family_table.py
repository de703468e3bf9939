"""The families as facts: one row per Hugging Face ``model_type``. ``families.py`` builds any row into a Graph.

A new model is a new row; a fact that no row can state yet is a new field here and a branch in the builder, never a
subclass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from llmctl.graph.rope_config import ROPE_TYPES

# True, False, or the name of the config key that decides (absent key = False).
Switch = bool | str


@dataclass(frozen=True)
class TensorNames:
    """Checkpoint modules (tensor names without ``.weight``/``.bias``); ``{i}`` is the layer.

    Linears that name the same module are row slices of one tensor, in the order q, k, v or gate, up.
    """

    embed: str = "model.embed_tokens"
    pos_embed: str = ""
    attn_norm: str = "model.layers.{i}.input_layernorm"
    mlp_norm: str = "model.layers.{i}.post_attention_layernorm"
    q: str = "model.layers.{i}.self_attn.q_proj"
    k: str = "model.layers.{i}.self_attn.k_proj"
    v: str = "model.layers.{i}.self_attn.v_proj"
    o: str = "model.layers.{i}.self_attn.o_proj"
    q_norm: str = "model.layers.{i}.self_attn.q_norm"
    k_norm: str = "model.layers.{i}.self_attn.k_norm"
    gate: str = "model.layers.{i}.mlp.gate_proj"
    up: str = "model.layers.{i}.mlp.up_proj"
    down: str = "model.layers.{i}.mlp.down_proj"
    final_norm: str = "model.norm"
    head: str = "lm_head"


@dataclass(frozen=True)
class Family:
    """What distinguishes one architecture.

    Attributes:
        name: HF ``model_type``.
        architectures: HF classes whose checkpoints are read, the causal model's first.
        keys: canonical config key -> this family's spelling, where it differs from Llama's.
        defaults: values that HF's config class supplies when config.json leaves a key out.
        norm: ``rms`` or ``layer`` (with bias); ``eps_key`` holds its epsilon.
        positions: ``rope`` or ``learned``.
        partial_rotary: the family honours ``partial_rotary_factor``.
        rope_types: the scalings of RoPE that it has here.
        gated: the MLP is ``down(act(gate(x)) * up(x))``, else ``down(act(up(x)))``.
        parallel: attention and MLP both read one shared norm and are added to the residual together.
        qk_norm: q and k are RMS-normalised per head before RoPE.
        bias_qkv, bias_o, bias_mlp, bias_head: which linears have a bias.
        window: ``none``, ``all`` (``sliding_window`` on every layer) or ``by_layer`` (``use_sliding_window``,
            ``max_window_layers``, ``layer_types``).
        conv1d: layer linears are stored ``[in, out]``.
        neutral: config keys that must have one of these values here, on top of (or instead of) ``NEUTRAL``.
    """

    name: str
    architectures: tuple[str, ...]
    names: TensorNames = field(default_factory=TensorNames)
    keys: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    norm: Literal["rms", "layer"] = "rms"
    eps_key: str = "rms_norm_eps"
    act_key: str = "hidden_act"
    positions: Literal["rope", "learned"] = "rope"
    partial_rotary: bool = False
    rope_types: tuple[str, ...] = ROPE_TYPES
    gated: bool = True
    parallel: bool = False
    qk_norm: bool = False
    bias_qkv: Switch = False
    bias_o: Switch = False
    bias_mlp: Switch = False
    bias_head: bool = False
    window: Literal["none", "all", "by_layer"] = "none"
    conv1d: bool = False
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


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
    "pretraining_tp": _ONE,
    "qk_layernorm": _OFF,
    "qk_norm": _OFF,
    "query_pre_attn_scalar": (None,),
    "residual_multiplier": _ONE,
    "rope_interleaved": _OFF,
    "scale_attn_by_inverse_layer_idx": _OFF,
    "scale_attn_weights": (None, True),
    "sliding_window": _OFF,
    "use_mrope": _OFF,
    "use_parallel_residual": _OFF,
    "use_qk_norm": _OFF,
    "use_sliding_window": _OFF,
}

# HF's activation names -> the act op's fn. gelu_new and its relatives differ only in how the tanh formula is evaluated.
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
}

_QWEN_DEFAULTS = {
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "max_position_embeddings": 32768,
}

_PHI_NAMES = TensorNames(
    o="model.layers.{i}.self_attn.dense",
    up="model.layers.{i}.mlp.fc1",
    down="model.layers.{i}.mlp.fc2",
    final_norm="model.final_layernorm",
)

_PHI3_NAMES = TensorNames(
    q="model.layers.{i}.self_attn.qkv_proj",
    k="model.layers.{i}.self_attn.qkv_proj",
    v="model.layers.{i}.self_attn.qkv_proj",
    gate="model.layers.{i}.mlp.gate_up_proj",
    up="model.layers.{i}.mlp.gate_up_proj",
)

_GPT2_NAMES = TensorNames(
    embed="transformer.wte",
    pos_embed="transformer.wpe",
    attn_norm="transformer.h.{i}.ln_1",
    mlp_norm="transformer.h.{i}.ln_2",
    q="transformer.h.{i}.attn.c_attn",
    k="transformer.h.{i}.attn.c_attn",
    v="transformer.h.{i}.attn.c_attn",
    o="transformer.h.{i}.attn.c_proj",
    up="transformer.h.{i}.mlp.c_fc",
    down="transformer.h.{i}.mlp.c_proj",
    final_norm="transformer.ln_f",
)

_ROWS = (
    Family(
        "llama",
        ("LlamaForCausalLM", "LlamaModel", "LLaMAForCausalLM"),
        defaults={"hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
        bias_qkv="attention_bias",
        bias_o="attention_bias",
        bias_mlp="mlp_bias",
    ),
    Family(
        "mistral",
        ("MistralForCausalLM", "MistralModel"),
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
        defaults=_QWEN_DEFAULTS,
        bias_qkv=True,
        window="by_layer",
        neutral={"attention_bias": (None, False, True)},
    ),
    Family(
        "qwen3",
        ("Qwen3ForCausalLM", "Qwen3Model"),
        defaults={**_QWEN_DEFAULTS, "head_dim": 128},
        qk_norm=True,
        bias_qkv="attention_bias",
        bias_o="attention_bias",
        window="by_layer",
    ),
    Family(
        "phi",
        ("PhiForCausalLM", "PhiModel"),
        names=_PHI_NAMES,
        defaults={
            "hidden_act": "gelu_new",
            "layer_norm_eps": 1e-5,
            "partial_rotary_factor": 0.5,
            "max_position_embeddings": 2048,
        },
        norm="layer",
        eps_key="layer_norm_eps",
        partial_rotary=True,
        gated=False,
        parallel=True,
        bias_qkv=True,
        bias_o=True,
        bias_mlp=True,
        bias_head=True,
    ),
    # transformers reads a rope_type "yarn" of this family as its own "longrope".
    Family(
        "phi3",
        ("Phi3ForCausalLM", "Phi3Model"),
        names=_PHI3_NAMES,
        defaults={
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "partial_rotary_factor": 1.0,
            "max_position_embeddings": 4096,
        },
        partial_rotary=True,
        rope_types=("default",),
        window="all",
    ),
    Family(
        "gpt2",
        ("GPT2LMHeadModel", "GPT2Model"),
        names=_GPT2_NAMES,
        keys={
            "hidden_size": "n_embd",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions",
            "intermediate_size": "n_inner",
        },
        defaults={
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "n_positions": 1024,
            "tie_word_embeddings": True,
        },
        norm="layer",
        eps_key="layer_norm_epsilon",
        act_key="activation_function",
        positions="learned",
        gated=False,
        bias_qkv=True,
        bias_o=True,
        bias_mlp=True,
        conv1d=True,
    ),
)

FAMILIES: Mapping[str, Family] = {row.name: row for row in _ROWS}
