"""What families call their tensors where it is not what Llama calls them, for the rows of ``family_table.py``."""

from __future__ import annotations

from dataclasses import replace

from llmctl.graph.family import TensorNames

PHI_NAMES = TensorNames(
    mlp_norm="",
    o="model.layers.{i}.self_attn.dense",
    up="model.layers.{i}.mlp.fc1",
    down="model.layers.{i}.mlp.fc2",
    final_norm="model.final_layernorm",
)

PHI3_NAMES = TensorNames(
    q="model.layers.{i}.self_attn.qkv_proj",
    k="model.layers.{i}.self_attn.qkv_proj",
    v="model.layers.{i}.self_attn.qkv_proj",
    gate="model.layers.{i}.mlp.gate_up_proj",
    up="model.layers.{i}.mlp.gate_up_proj",
)

GPT2_NAMES = TensorNames(
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

_L = "model.layers.{i}."
SANDWICH = TensorNames(
    attn_out_norm=f"{_L}post_attention_layernorm",
    mlp_norm=f"{_L}pre_feedforward_layernorm",
    mlp_out_norm=f"{_L}post_feedforward_layernorm",
)
POST_NORM = TensorNames(
    attn_norm="",
    attn_out_norm=f"{_L}post_attention_layernorm",
    mlp_norm="",
    mlp_out_norm=f"{_L}post_feedforward_layernorm",
)
GLM_NAMES = TensorNames(gate=f"{_L}mlp.gate_up_proj", up=f"{_L}mlp.gate_up_proj")
GLM4_NAMES = replace(GLM_NAMES, attn_out_norm=f"{_L}post_self_attn_layernorm", mlp_out_norm=f"{_L}post_mlp_layernorm")
_NEOX_QKV = "gpt_neox.layers.{i}.attention.query_key_value"
NEOX_NAMES = TensorNames(
    embed="gpt_neox.embed_in",
    attn_norm="gpt_neox.layers.{i}.input_layernorm",
    mlp_norm="gpt_neox.layers.{i}.post_attention_layernorm",
    q=_NEOX_QKV,
    k=_NEOX_QKV,
    v=_NEOX_QKV,
    o="gpt_neox.layers.{i}.attention.dense",
    up="gpt_neox.layers.{i}.mlp.dense_h_to_4h",
    down="gpt_neox.layers.{i}.mlp.dense_4h_to_h",
    final_norm="gpt_neox.final_layer_norm",
    head="embed_out",
)
STARCODER2_NAMES = TensorNames(up=f"{_L}mlp.c_fc", down=f"{_L}mlp.c_proj")
QWEN2_MOE_NAMES = TensorNames(
    shared_gate=f"{_L}mlp.shared_expert.gate_proj",
    shared_up=f"{_L}mlp.shared_expert.up_proj",
    shared_down=f"{_L}mlp.shared_expert.down_proj",
    shared_switch=f"{_L}mlp.shared_expert_gate",
)
_SPARSE = f"{_L}block_sparse_moe."
MIXTRAL_NAMES = TensorNames(
    router=f"{_SPARSE}gate",
    expert_gate=f"{_SPARSE}experts.{{e}}.w1",
    expert_up=f"{_SPARSE}experts.{{e}}.w3",
    expert_down=f"{_SPARSE}experts.{{e}}.w2",
)
GRANITE_MOE_NAMES = TensorNames(
    router=f"{_SPARSE}router.layer",
    expert_gate=f"{_SPARSE}experts.{{e}}.gate_proj",
    expert_up=f"{_SPARSE}experts.{{e}}.up_proj",
    expert_down=f"{_SPARSE}experts.{{e}}.down_proj",
)
