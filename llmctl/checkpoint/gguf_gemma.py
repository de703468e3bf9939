"""What Gemma 2's and 3's config.json says beyond the other families', from a GGUF file's metadata, and there.

Sources: convert_hf_to_gguf.py's Gemma2Model and Gemma3Model, llama.cpp's models/gemma2.cpp and gemma3.cpp (for what the
file leaves out) and transformers' Gemma2Config and Gemma3TextConfig.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from llmctl.checkpoint.gguf_keys import Keys, is_set
from llmctl.errors import CheckpointError
from llmctl.graph.config_reader import ConfigReader
from llmctl.graph.hf_config import Arch

_ACTIVATION = "gelu_pytorch_tanh"
_FULL, _SLIDING = "full_attention", "sliding_attention"
_PATTERN = 6
"""Every sixth layer attends to all tokens."""
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}
"""The 27B models alone scale their queries by something else than the width of their heads."""


def gemma2_fields(keys: Keys, config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of Gemma2Config; ``config`` and errors as ``gemma3_fields``."""
    layers = config["num_hidden_layers"]
    return {
        "hidden_activation": _ACTIVATION,
        "query_pre_attn_scalar": _query_width(keys, config),
        "sliding_window": keys.integer("attention.sliding_window", 4096),
        "layer_types": [_FULL if layer % 2 else _SLIDING for layer in range(layers)],
        "attn_logit_softcapping": keys.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": keys.number("final_logit_softcapping", 30.0),
    }


def gemma3_fields(keys: Keys, config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of Gemma3TextConfig.

    Args:
        config: what is known already: head_dim, hidden_size, num_attention_heads, num_hidden_layers.

    Raises:
        CheckpointError: values of another kind.
    """
    layers, slides = config["num_hidden_layers"], is_set(keys.get("attention.sliding_window"))
    fields: dict[str, Any] = {
        "hidden_activation": _ACTIVATION,
        "query_pre_attn_scalar": _query_width(keys, config),
        "rope_local_base_freq": keys.number("rope.freq_base_swa", 10000.0),
        "sliding_window": keys.integer("attention.sliding_window") if slides else None,
        "layer_types": _layer_types(keys, layers) if slides else [_FULL] * layers,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }
    if is_set(keys.get("final_logit_softcapping")):
        fields["final_logit_softcapping"] = keys.number("final_logit_softcapping")
    return fields


def gemma2_keys(arch: Arch, _: ConfigReader) -> dict[str, Any]:
    """Keys of a model's windows and caps."""
    caps = {"attn_logit_softcapping": arch.attention_cap, "final_logit_softcapping": arch.logit_cap}
    return {**_window(arch), **{key: cap for key, cap in caps.items() if cap}}


def gemma3_keys(arch: Arch, _: ConfigReader) -> dict[str, Any]:
    """Keys of a model's windows, the base of RoPE within them, and the cap of its logits.

    llama.cpp reads of the layers that slide how many there are to one of full attention, and no list.
    """
    found = _window(arch)
    if found:
        local = next(rope for rope, window in zip(arch.ropes, arch.windows, strict=True) if window)
        assert local is not None
        full = [layer for layer, window in enumerate(arch.windows) if not window]
        found["rope.freq_base_swa"] = local["theta"]
        found["attention.sliding_window_pattern"] = full[0] + 1 if full else arch.num_layers + 1
    return found | ({"final_logit_softcapping": arch.logit_cap} if arch.logit_cap else {})


def _window(arch: Arch) -> dict[str, Any]:
    return {"attention.sliding_window": max(arch.windows)} if any(arch.windows) else {}


def _query_width(keys: Keys, config: Mapping[str, Any]) -> int:
    if config["num_hidden_layers"] == _LAYERS_OF_27B[keys.arch]:
        return int(config["hidden_size"] // config["num_attention_heads"])
    return int(config["head_dim"])


def _layer_types(keys: Keys, layers: int) -> list[str]:
    """Of each layer; the pattern is how many layers there are to one of full attention, or whether each one slides."""
    pattern = keys.get("attention.sliding_window_pattern")
    if not isinstance(pattern, np.ndarray):
        period = keys.integer("attention.sliding_window_pattern", _PATTERN)
        return [_SLIDING if (layer + 1) % period else _FULL for layer in range(layers)]
    if len(pattern) != layers:
        raise CheckpointError(
            f"{keys.where}: metadata {keys.arch}.attention.sliding_window_pattern: expected one value for each of "
            f"{layers} layers, found {len(pattern)}"
        )
    return [_SLIDING if slides else _FULL for slides in pattern]
