"""What a GGUF file's metadata says, in Hugging Face's terms: config.json and tensor names.

Sources: llama.cpp's convert_hf_to_gguf.py (which keys it writes from which config fields, and the row permutation of
Q and K) and gguf-py's tensor name map.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmctl.checkpoint.gguf_gemma import gemma3_fields
from llmctl.checkpoint.gguf_keys import Keys, is_set
from llmctl.errors import CheckpointError, UnsupportedModelError

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


@dataclass(frozen=True)
class ArchFacts:
    """One GGUF architecture.

    Attributes:
        architecture: HF class name.
        model_type: HF's; None: the GGUF architecture's name.
        permuted: llama.cpp stores Q and K rows permuted for its interleaved rotary embedding.
        norm_plus_one: llama.cpp stores 1 + w for the weight w of a norm.
        blocks: names of a layer's tensors, GGUF's to HF's.
        extra: config fields that are constants of the family.
    """

    architecture: str
    model_type: str | None = None
    permuted: bool = False
    norm_plus_one: bool = False
    blocks: Mapping[str, str] = field(default_factory=lambda: _BLOCK)
    extra: Mapping[str, Any] = field(default_factory=dict)


ARCHITECTURES: dict[str, ArchFacts] = {
    "llama": ArchFacts("LlamaForCausalLM", permuted=True),
    "qwen2": ArchFacts("Qwen2ForCausalLM", extra={"use_sliding_window": False}),
    "qwen3": ArchFacts("Qwen3ForCausalLM", extra={"use_sliding_window": False, "attention_bias": False}),
    "gemma3": ArchFacts(
        "Gemma3ForCausalLM",
        model_type="gemma3_text",
        norm_plus_one=True,
        blocks=_BLOCK | _GEMMA_NORMS,
        extra={"attention_bias": False},
    ),
}

_DERIVED = frozenset({"rope_freqs.weight"})
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def hf_name(name: str, arch: str, where: str) -> str | None:
    """The HF name of a GGUF tensor; None for tensors that only repeat the config.

    Raises:
        UnsupportedModelError: a tensor the architecture does not have.
    """
    blocks = ARCHITECTURES[arch].blocks
    if name in _DERIVED:
        return None
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if block and block[2] in blocks:
        return f"model.layers.{block[1]}.{blocks[block[2]]}.{block[3]}"
    top = re.fullmatch(r"(\w+)\.(weight|bias)", name)
    if top and top[1] in _TOP:
        return f"{_TOP[top[1]]}.{top[2]}"
    raise UnsupportedModelError(f"{where}: tensor '{name}' is none of architecture {arch}")


def gguf_name(name: str, arch: str, where: str) -> str:
    """The GGUF name of an HF tensor.

    Args:
        arch: one of ``ARCHITECTURES``.

    Raises:
        UnsupportedModelError: a tensor that GGUF has no name for.
    """
    theirs = {ours: gguf for gguf, ours in {**_TOP, **ARCHITECTURES[arch].blocks}.items()}
    found = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+)\.(weight|bias)", name)
    if not found or found[2] not in theirs:
        raise UnsupportedModelError(f"{where}: GGUF has no name for tensor '{name}'")
    stem = f"blk.{found[1]}." if found[1] else ""
    return f"{stem}{theirs[found[2]]}.{found[3]}"


def synthesise_config(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    rope_factors: NDArray[np.float32] | None,
    where: str,
) -> dict[str, Any]:
    """An HF config.json.

    Args:
        shapes: HF tensor name -> shape.
        dtype: what to put in ``dtype``.
        rope_factors: contents of ``rope_freqs.weight``, if the file has it.
        where: the file, for messages.

    Raises:
        UnsupportedModelError: another architecture, mixture of experts, split files, partial rotary, odd rope scaling.
        CheckpointError: missing metadata.
    """
    arch = str(metadata.get("general.architecture"))
    if arch not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{where}: GGUF architecture '{arch}' is not read; known: {', '.join(sorted(ARCHITECTURES))}"
        )
    facts, keys = ARCHITECTURES[arch], Keys(metadata, arch, where)
    _refuse_unsupported(keys)
    heads, hidden = keys.integer("attention.head_count"), keys.integer("embedding_length")
    head_dim = keys.integer("attention.key_length", hidden // heads)
    kv_heads = keys.integer("attention.head_count_kv", heads)
    _check_rows(
        shapes, {"q_proj": heads * head_dim, "k_proj": kv_heads * head_dim, "v_proj": kv_heads * head_dim}, where
    )
    if keys.integer("rope.dimension_count", head_dim) != head_dim:
        raise UnsupportedModelError(f"{where}: partial rotary embedding is not read for {arch}")
    config: dict[str, Any] = {
        "architectures": [facts.architecture],
        "model_type": facts.model_type or arch,
        "hidden_size": hidden,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": keys.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": keys.integer("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": keys.number("rope.freq_base", 10000.0),
        "vocab_size": _vocab_size(shapes, where),
        "tie_word_embeddings": "lm_head.weight" not in shapes,
        "dtype": dtype,
        **facts.extra,
    }
    if arch == "gemma3":
        config |= gemma3_fields(keys, config)
    else:
        config["hidden_act"] = "silu"
    if arch == "llama":
        config["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in shapes
        config["mlp_bias"] = "model.layers.0.mlp.up_proj.bias" in shapes
    scaling = _rope_scaling(keys, rope_factors, config)
    if scaling:
        config["rope_scaling"] = scaling
    for key, name in (("bos", "bos_token_id"), ("eos", "eos_token_id"), ("padding", "pad_token_id")):
        token = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if type(token) is int:
            config[name] = token
    return config


def _refuse_unsupported(keys: Keys) -> None:
    parts = keys.metadata.get("split.count", 1)
    if type(parts) is not int or parts > 1:
        raise UnsupportedModelError(
            f"{keys.where}: one part of a split GGUF", fix="join the parts with llama-gguf-split --merge"
        )
    if is_set(keys.get("expert_count")):
        raise UnsupportedModelError(f"{keys.where}: mixture-of-experts models are not read from GGUF")
    if keys.arch != "gemma3" and is_set(keys.get("attention.sliding_window")):
        raise UnsupportedModelError(f"{keys.where}: sliding-window attention is not read from GGUF")


def _check_rows(shapes: Mapping[str, tuple[int, ...]], rows: Mapping[str, int], where: str) -> None:
    """Tensors whose rows are reordered by head must be what the head counts say."""
    for name, shape in shapes.items():
        wanted = rows.get(name.split(".")[-2])
        if wanted is not None and (not shape or shape[0] != wanted):
            raise CheckpointError(f"{where}: '{name}': expected {wanted} rows, found shape {list(shape)}")


def _vocab_size(shapes: Mapping[str, tuple[int, ...]], where: str) -> int:
    shape = shapes.get("model.embed_tokens.weight")
    if not shape:
        raise CheckpointError(f"{where}: no matrix 'token_embd.weight'")
    return shape[0]


def _rope_scaling(
    keys: Keys, rope_factors: NDArray[np.float32] | None, config: Mapping[str, Any]
) -> dict[str, Any] | None:
    if rope_factors is not None:
        return _llama3_scaling(rope_factors, config, keys.where)
    kind = keys.get("rope.scaling.type")
    if kind is None or (isinstance(kind, str) and kind in ("", "none")):
        return None
    if not isinstance(kind, str):
        raise CheckpointError(f"{keys.where}: metadata {keys.arch}.rope.scaling.type: expected text")
    if kind == "linear":
        return {"rope_type": "linear", "factor": keys.number("rope.scaling.factor")}
    if kind == "yarn":
        original = keys.integer("rope.scaling.original_context_length")
        factor = keys.number("rope.scaling.factor")
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    raise UnsupportedModelError(f"{keys.where}: rope scaling '{kind}' is not read; known: linear, yarn, llama3")


def _llama3_scaling(factors: NDArray[np.float32], config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """GGUF keeps Llama 3's scaled frequencies only; recover the rule by computing it and comparing."""
    if not factors.size or not np.isfinite(factors).all() or factors.min() <= 0:
        raise CheckpointError(f"{where}: rope_freqs.weight: expected positive numbers")
    rule = {"rope_type": "llama3", "factor": float(factors.max()), **_LLAMA3_ROPE}
    expected = llama3_factors(rule, config["rope_theta"], config["head_dim"])
    if expected.shape != factors.shape or not np.allclose(expected, factors, rtol=1e-4):
        raise UnsupportedModelError(f"{where}: rope_freqs.weight is not Llama 3's frequency scaling")
    return rule


def llama3_factors(rule: Mapping[str, Any], theta: float, head_dim: int) -> NDArray[np.float64]:
    """Llama 3's divisors of the rotary frequencies, [head_dim/2], as ``rope_freqs.weight`` holds them."""
    wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    original = rule["original_max_position_embeddings"]
    low, high, factor = rule["low_freq_factor"], rule["high_freq_factor"], rule["factor"]
    smooth = (original / wavelength - low) / (high - low)
    blended = 1 / ((1 - smooth) / factor + smooth)
    return np.where(wavelength < original / high, 1.0, np.where(wavelength > original / low, factor, blended))
