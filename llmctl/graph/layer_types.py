"""What differs from layer to layer, out of a config: sliding windows and rotary embeddings.

Source of the rules: transformers' configuration class of each family.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from llmctl.errors import CheckpointError, UnsupportedModelError
from llmctl.graph.config_reader import ConfigReader
from llmctl.graph.graph import Attr
from llmctl.graph.rope_config import FULL, SLIDING, original_length, rope_attrs, rope_type_of

logger = logging.getLogger(__name__)

_QUERY_SCALE = "llama_4_scaling_beta"
_ROPE_KEYS = {"rope_parameters", "rope_scaling", "original_max_position_embeddings"}


def layer_windows(reader: ConfigReader, layers: int) -> tuple[int, ...]:
    """Sliding window of every layer, tokens; 0 is full attention.

    Raises:
        UnsupportedModelError: a layer of another type than the family has.
        CheckpointError: a key that makes no sense.
    """
    types = reader.value("layer_types")
    if types is not None and not isinstance(types, list):
        raise CheckpointError(f"config.json: layer_types must be a list, found {types!r}")
    mode = reader.family.window
    if mode == "none":
        return _same_everywhere(types, 0, layers)
    window = reader.value("sliding_window")
    if mode in ("all", "switched"):
        on = mode == "all" or bool(reader.value("use_sliding_window"))
        return _same_everywhere(types, reader.size("sliding_window") if on and window is not None else 0, layers)
    if mode == "typed":
        return _typed_windows(reader, types, layers)
    use, first = reader.value("use_sliding_window"), reader.value("max_window_layers")
    if type(first) is not int:
        raise CheckpointError(f"config.json: max_window_layers must be a whole number, found {first!r}")
    size = reader.size("sliding_window") if use and window is not None else 0
    if types is None:
        return tuple(size if i >= first else 0 for i in range(layers))
    return _listed_windows(types, size, layers)


def _typed_windows(reader: ConfigReader, types: list[Any] | None, layers: int) -> tuple[int, ...]:
    size = 0 if reader.value("sliding_window") is None else reader.size("sliding_window")
    pattern = reader.value("sliding_window_pattern")
    if types is not None:
        return _listed_windows(types, size, layers)
    if not size and not reader.family.local_theta:
        return (0,) * layers
    size = reader.size("sliding_window")  # without one a layer that slides would still have RoPE's other base
    if type(pattern) is not int or pattern <= 0:
        raise CheckpointError(f"config.json: sliding_window_pattern must be a positive integer, found {pattern!r}")
    return tuple(0 if (i + 1) % pattern == 0 else size for i in range(layers))


def _listed_windows(types: list[Any], size: int, layers: int) -> tuple[int, ...]:
    if len(types) != layers:
        raise CheckpointError(f"config.json: layer_types has {len(types)} entries for {layers} layers")
    return tuple(_layer_window(kind, size) for kind in types)


def _layer_window(kind: Any, size: int) -> int:
    if kind == FULL:
        return 0
    if kind == SLIDING and size:
        return size
    if kind == SLIDING:
        raise CheckpointError("config.json: layer_types has sliding_attention but no sliding window is in use")
    raise UnsupportedModelError(f"config.json: layer_types entry '{kind}' is not supported")


def _same_everywhere(types: Any, window: int, layers: int) -> tuple[int, ...]:
    expected = SLIDING if window else FULL
    odd = [t for t in types or () if t != expected]
    if odd:
        raise UnsupportedModelError(f"config.json: layer_types entry '{odd[0]}' where every layer is {expected}")
    return (window,) * layers


def layer_ropes(
    reader: ConfigReader, windows: tuple[int, ...], head_dim: int, max_position: int
) -> tuple[Mapping[str, Attr] | None, ...]:
    """Of every layer, what its rope op says (see ``rope_attrs``); None where q and k are not turned.

    Raises:
        UnsupportedModelError: as ``rope_attrs``; heads that cannot be turned in pairs.
        CheckpointError: a key that makes no sense.
    """
    family = reader.family
    if family.positions != "rope":
        return (None,) * len(windows)
    partial = reader.value("partial_rotary_factor") if family.partial_rotary else None
    theta = reader.value("rope_theta")
    local = reader.value(family.local_theta) if family.local_theta else theta
    reader.seen |= _ROPE_KEYS
    harmless = frozenset({_QUERY_SCALE, "max_position_embeddings"}) if family.query_scale else frozenset()
    made: dict[str, dict[str, Attr]] = {}
    for kind in {_kind(window) for window in windows}:
        config = {**reader.config, "rope_theta": local if kind == SLIDING else theta}
        made[kind] = rope_attrs(
            config, head_dim, max_position, partial, family.rope_types, style=family.rope_style,
            layer_type=kind if family.local_theta else "", harmless=harmless,
        )  # fmt: skip
        _check_rotary(made[kind], head_dim)
    turned = _turned(reader, windows)
    return tuple(made[_kind(window)] if turns else None for window, turns in zip(windows, turned, strict=True))


def _kind(window: int) -> str:
    return SLIDING if window else FULL


def _turned(reader: ConfigReader, windows: tuple[int, ...]) -> list[bool]:
    mode = reader.family.rope_layers
    if mode == "all" or (mode == "sliding_if_any" and reader.value("sliding_window") is None):
        return [True] * len(windows)
    if mode != "listed":
        return [window > 0 for window in windows]
    listed, interval = reader.value("no_rope_layers"), reader.value("no_rope_layer_interval")
    if listed is None:
        if type(interval) is not int or interval <= 0:
            raise CheckpointError(f"config.json: no_rope_layer_interval must be a positive integer, found {interval!r}")
        return [(i + 1) % interval != 0 for i in range(len(windows))]
    if not isinstance(listed, list) or len(listed) < len(windows) or any(turns not in (0, 1) for turns in listed):
        raise CheckpointError(
            f"config.json: no_rope_layers must be a list of 0 or 1 for each of {len(windows)} layers, found {listed!r}"
        )
    return [bool(turns) for turns in listed[: len(windows)]]


def _check_rotary(rope: Mapping[str, Attr], head_dim: int) -> None:
    rotary = rope["rotary_dim"]
    assert isinstance(rotary, int)
    if rotary <= 0 or rotary > head_dim or rotary % 2:
        raise UnsupportedModelError(
            f"config.json: rotary dimension {rotary} of head_dim {head_dim}: expected an even one"
        )


def context_limit(reader: ConfigReader, max_position: int) -> int:
    """Positions from 0 on that are computed as the model was trained: all, unless its queries grow (see
    ``Family.query_scale``) or RoPE has other factors for long contexts (``longrope``); the log says where that starts.

    Raises:
        CheckpointError: no number of positions where one is needed.
    """
    source = reader.config.get("rope_scaling") or reader.config.get("rope_parameters")
    if not isinstance(source, Mapping):
        return max_position
    by_type = [params for params in source.values() if isinstance(params, Mapping)]
    return min(_limit_of(reader, params, max_position) for params in by_type or [source])


def _limit_of(reader: ConfigReader, params: Mapping[str, Any], max_position: int) -> int:
    if reader.family.query_scale and params.get(_QUERY_SCALE):
        what = f"{_QUERY_SCALE}, which scales queries"
    elif rope_type_of(params) == "longrope":
        what = "RoPE's long_factor, which holds for contexts"
    else:
        return max_position
    limit = original_length(params, reader.config)
    if limit is None:
        raise CheckpointError("config.json: original_max_position_embeddings must be a positive integer, found None")
    if limit < max_position:
        logger.warning(
            "config.json: not computed: %s from position %d on; contexts are of up to %d tokens, not %d",
            what, limit, limit, max_position,
        )  # fmt: skip
    return min(limit, max_position)
