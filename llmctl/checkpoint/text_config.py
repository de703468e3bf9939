"""The text model inside a multimodal model's ``config.json``, as a config.json of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from llmctl.checkpoint.hf_folder import QUANTIZATION_KEYS
from llmctl.errors import CheckpointError, UnsupportedModelError
from llmctl.graph.family_table import FAMILIES
from llmctl.graph.hf_config import architectures

# Said once for the whole model, outside text_config.
_OF_THE_WHOLE = (*QUANTIZATION_KEYS, "auto_map")
# Said on either level; the text model's own wins.
_ON_EITHER = ("dtype", "torch_dtype", "eos_token_id", "bos_token_id", "pad_token_id")
_GENERATES = re.compile(r"For(ConditionalGeneration|CausalLM)$|Model$")


def is_multimodal(config: Mapping[str, Any]) -> bool:
    """Whether ``config.json`` describes a text model among others."""
    return config.get("text_config") is not None


def text_model_config(config: dict[str, Any], where: str) -> dict[str, Any]:
    """``config.json`` of the text model alone; that of a text model is returned as it is.

    Args:
        where: the file, for messages.

    Raises:
        UnsupportedModelError: the whole is made for something else than writing text.
        CheckpointError: a ``text_config`` that is no object, or does not say its ``model_type``.
    """
    if not is_multimodal(config):
        return config
    text = config["text_config"]
    if not isinstance(text, dict) or not isinstance(text.get("model_type"), str):
        raise CheckpointError(f"{where}: text_config: expected an object with a model_type")
    for name in architectures(config):
        if not _GENERATES.search(name):
            raise UnsupportedModelError(f"{where}: architecture '{name}' does not generate text")
    family = FAMILIES.get(text["model_type"])
    merged = {
        **{key: config[key] for key in _ON_EITHER if config.get(key) is not None},
        **({} if family is None else {"architectures": [family.architectures[0]]}),
        **{key: value for key, value in text.items() if value is not None or key not in _ON_EITHER},
        **{key: config[key] for key in _OF_THE_WHOLE if key in config},
    }
    if config.get("tie_word_embeddings"):
        merged["tie_word_embeddings"] = True
    return merged
