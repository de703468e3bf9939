"""What Phi-3's config.json says beyond the other families', from a GGUF file's metadata, and there.

Sources: convert_hf_to_gguf.py's Phi3MiniModel and transformers' Phi3Config. The factors of longrope are tensors, which
``gguf_config`` reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmctl.checkpoint.gguf_keys import Keys, is_set
from llmctl.graph.config_reader import ConfigReader
from llmctl.graph.hf_config import Arch


def phi3_fields(keys: Keys, config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of Phi3Config.

    Args:
        config: what is known already: head_dim.

    Raises:
        CheckpointError: values of another kind.
    """
    slides = is_set(keys.get("attention.sliding_window"))
    turned = keys.integer("rope.dimension_count", config["head_dim"])
    return {
        "sliding_window": keys.integer("attention.sliding_window") if slides else None,
        "partial_rotary_factor": turned / config["head_dim"],
    }


def phi3_keys(arch: Arch, _: ConfigReader) -> dict[str, Any]:
    """The key of a model's window; how much of a head is turned is said of every family."""
    return {"attention.sliding_window": arch.windows[0]} if arch.windows[0] else {}
