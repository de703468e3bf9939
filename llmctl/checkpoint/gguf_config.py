"""What a GGUF file's metadata says, in Hugging Face's terms: config.json and tensor names.

Sources: llama.cpp's convert_hf_to_gguf.py (which keys it writes from which config fields, and the row permutation of
Q and K) and gguf-py's tensor name map.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmctl.checkpoint.gguf_families import ARCHITECTURES, EXPERT, TOP, ArchFacts, gguf_architecture, row_of
from llmctl.checkpoint.gguf_keys import Keys, is_set
from llmctl.errors import CheckpointError, UnsupportedModelError

ROPE_FREQS, ROPE_LONG, ROPE_SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_FACTORS = (ROPE_FREQS, ROPE_LONG, ROPE_SHORT)
"""Tensors of divisors of the rotary frequencies, which config.json says in HF's checkpoints."""
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def hf_name(name: str, row: str, where: str) -> str | None:
    """The HF name of a GGUF tensor, with ``EXPERT`` in it if it holds a layer's; None for tensors that only repeat
    the config.

    Args:
        row: of ``ARCHITECTURES``.

    Raises:
        UnsupportedModelError: a tensor the architecture does not have.
    """
    blocks = ARCHITECTURES[row].blocks
    if name in ROPE_FACTORS:
        return None
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if block and block[2] in blocks:
        return f"model.layers.{block[1]}.{blocks[block[2]]}.{block[3]}"
    top = re.fullmatch(r"(\w+)\.(weight|bias)", name)
    if top and top[1] in TOP:
        return f"{TOP[top[1]]}.{top[2]}"
    raise UnsupportedModelError(f"{where}: tensor '{name}' is none of architecture {gguf_architecture(row)}")


def gguf_name(name: str, row: str, where: str) -> tuple[str, int | None]:
    """The GGUF name of an HF tensor, and which expert of that tensor it is; None where the tensor is it alone.

    Args:
        row: of ``ARCHITECTURES``.

    Raises:
        UnsupportedModelError: a tensor that GGUF has no name for.
    """
    theirs = {ours: gguf for gguf, ours in {**TOP, **ARCHITECTURES[row].blocks}.items()}
    found = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+?)(?:\.experts\.(\d+)\.(\w+))?\.(weight|bias)", name)
    layer, module, expert, projection, kind = found.groups() if found else (None, "", None, None, None)
    module = module if expert is None else f"{module}.experts.{EXPERT}.{projection}"
    if module not in theirs:
        raise UnsupportedModelError(f"{where}: GGUF has no name for tensor '{name}'")
    stem = f"blk.{layer}." if layer else ""
    return f"{stem}{theirs[module]}.{kind}", None if expert is None else int(expert)


