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

from llmctl.errors import CheckpointError, UnsupportedModelError
from llmctl.graph.family_table import ACTIVATIONS, FAMILIES, NEUTRAL, Family, Switch
from llmctl.graph.graph import Attr
from llmctl.graph.rope_config import rope_attrs

logger = logging.getLogger(__name__)

_MOST_LAYERS = 10_000

# Keys that say nothing about the forward pass of a causal language model at inference.
_METADATA = frozenset(
    """_attn_implementation _attn_implementation_autoset _name_or_path architectures attention_dropout attn_pdrop
    auto_map bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward compression_config
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype early_stopping embd_pdrop
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id gradient_checkpointing hidden_dropout id2label initializer_range is_decoder is_llama_config
    label2id length_penalty max_length min_length model_type n_ctx no_repeat_ngram_size num_beam_groups num_beams
    num_labels num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix
    problem_type pruned_heads quantization_config remove_invalid_values reorder_and_upcast_attn repetition_penalty
    resid_pdrop return_dict return_dict_in_generate sep_token_id suppress_tokens summary_activation
    summary_first_dropout summary_proj_to_labels summary_type summary_use_proj task_specific_params temperature
    tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config
    transformers_version typical_p use_bfloat16 use_cache use_return_dict""".split()
)


@dataclass(frozen=True)
class Arch:
    """One model's resolved facts; sizes in elements, ``windows`` per layer in tokens (0 = full attention)."""

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
    windows: tuple[int, ...]
    rope: Mapping[str, Attr] | None


def read_arch(config: Mapping[str, Any]) -> Arch:
    """The Arch a config describes.

    Raises:
        UnsupportedModelError: unknown family, or a setting that this version does not honour.
        CheckpointError: a required key is missing or makes no sense.
    """
    family = _family(config)
    _check_architecture(config, family)
    reader = _ConfigReader(config, family)
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
    partial = reader.value("partial_rotary_factor") if family.partial_rotary else None
    reader.seen |= {"partial_rotary_factor"} if family.partial_rotary else set()
    arch = Arch(
        family=family,
        vocab_size=reader.size("vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=reader.size("intermediate_size", 4 * hidden),
        max_position=max_position,
        eps=reader.number(family.eps_key),
        activation=_activation(reader),
        tied=bool(reader.value("tie_word_embeddings", False)),
        bias_qkv=reader.switch(family.bias_qkv),
        bias_o=reader.switch(family.bias_o),
        bias_mlp=reader.switch(family.bias_mlp),
        windows=_windows(reader, layers),
        rope=(
            rope_attrs(config, head_dim, max_position, partial, family.rope_types)
            if family.positions == "rope"
            else None
        ),
    )
    if family.positions == "rope":
        reader.seen |= {"rope_parameters", "rope_scaling", "rope_theta", "original_max_position_embeddings"}
        _check_rotary(arch)
    reader.check_rest()
    return arch


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


def _activation(reader: _ConfigReader) -> str:
    key = reader.family.act_key
    name = reader.value(key)
    if not isinstance(name, str) or name not in ACTIVATIONS:
        known = ", ".join(sorted(ACTIVATIONS))
        raise UnsupportedModelError(f"config.json: {key} '{name}' is not supported; known activations: {known}")
    return ACTIVATIONS[name]


def _check_rotary(arch: Arch) -> None:
    assert arch.rope is not None
    rotary = arch.rope["rotary_dim"]
    assert isinstance(rotary, int)
    if rotary <= 0 or rotary > arch.head_dim or rotary % 2:
        raise UnsupportedModelError(
            f"config.json: rotary dimension {rotary} of head_dim {arch.head_dim}: expected an even one"
        )


def _windows(reader: _ConfigReader, layers: int) -> tuple[int, ...]:
    """Sliding window of every layer; rules of transformers' configuration classes of each family."""
    types = reader.value("layer_types")
    if types is not None and not isinstance(types, list):
        raise CheckpointError(f"config.json: layer_types must be a list, found {types!r}")
    mode = reader.family.window
    if mode == "none":
        return _same_everywhere(types, 0, layers)
    window = reader.value("sliding_window")
    if mode == "all":
        return _same_everywhere(types, 0 if window is None else reader.size("sliding_window"), layers)
    use, first = reader.value("use_sliding_window"), reader.value("max_window_layers")
    if type(first) is not int:
        raise CheckpointError(f"config.json: max_window_layers must be a whole number, found {first!r}")
    size = reader.size("sliding_window") if use and window is not None else 0
    if types is None:
        return tuple(size if i >= first else 0 for i in range(layers))
    if len(types) != layers:
        raise CheckpointError(f"config.json: layer_types has {len(types)} entries for {layers} layers")
    return tuple(_layer_window(kind, size) for kind in types)


def _layer_window(kind: Any, size: int) -> int:
    if kind == "full_attention":
        return 0
    if kind == "sliding_attention" and size:
        return size
    if kind == "sliding_attention":
        raise CheckpointError("config.json: layer_types has sliding_attention but no sliding window is in use")
    raise UnsupportedModelError(f"config.json: layer_types entry '{kind}' is not supported")


def _same_everywhere(types: Any, window: int, layers: int) -> tuple[int, ...]:
    expected = "sliding_attention" if window else "full_attention"
    odd = [t for t in types or () if t != expected]
    if odd:
        raise UnsupportedModelError(f"config.json: layer_types entry '{odd[0]}' where every layer is {expected}")
    return (window,) * layers


class _ConfigReader:
    """Typed access to a config under a family's spellings and defaults; remembers which keys were read."""

    def __init__(self, config: Mapping[str, Any], family: Family) -> None:
        self.config = config
        self.family = family
        self.seen: set[str] = set()

    def value(self, key: str, default: Any = None) -> Any:
        key = self.family.keys.get(key, key)
        self.seen.add(key)
        return self.config.get(key, self.family.defaults.get(key, default))

    def size(self, key: str, default: int | None = None) -> int:
        value = self.value(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            name = self.family.keys.get(key, key)
            raise CheckpointError(f"config.json: {name} must be a positive integer, found {value!r}")
        return value

    def number(self, key: str) -> float:
        value = self.value(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(f"config.json: {key} must be a number, found {value!r}")
        return float(value)

    def switch(self, switch: Switch) -> bool:
        return bool(self.value(switch, False)) if isinstance(switch, str) else switch

    def check_rest(self) -> None:
        """Refuse every forward-pass key that was not read and is not neutral; name the unknown rest in the log."""
        rules = {**NEUTRAL, "partial_rotary_factor": (None, 1, 1.0), **self.family.neutral}
        for key, allowed in rules.items():
            if key in self.config and (key not in self.seen or key in self.family.neutral):
                value = self.config[key]
                if not any(value is a or (type(value) is type(a) and value == a) for a in allowed):
                    raise UnsupportedModelError(
                        f"config.json: {key}={value!r} is not supported for family '{self.family.name}'"
                    )
        unknown = sorted(k for k in self.config if k not in self.seen and k not in rules and k not in _METADATA)
        if unknown:
            logger.warning("config.json: keys not understood and ignored: %s", ", ".join(unknown))
