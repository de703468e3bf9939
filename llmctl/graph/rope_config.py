"""RoPE settings of an HF config, in transformers 4's and 5's spellings, as attributes of the rope op.

Source of the rules: transformers ``modeling_rope_utils`` (defaults, precedence, YaRN's attention factor).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from llmctl.errors import CheckpointError, UnsupportedModelError
from llmctl.graph.graph import Attr

_DEFAULT_THETA = 10_000.0
_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_FIELDS = {
    "default": set(),
    "dynamic": {"factor"},
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        "factor",
        "beta_fast",
        "beta_slow",
        "original_max_position_embeddings",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
    "longrope": {"factor", "short_factor", "long_factor", "original_max_position_embeddings", "attention_factor"},
}
ROPE_TYPES = tuple(_FIELDS)
FULL, SLIDING = "full_attention", "sliding_attention"
"""Entries of ``layer_types``."""
# Written by transformers into every kind of rope_parameters of long-context models; default, linear and dynamic do
# not read it.
_HARMLESS = {"original_max_position_embeddings"}


def rope_attrs(
    config: Mapping[str, Any],
    head_dim: int,
    max_position: int,
    partial_default: float | None = None,
    types: Sequence[str] = ROPE_TYPES,
    *,
    style: str = "neox",
    layer_type: str = "",
    harmless: frozenset[str] = frozenset(),
) -> dict[str, Attr]:
    """Attributes ``rotary_dim, theta, style, rope_type`` and the fields of that type; of ``longrope`` those of the
    short factors, which ``context_limit`` keeps to.

    ``dynamic`` is the default up to ``max_position``, behind which nothing runs here.

    Args:
        partial_default: share of head_dim that is rotated unless ``rope_parameters`` says so; None = the family rotates
            all of it and a ``partial_rotary_factor`` other than 1 is refused.
        types: those of ``ROPE_TYPES`` that the family has.
        style: see ``Family.rope_style``.
        layer_type: the layer's of ``layer_types``, for a family whose ``rope_parameters`` may be by these.
        harmless: fields that somebody else honours.

    Raises:
        UnsupportedModelError: a rope type or field that this version does not honour.
        CheckpointError: a needed field is missing or not a number.
    """
    params = _parameters(config, layer_type)
    rope_type = rope_type_of(params)
    if rope_type not in types:
        known = ", ".join(types)
        raise UnsupportedModelError(f"config.json: rope_type '{rope_type}' is not supported; supported: {known}")
    known_fields = _FIELDS[rope_type] | _COMMON | _HARMLESS | harmless
    unknown = sorted(k for k, v in params.items() if v is not None and k not in known_fields)
    if unknown:
        raise UnsupportedModelError(f"config.json: '{unknown[0]}' is not supported for rope_type '{rope_type}'")
    share = params.get("partial_rotary_factor")
    share = (1.0 if partial_default is None else partial_default) if share is None else share
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < math.inf:
        raise CheckpointError(f"config.json: partial_rotary_factor must be a positive number, found {share!r}")
    if partial_default is None and share != 1:
        raise UnsupportedModelError(f"config.json: partial_rotary_factor={share} is not supported for this family")
    attrs: dict[str, Attr] = {
        "rotary_dim": int(head_dim * share),
        "theta": _number(params, "rope_theta", _DEFAULT_THETA),
        "style": style,
        "rope_type": "default" if rope_type == "dynamic" else rope_type,
    }
    if rope_type == "longrope":
        return {**attrs, **_longrope(params, config, max_position, int(head_dim * share) // 2)}
    return {**attrs, **_scaling(rope_type, params, config, max_position)}


def rope_type_of(params: Mapping[str, Any]) -> Any:
    """What RoPE's parameters name, Phi-3's first name for ``longrope`` included; nothing is ``default``."""
    found = params.get("rope_type") or params.get("type") or "default"
    return "longrope" if found == "su" else found


def original_length(params: Mapping[str, Any], config: Mapping[str, Any]) -> int | None:
    """Positions that a model whose context was extended was trained with first; None: nobody says.

    Raises:
        CheckpointError: no positive integer.
    """
    found = config.get("original_max_position_embeddings") or params.get("original_max_position_embeddings")
    if found is not None and (isinstance(found, bool) or not isinstance(found, int) or found <= 0):
        raise CheckpointError(
            f"config.json: original_max_position_embeddings must be a positive integer, found {found!r}"
        )
    return found


def _longrope(params: Mapping[str, Any], config: Mapping[str, Any], max_position: int, pairs: int) -> dict[str, Attr]:
    factors = params.get("short_factor")
    if not isinstance(factors, list) or len(factors) != pairs:
        raise CheckpointError(f"config.json: RoPE's short_factor must be a list of {pairs} numbers")
    original = original_length(params, config) or max_position
    factor = _number(params, "factor", max_position / original)
    default = 1.0 if factor <= 1 or original == 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return {
        "factors": tuple(_number({"short_factor": value}, "short_factor") for value in factors),
        "attention_factor": _number(params, "attention_factor", default),
    }


def _parameters(config: Mapping[str, Any], layer_type: str) -> dict[str, Any]:
    source = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(source, Mapping):
        raise CheckpointError(f"config.json: rope_parameters must be an object, found {source!r}")
    if any(isinstance(v, Mapping) for v in source.values()):
        if not layer_type:
            raise UnsupportedModelError("config.json: rope_parameters per layer type are not supported for this family")
        source = source.get(layer_type) or {}
        if not isinstance(source, Mapping):
            raise CheckpointError(f"config.json: rope_parameters.{layer_type} must be an object, found {source!r}")
    elif layer_type == SLIDING:
        source = {}
    params = dict(source)
    if params.get("rope_theta") is None:
        params["rope_theta"] = config.get("rope_theta")
    return params


def _scaling(
    rope_type: str, params: Mapping[str, Any], config: Mapping[str, Any], max_position: int
) -> dict[str, Attr]:
    if rope_type in ("default", "dynamic"):
        return {}
    if rope_type == "linear":
        return {"factor": _number(params, "factor")}
    original = config.get("original_max_position_embeddings") or params.get("original_max_position_embeddings")
    original = _number(
        {"original_max_position_embeddings": original or max_position}, "original_max_position_embeddings"
    )
    if rope_type == "llama3":
        return {
            "factor": _number(params, "factor"),
            "low_freq_factor": _number(params, "low_freq_factor"),
            "high_freq_factor": _number(params, "high_freq_factor"),
            "original_max_position": original,
        }
    factor = _number(params, "factor", max_position / original)
    return {
        "factor": factor,
        "beta_fast": _number(params, "beta_fast", 32.0),
        "beta_slow": _number(params, "beta_slow", 1.0),
        "original_max_position": original,
        "attention_factor": _yarn_attention_factor(params, factor),
        "truncate": bool(params.get("truncate", True)),
    }


def _yarn_attention_factor(params: Mapping[str, Any], factor: float) -> float:
    given, mscale, all_dim = (params.get(k) for k in ("attention_factor", "mscale", "mscale_all_dim"))
    if given is not None:
        return _number(params, "attention_factor")
    if mscale and all_dim:
        return _mscale(factor, mscale) / _mscale(factor, all_dim)
    return _mscale(factor, 1.0)


def _mscale(scale: float, mscale: float) -> float:
    return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0


def _number(params: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = params.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise CheckpointError(f"config.json: RoPE's {key} must be a positive number, found {value!r}")
    return float(value)
