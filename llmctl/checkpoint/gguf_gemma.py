"""What Gemma 3's config.json says beyond the other families', from a GGUF file's metadata.

Sources: convert_hf_to_gguf.py's Gemma3Model, llama.cpp's models/gemma3.cpp (for what the file leaves out) and
transformers' Gemma3TextConfig.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from llmctl.checkpoint.gguf_keys import Keys, is_set
from llmctl.errors import CheckpointError

_FULL, _SLIDING = "full_attention", "sliding_attention"
_PATTERN = 6
"""Every sixth layer attends to all tokens."""
_LAYERS_OF_27B = 62


def gemma3_fields(keys: Keys, config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of Gemma3TextConfig.

    Args:
        config: what is known already: head_dim, hidden_size, num_attention_heads, num_hidden_layers.

    Raises:
        CheckpointError: values of another kind.
    """
    layers, slides = config["num_hidden_layers"], is_set(keys.get("attention.sliding_window"))
    # The 27B model alone scales its queries by something else than the width of its heads.
    wide = config["hidden_size"] // config["num_attention_heads"]
    fields: dict[str, Any] = {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": wide if layers == _LAYERS_OF_27B else config["head_dim"],
        "rope_local_base_freq": keys.number("rope.freq_base_swa", 10000.0),
        "sliding_window": keys.integer("attention.sliding_window") if slides else None,
        "layer_types": _layer_types(keys, layers) if slides else [_FULL] * layers,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }
    if is_set(keys.get("final_logit_softcapping")):
        fields["final_logit_softcapping"] = keys.number("final_logit_softcapping")
    return fields


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
