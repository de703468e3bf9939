"""Random models of every row of ``gguf_families.ARCHITECTURES``, as transformers' classes and as GGUF files."""

from __future__ import annotations

import re
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from family_models import VOCAB, FamilyModel, random_family_model
from gguf_files import add_tokenizer, converter_permute, small_tokenizer

from llmctl.checkpoint.quantized import QuantizedWeight

SIZES = {
    **{"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "pad_token_id": 0},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128},
}
_EXPERTS = {"expert_count": 4, "expert_used_count": 2}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_GRANITE = {
    **{"embedding_multiplier": 12.0, "attention_multiplier": 0.4, "residual_multiplier": 0.25, "logits_scaling": 3.0}
}
_GRANITE_KEYS = {"embedding_scale": 12.0, "attention.scale": 0.4, "residual_scale": 0.25, "logit_scale": 3.0}
_LONG = {"short_factor": [1.0, 1.3, 1.7, 2.5], "long_factor": [2.0, 3.0, 5.0, 9.0]}

# Row of ARCHITECTURES -> transformers' class, what its config says beyond the sizes, and GGUF's keys of that.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": True}, {}),
    "qwen2": ("Qwen2", {}, {}),
    "qwen3": ("Qwen3", {"head_dim": 24}, {"attention.key_length": 24}),
    "llama+experts": ("Mixtral", {**_LOCAL, "sliding_window": None}, _EXPERTS),
    "qwen2moe": (
        "Qwen2Moe",
        {**_MOE, "shared_expert_intermediate_size": 48, "decoder_sparse_step": 1, "norm_topk_prob": False},
        {**_EXPERTS, "expert_feed_forward_length": 32, "expert_shared_feed_forward_length": 48},
    ),
    "qwen3moe": (
        "Qwen3Moe",
        {**_MOE, "head_dim": 24, "norm_topk_prob": True},
        {**_EXPERTS, "expert_feed_forward_length": 32, "attention.key_length": 24},
    ),
    "gemma2": (
        "Gemma2",
        {
            **{"head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": 7},
            **{"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
        },
        {
            **{"attention.key_length": 24, "attention.sliding_window": 7},
            **{"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            **{"head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": 7, "final_logit_softcapping": 5.0},
            "layer_types": [*["sliding_attention"] * 2, "full_attention", "sliding_attention"],
        },
        {
            **{"attention.key_length": 24, "attention.sliding_window": 7, "final_logit_softcapping": 5.0},
            "attention.sliding_window_pattern": 3,
        },
    ),
    "granite": ("Granite", {**_GRANITE, "attention_bias": True}, _GRANITE_KEYS),
    "granitemoe": ("GraniteMoe", {**_GRANITE, **_LOCAL}, {**_GRANITE_KEYS, **_EXPERTS}),
    "olmoe": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}, _EXPERTS),
    "olmo2": ("Olmo2", {}, {}),
    "phi3": (
        "Phi3",
        {
            **{"sliding_window": 7, "original_max_position_embeddings": 96},
            "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.5, **_LONG},
        },
        {
            **{"attention.sliding_window": 7, "rope.dimension_count": 8},
            "rope.scaling.original_context_length": 96,
        },
    ),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 4}, {}),
}
_PERMUTED = ("llama", "llama+experts", "granite", "granitemoe", "smollm3")
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)")
_PROJECTION = {"w1": "gate", "w2": "down", "w3": "up", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}


@cache
def made(row: str) -> FamilyModel:
    """A random model of a row; made once a process."""
    name, settings, _ = CASES[row]
    return random_family_model(name, {**SIZES, **settings}, seed=sum(row.encode()))


def converted(row: str, model: FamilyModel) -> dict[str, np.ndarray]:
    """A model's tensors as llama.cpp's converter stores them, by its names."""
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == row.partition("+")[0])
    names = gguf.get_tensor_name_map(arch, model.graph.num_layers)
    found: dict[str, np.ndarray] = {}
    experts: dict[str, list[np.ndarray]] = defaultdict(list)
    checkpoint = model.checkpoint
    for name in sorted(checkpoint.names(), key=lambda n: [int(p) if p.isdigit() else p for p in n.split(".")]):
        module, _, kind = name.rpartition(".")
        tensor = checkpoint.weight(name)
        assert not isinstance(tensor, QuantizedWeight)
        if row in _PERMUTED and (".q_proj." in name or ".k_proj." in name):
            tensor = converter_permute(
                tensor, SIZES["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            )
        if row in ("gemma2", "gemma3") and name.endswith("norm.weight"):
            tensor = tensor + 1
        expert = _EXPERT.fullmatch(module)
        if expert:
            layer = module.split(".")[2]
            experts[f"blk.{layer}.ffn_{_PROJECTION[expert[3]]}_exps.weight"].append(tensor.numpy())
            continue
        there = names.get_name(module.replace("router.layer", "gate"))
        assert there is not None, name
        found[f"{there}.{kind}"] = tensor.float().squeeze().numpy()
    factors = {f"rope_factors_{k.split('_')[0]}.weight": np.array(v, np.float32) for k, v in _LONG.items()}
    found |= factors if row == "phi3" else {}
    return found | {name: np.stack(parts) for name, parts in experts.items()}


def write(path: Path, row: str, model: FamilyModel, qtype: Any = None, **changes: Any) -> Path:
    """As llama.cpp's converter does. ``changes``: keys other than the case's, ``__`` for a point; None: left out."""
    arch, config = row.partition("+")[0], model.model.config
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    keys = {
        **{"block_count": 4, "context_length": 128, "embedding_length": 64, "feed_forward_length": 96},
        **{"attention.head_count": 4, "attention.head_count_kv": 2},
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(rope["rope_theta"]),
        **CASES[row][2],
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    writer = gguf.GGUFWriter(str(path), arch)
    for key, value in keys.items():
        if value is not None:
            add: Any = writer.add_uint32 if isinstance(value, int) else writer.add_float32
            add(f"{arch}.{key}", value)
    add_tokenizer(writer, small_tokenizer(VOCAB))
    for name, array in converted(row, model).items():
        if qtype is None or array.ndim == 1 or name.startswith(("rope", "token_embd", "output")):
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quants.quantize(array, qtype), raw_dtype=qtype)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return path
