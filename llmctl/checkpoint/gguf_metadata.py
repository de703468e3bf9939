"""What a config.json says, as a GGUF file's metadata; the other way round is ``gguf_config.py``.

Whether a model came through whole is not believed but compared: ``check_same_model`` reads the metadata back.

Source: llama.cpp's convert_hf_to_gguf.py (which keys it writes).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmctl.checkpoint.gguf_config import ROPE_FREQS, llama3_factors, synthesise_config
from llmctl.errors import UsageError
from llmctl.graph.hf_config import Arch, read_arch

_OF_FAMILY = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
# Facts that do not change what is computed, or that the tensors say.
_NOT_COMPARED = ("family", "tied")


def architecture(arch: Arch) -> str:
    """GGUF's name of a model's architecture.

    Raises:
        UsageError: GGUF is not written for it.
    """
    name = _OF_FAMILY.get(arch.family.name)
    if name is None:
        raise UsageError(
            f"GGUF is not written for {arch.family.name} models; it is for {', '.join(sorted(_OF_FAMILY))}",
            fix="write another format",
            param="format",
        )
    return name


def model_metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    """``general.*`` and ``<architecture>.*`` of a config.json.

    Raises:
        UsageError: as ``architecture``; sliding windows, or a scaling of positions that GGUF's keys do not have.
    """
    arch = read_arch(config)
    name = architecture(arch)
    if any(arch.windows):
        raise UsageError("GGUF is not written for sliding-window attention", fix="write another format", param="format")
    return {
        "general.architecture": name,
        "general.quantization_version": 2,
        f"{name}.block_count": arch.num_layers,
        f"{name}.context_length": arch.max_position,
        f"{name}.embedding_length": arch.hidden_size,
        f"{name}.feed_forward_length": arch.intermediate_size,
        f"{name}.attention.head_count": arch.heads,
        f"{name}.attention.head_count_kv": arch.kv_heads,
        f"{name}.attention.key_length": arch.head_dim,
        f"{name}.attention.value_length": arch.head_dim,
        f"{name}.attention.layer_norm_rms_epsilon": arch.eps,
        f"{name}.vocab_size": arch.vocab_size,
        **{f"{name}.rope.{key}": value for key, value in _rope(arch).items()},
    }


def _rope(arch: Arch) -> dict[str, Any]:
    rope: Mapping[str, Any] = arch.ropes[0] or {}
    found: dict[str, Any] = {"dimension_count": arch.head_dim, "freq_base": rope["theta"]}
    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        found |= {"scaling.type": kind, "scaling.factor": rope["factor"]}
    if kind == "yarn":
        found["scaling.original_context_length"] = int(rope["original_max_position"])
    return found


def rope_factors(config: Mapping[str, Any]) -> NDArray[np.float32] | None:
    """Contents of ``rope_freqs.weight``, f32 [head_dim/2]: Llama 3's divisors; None where there are none."""
    arch = read_arch(config)
    rope: Mapping[str, Any] = arch.ropes[0] or {}
    if rope.get("rope_type") != "llama3":
        return None
    rule = {**rope, "original_max_position_embeddings": rope["original_max_position"]}
    return llama3_factors(rule, rope["theta"], arch.head_dim).astype(np.float32)


def check_same_model(
    config: Mapping[str, Any], metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """Hold the config that metadata are read as against the one they were made of.

    Args:
        shapes: of the model's tensors, by HF name.
        where: the checkpoint, for messages.

    Raises:
        UsageError: naming what GGUF's metadata do not carry.
    """
    factors = rope_factors(config)
    stored = {} if factors is None else {ROPE_FREQS: factors}
    made = synthesise_config(metadata, shapes, "float16", stored, where)
    before, after = read_arch(config), read_arch(made)
    for field in fields(Arch):
        was, found = getattr(before, field.name), getattr(after, field.name)
        if field.name not in _NOT_COMPARED and was != found:
            raise UsageError(
                f"GGUF cannot carry this model's {field.name.replace('_', ' ')}: {was} would be read as {found}",
                fix="write another format",
                param="format",
            )