def synthesise_config(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    rope_factors: Mapping[str, NDArray[np.float32]],
    where: str,
) -> dict[str, Any]:
    """An HF config.json.

    Args:
        shapes: HF tensor name -> shape.
        dtype: what to put in ``dtype``.
        rope_factors: contents of the ``ROPE_FACTORS`` that the file has.
        where: the file, for messages.

    Raises:
        UnsupportedModelError: another architecture; experts, windows, a partial rotary embedding where the architecture
            is not known to have them; split files, odd rope scaling.
        CheckpointError: missing metadata.
    """
    row = row_of(metadata, where)
    arch, facts = gguf_architecture(row), ARCHITECTURES[row]
    keys = Keys(metadata, arch, where)
    _refuse_unsupported(keys, facts)
    heads, hidden = keys.integer("attention.head_count"), keys.integer("embedding_length")
    head_dim = keys.integer("attention.key_length", hidden // heads)
    kv_heads = keys.integer("attention.head_count_kv", heads)
    _check_rows(
        shapes, {"q_proj": heads * head_dim, "k_proj": kv_heads * head_dim, "v_proj": kv_heads * head_dim}, where
    )
    if not facts.partial and keys.integer("rope.dimension_count", head_dim) != head_dim:
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
    if facts.biased:
        config["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in shapes
        config["mlp_bias"] = "model.layers.0.mlp.up_proj.bias" in shapes
    config |= facts.fields(keys, config)
    scaling = _rope_scaling(keys, rope_factors, config)
    if scaling:
        config["rope_scaling"] = scaling
    for key, name in (("bos", "bos_token_id"), ("eos", "eos_token_id"), ("padding", "pad_token_id")):
        token = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if type(token) is int:
            config[name] = token
    return config


def _refuse_unsupported(keys: Keys, facts: ArchFacts) -> None:
    parts = keys.metadata.get("split.count", 1)
    if type(parts) is not int or parts > 1:
        raise UnsupportedModelError(
            f"{keys.where}: one part of a split GGUF", fix="join the parts with llama-gguf-split --merge"
        )
    if not facts.experts and is_set(keys.get("expert_count")):
        raise UnsupportedModelError(f"{keys.where}: mixtures of experts of architecture {keys.arch} are not read")
    if not facts.windows and is_set(keys.get("attention.sliding_window")):
        raise UnsupportedModelError(f"{keys.where}: sliding-window attention of architecture {keys.arch} is not read")


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
    keys: Keys, factors: Mapping[str, NDArray[np.float32]], config: Mapping[str, Any]
) -> dict[str, Any] | None:
    if ROPE_LONG in factors or ROPE_SHORT in factors:
        return _longrope_scaling(keys, factors, config)
    if ROPE_FREQS in factors:
        return _llama3_scaling(factors[ROPE_FREQS], config, keys.where)
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


def _longrope_scaling(
    keys: Keys, factors: Mapping[str, NDArray[np.float32]], config: Mapping[str, Any]
) -> dict[str, Any]:
    """Phi's: divisors for texts up to the original context, and for longer ones.

    What scales the rotated queries and keys, ``rope.scaling.attn_factor``, is what HF's code makes of the two contexts;
    where a file says something else it is kept.
    """
    half = keys.integer("rope.dimension_count", config["head_dim"]) // 2
    for name in (ROPE_LONG, ROPE_SHORT):
        found = factors.get(name)
        if found is None or found.shape != (half,) or not np.isfinite(found).all() or found.min() <= 0:
            raise CheckpointError(f"{keys.where}: {name}: expected {half} positive numbers")
    original = keys.integer("rope.scaling.original_context_length")
    if original < 2:
        name = f"{keys.arch}.rope.scaling.original_context_length"
        raise CheckpointError(f"{keys.where}: metadata {name}: expected 2 or more, found {original}")
    ratio = config["max_position_embeddings"] / original
    usual = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
    stored = keys.number("rope.scaling.attn_factor", usual)
    return {
        "rope_type": "longrope",
        "short_factor": [float(str(x)) for x in factors[ROPE_SHORT]],
        "long_factor": [float(str(x)) for x in factors[ROPE_LONG]],
        "original_max_position_embeddings": original,
        **({} if math.isclose(stored, usual, rel_tol=1e-5) else {"attention_factor": stored}),
    }


def _llama3_scaling(factors: NDArray[np.float32], config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """GGUF keeps Llama 3's scaled frequencies only; recover the rule by computing it and comparing."""
    if not factors.size or not np.isfinite(factors).all() or factors.min() <= 0:
        raise CheckpointError(f"{where}: {ROPE_FREQS}: expected positive numbers")
    rule = {"rope_type": "llama3", "factor": float(factors.max()), **_LLAMA3_ROPE}
    expected = llama3_factors(rule, config["rope_theta"], config["head_dim"])
    if expected.shape != factors.shape or not np.allclose(expected, factors, rtol=1e-4):
        raise UnsupportedModelError(f"{where}: {ROPE_FREQS} is not Llama 3's frequency scaling")
    return rule


def llama3_factors(rule: Mapping[str, Any], theta: float, head_dim: int) -> NDArray[np.float64]:
    """Llama 3's divisors of the rotary frequencies, [head_dim/2], as ``rope_freqs.weight`` holds them."""
    wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    original = rule["original_max_position_embeddings"]
    low, high, factor = rule["low_freq_factor"], rule["high_freq_factor"], rule["factor"]
    smooth = (original / wavelength - low) / (high - low)
    blended = 1 / ((1 - smooth) / factor + smooth)
    return np.where(wavelength < original / high, 1.0, np.where(wavelength > original / low, factor, blended))
