"""Reads an HF ``config.json`` against a family's row into an ``Arch``: every number the builder needs, checked.

Spellings of transformers 4 (``rope_theta``, ``rope_scaling``, ``torch_dtype``) and 5 (``rope_parameters``, ``dtype``)
are both understood. A key that would change the forward pass and is not honoured is refused.
"""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmctl.errors import CheckpointError, LlmctlError, UnsupportedModelError
from llmctl.graph.config_keys import ACTIVATIONS
from llmctl.graph.config_reader import ConfigReader
from llmctl.graph.family import Family
from llmctl.graph.family_table import FAMILIES
from llmctl.graph.graph import Attr
from llmctl.graph.layer_types import context_limit, layer_ropes, layer_windows
from llmctl.graph.mixture_config import Mixture, read_mixture

logger = logging.getLogger(__name__)

_MOST_LAYERS = 10_000


@dataclass(frozen=True)
class Arch:
    """One model's resolved facts; sizes in elements.

    Attributes:
        eps: of the norms. The residual stream is 1 / ``residual_multiplier`` of what the family's papers call so: no
            branch is scaled before it is added, and the norms' epsilon makes up for it.
        windows: per layer in tokens, 0 is full attention. ropes: per layer, None: no rotary embedding.
        embed_scale: what embeddings are multiplied by.
        attention_scale, attention_cap: of the scores; a cap of 0 is none.
        logit_scale, logit_cap: of the logits, likewise.
        mixture: experts, None: each layer has one MLP.
    """

    family: Family
    vocab_size: int
    hidden_size: int
    num_layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    max_position: int
    eps: float
    activation: str
    tied: bool
    bias_qkv: bool
    bias_o: bool
    bias_mlp: bool
    parallel: bool
    qk_normed: bool
    windows: tuple[int, ...]
    ropes: tuple[Mapping[str, Attr] | None, ...]
    embed_scale: float
    attention_scale: float
    attention_cap: float
    logit_scale: float
    logit_cap: float
    mixture: Mixture | None


def read_arch(config: Mapping[str, Any]) -> Arch:
    """The Arch a config describes.

    Raises:
        UnsupportedModelError: unknown family, or a setting that this version does not honour.
        CheckpointError: a required key is missing or makes no sense.
    """
    arch, unknown = _read_arch(config)
    if unknown:
        logger.warning("config.json: keys not understood and ignored: %s", ", ".join(unknown))
    return arch


def is_whole(config: Mapping[str, Any]) -> bool:
    """Whether ``read_arch`` takes the config and understands every key of it."""
    try:
        return not _read_arch(config)[1]
    except LlmctlError:
        return False


def config_as(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The config with ``family`` in place of what it says of its architecture, code of its own included."""
    kept = {key: value for key, value in config.items() if key != "auto_map"}
    return {**kept, "model_type": family.name, "architectures": [family.architectures[0]]}


def _read_arch(config: Mapping[str, Any]) -> tuple[Arch, list[str]]:
    """The Arch, and the keys of which nothing is known."""
    family = _family(config)
    _check_architecture(config, family)
    reader = ConfigReader(config, family)
    hidden, heads = reader.size("hidden_size"), reader.size("num_attention_heads")
    kv_heads = reader.size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise CheckpointError(f"config.json: {heads} attention heads are not a multiple of {kv_heads} key/value heads")
    if reader.value("head_dim") is None and hidden % heads:
        raise CheckpointError(f"config.json: hidden_size {hidden} is not a multiple of {heads} attention heads")
    head_dim = reader.size("head_dim", hidden // heads)
    layers, max_position = reader.size("num_hidden_layers"), reader.size("max_position_embeddings")
    if layers > _MOST_LAYERS:
        raise CheckpointError(f"config.json: expected at most {_MOST_LAYERS} layers, found {layers}")
    windows = layer_windows(reader, layers)
    residual = reader.factor("residual_multiplier")
    arch = Arch(
        family=family,
        vocab_size=reader.size("vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=reader.size("intermediate_size", 4 * hidden),
        max_position=context_limit(reader, max_position),
        eps=reader.number(family.eps_key) / residual**2,
        activation=_activation(reader),
        tied=bool(reader.value("tie_word_embeddings", False)),
        bias_qkv=reader.switch(family.bias_qkv),
        bias_o=reader.switch(family.bias_o),
        bias_mlp=reader.switch(family.bias_mlp),
        parallel=reader.switch(family.parallel),
        qk_normed=family.qk_norm != "none" and reader.switch(family.qk_normed),
        windows=windows,
        ropes=layer_ropes(reader, windows, head_dim, max_position),
        embed_scale=reader.factor("embedding_multiplier") * (hidden**0.5 if family.sqrt_embed else 1.0) / residual,
        attention_scale=_attention_scale(reader, head_dim),
        attention_cap=reader.cap("attn_logit_softcapping"),
        logit_scale=reader.factor("logit_scale") / reader.factor("logits_scaling"),
        logit_cap=reader.cap("final_logit_softcapping"),
        mixture=read_mixture(reader, layers),
    )
    return arch, reader.check_rest()


def _attention_scale(reader: ConfigReader, head_dim: int) -> float:
    if "attention_multiplier" in reader.family.factors:
        return reader.factor("attention_multiplier")
    if "query_pre_attn_scalar" in reader.family.factors:
        return reader.factor("query_pre_attn_scalar") ** -0.5
    return float(head_dim**-0.5)


def _family(config: Mapping[str, Any]) -> Family:
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        raise UnsupportedModelError(f"config.json: model_type '{model_type}' is not supported; known families: {known}")
    return family


def architectures(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The classes that ``config.json`` names; none when it leaves them out.

    Raises:
        CheckpointError: not a list of names.
    """
    found = config.get("architectures")
    if found is None:
        return ()
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise CheckpointError(f"config.json: architectures must be a list of class names, found {reprlib.repr(found)}")
    return tuple(found)


def _check_architecture(config: Mapping[str, Any], family: Family) -> None:
    """Refuse another head on the same layers, and code that comes with the weights and is not run."""
    remote = config.get("auto_map")
    odd = [name for name in architectures(config) if name not in family.architectures]
    if odd:
        code = ": its code (auto_map) is not run" if remote else ""
        raise UnsupportedModelError(
            f"config.json: architecture '{odd[0]}' is not read{code}; of model_type '{family.name}' "
            f"known: {', '.join(family.architectures)}"
        )
    if remote:
        logger.warning(
            "config.json: auto_map: code that comes with a checkpoint is not run; read as %s", family.architectures[0]
        )


def _activation(reader: ConfigReader) -> str:
    key = reader.family.act_key
    name = reader.value(key) or reader.family.defaults.get(key)
    if not isinstance(name, str) or name not in ACTIVATIONS:
        known = ", ".join(sorted(ACTIVATIONS))
        raise UnsupportedModelError(f"config.json: {key} '{name}' is not supported; known activations: {known}")
    return ACTIVATIONS[name]
