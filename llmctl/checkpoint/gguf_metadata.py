"""What a config.json says, as a GGUF file's metadata; the other way round is ``gguf_config.py``.

Whether a model came through whole is not believed but compared: ``check_same_model`` reads the metadata back.

Source: llama.cpp's convert_hf_to_gguf.py (which keys it writes).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmctl.checkpoint.gguf_config import ROPE_FREQS, ROPE_LONG, ROPE_SHORT, llama3_factors, synthesise_config
from llmctl.checkpoint.gguf_families import ARCHITECTURES, ROW_OF_FAMILY, gguf_architecture
from llmctl.errors import UsageError
from llmctl.graph.config_reader import ConfigReader
from llmctl.graph.graph import Attr
from llmctl.graph.hf_config import Arch, read_arch
from llmctl.graph.rope_config import original_length

# Facts that do not change what is computed, or that the tensors say.
_NOT_COMPARED = ("family", "tied")


def row_of_model(arch: Arch) -> str:
    """The row of ``ARCHITECTURES`` as which a model is written.

    Raises:
        UsageError: GGUF is not written for it.
    """
    row = ROW_OF_FAMILY.get(arch.family.name)
    if row is None:
        known = ", ".join(sorted(ROW_OF_FAMILY))
        raise _refused(f"GGUF is not written for {arch.family.name} models; it is for {known}")
    return row


def model_metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    """``general.*`` and ``<architecture>.*`` of a config.json.

    Raises:
        UsageError: as ``row_of_model``; sliding windows of an architecture that has none.
    """
    arch = read_arch(config)
    row, reader = row_of_model(arch), ConfigReader(config, arch.family)
    if any(arch.windows) and not ARCHITECTURES[row].windows:
        raise _refused(f"GGUF is not written for sliding-window attention of {arch.family.name} models")
    keys = {
        "block_count": arch.num_layers,
        "context_length": reader.size("max_position_embeddings"),
        "embedding_length": arch.hidden_size,
        "feed_forward_length": arch.intermediate_size,
        "attention.head_count": arch.heads,
        "attention.head_count_kv": arch.kv_heads,
        "attention.key_length": arch.head_dim,
        "attention.value_length": arch.head_dim,
        "attention.layer_norm_rms_epsilon": reader.number(arch.family.eps_key),
        "vocab_size": arch.vocab_size,
        **{f"rope.{key}": value for key, value in _rope(arch, config).items()},
        **ARCHITECTURES[row].keys(arch, reader),
    }
    name = gguf_architecture(row)
    return {
        "general.architecture": name,
        "general.quantization_version": 2,
        **{f"{name}.{key}": value for key, value in keys.items()},
    }


def _refused(what: str) -> UsageError:
    return UsageError(what, fix="write another format", param="format")


def _main_rope(arch: Arch) -> Mapping[str, Attr]:
    """What the layers of full attention say of RoPE, which GGUF's keys without more are about."""
    found = [(bool(window), rope) for window, rope in zip(arch.windows, arch.ropes, strict=True) if rope is not None]
    return min(found, key=lambda item: item[0])[1] if found else {}


def _rope(arch: Arch, config: Mapping[str, Any]) -> dict[str, Any]:
    rope = _main_rope(arch)
    if not rope:
        raise _refused("GGUF is not written for a model no layer of which has a rotary embedding")
    found: dict[str, Any] = {"dimension_count": rope["rotary_dim"], "freq_base": rope["theta"]}
    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        found |= {"scaling.type": kind, "scaling.factor": rope["factor"]}
    if kind == "yarn":
        found["scaling.original_context_length"] = int(_number(rope["original_max_position"]))
    if kind == "longrope":
        original = original_length(_rope_parameters(config), config)
        found["scaling.original_context_length"] = original or arch.max_position
        found["scaling.attn_factor"] = rope["attention_factor"]
    return found


def _number(value: Attr) -> float:
    assert isinstance(value, int | float)
    return value


def _rope_parameters(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config.get("rope_scaling") or config.get("rope_parameters") or {}


def rope_tensors(config: Mapping[str, Any]) -> dict[str, NDArray[np.float32]]:
    """Divisors of the rotary frequencies that a file has as tensors, f32 [rotary_dim/2]: Llama 3's, or longrope's.

    Raises:
        UsageError: longrope without factors for long contexts.
    """
    arch = read_arch(config)
    rope = _main_rope(arch)
    if rope.get("rope_type") == "llama3":
        rule = {**rope, "original_max_position_embeddings": rope["original_max_position"]}
        return {ROPE_FREQS: llama3_factors(rule, _number(rope["theta"]), arch.head_dim).astype(np.float32)}
    if rope.get("rope_type") != "longrope":
        return {}
    short, long = (_rope_parameters(config).get(name) for name in ("short_factor", "long_factor"))
    if not isinstance(short, list) or not isinstance(long, list) or len(long) != len(short):
        raise _refused(f"GGUF needs as many factors of long_factor as of short_factor, found {long!r:.40}")
    return {ROPE_LONG: np.array(long, np.float32), ROPE_SHORT: np.array(short, np.float32)}


def check_same_model(
    config: Mapping[str, Any], metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """Hold the config that metadata are read as against the one they were made of, in float32, which is what a file
    has.

    Args:
        shapes: of the model's tensors, by HF name.
        where: the checkpoint, for messages.

    Raises:
        UsageError: naming what GGUF's metadata do not carry.
    """
    made = synthesise_config(metadata, shapes, "float16", rope_tensors(config), where)
    before, after = read_arch(config), read_arch(made)
    for field in fields(Arch):
        was, found = getattr(before, field.name), getattr(after, field.name)
        if field.name not in _NOT_COMPARED and _in_float32(was) != _in_float32(found):
            was, found = _difference(_in_float32(was), _in_float32(found))
            raise _refused(
                f"GGUF cannot carry this model's {field.name.replace('_', ' ')}: {was} would be read as {found}"
            )


def _in_float32(value: Any) -> Any:
    """A fact with its floats as shortest decimals of float32; of a dataclass its fields."""
    if isinstance(value, float):
        return float(str(np.float32(value)))
    if isinstance(value, tuple):
        return tuple(map(_in_float32, value))
    value = vars(value) if is_dataclass(value) else value
    return {key: _in_float32(one) for key, one in value.items()} if isinstance(value, Mapping) else value


def _difference(was: Any, found: Any) -> tuple[Any, Any]:
    """Of two facts that differ what does: the first of two tuples, what is said otherwise of two mappings."""
    if isinstance(was, tuple) and isinstance(found, tuple) and len(was) == len(found):
        return next(_difference(a, b) for a, b in zip(was, found, strict=True) if a != b)
    if isinstance(was, Mapping) and isinstance(found, Mapping):
        odd = [key for key in {**was, **found} if was.get(key) != found.get(key)]
        return {key: was.get(key) for key in odd}, {key: found.get(key) for key in odd}
    return was, found
