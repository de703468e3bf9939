"""The experts of a mixture, out of a config: how many there are, how wide, in which layers, and how they are chosen.

Source of the rules: transformers' configuration and router classes of each family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmctl.errors import CheckpointError
from llmctl.graph.config_reader import ConfigReader
from llmctl.graph.graph import Attr

MOST_EXPERTS = 4096
"""Experts a layer."""


@dataclass(frozen=True)
class Mixture:
    """A model's experts; sizes in elements.

    Attributes:
        count: of the experts a layer. chosen: of those, for every token.
        width: an expert's intermediate size; shared_width: that of the one that all tokens take, 0: there is none.
        layers: for each layer, whether it has experts.
        routing: attributes of its route ops.
    """

    count: int
    chosen: int
    width: int
    shared_width: int
    layers: tuple[bool, ...]
    routing: Mapping[str, Attr]


def read_mixture(reader: ConfigReader, layers: int) -> Mixture | None:
    """A model's experts; None for a family whose layers have one MLP each.

    Raises:
        CheckpointError: a key is missing or makes no sense.
    """
    facts = reader.family.experts
    if facts is None:
        return None
    count, chosen, width = (reader.size(key) for key in ("num_experts", "num_experts_per_tok", facts.width))
    if count > MOST_EXPERTS:
        raise CheckpointError(f"config.json: expected at most {MOST_EXPERTS} experts, found {count}")
    if chosen > count:
        raise CheckpointError(f"config.json: num_experts_per_tok: expected at most {count} experts, found {chosen}")
    return Mixture(
        count,
        chosen,
        width,
        _shared_width(reader, facts.shared, width),
        tuple(_has_experts(reader, facts.layers, layers)),
        {
            "top_k": chosen,
            "scores": facts.scores,
            "renormalise": reader.switch(facts.renormalise),
            **(_corrected(reader, count, chosen) if facts.corrected else {"scale": 1.0, "groups": 1, "top_groups": 1}),
        },
    )


def _shared_width(reader: ConfigReader, key: str, width: int) -> int:
    if not key:
        return 0
    return _whole(reader, key) * (width if key == "n_shared_experts" else 1)


def _has_experts(reader: ConfigReader, rule: str, layers: int) -> list[bool]:
    if rule == "all":
        return [True] * layers
    if rule == "after":
        first = _whole(reader, "first_k_dense_replace")
        return [i >= first for i in range(layers)]
    step, plain = reader.size("decoder_sparse_step"), reader.value("mlp_only_layers") or []
    if not isinstance(plain, list) or any(type(i) is not int for i in plain):
        raise CheckpointError(f"config.json: mlp_only_layers must be a list of layers, found {plain!r}")
    return [(i + 1) % step == 0 and i not in plain for i in range(layers)]


def _corrected(reader: ConfigReader, count: int, chosen: int) -> dict[str, Attr]:
    """The attributes that a correction bias comes with."""
    groups, top = reader.size("n_group"), reader.size("topk_group")
    if count % groups or count // groups < 2:
        raise CheckpointError(
            f"config.json: n_group: expected groups of two or more of {count} experts, found {groups}"
        )
    if top > groups or top * (count // groups) < chosen:
        raise CheckpointError(
            f"config.json: topk_group: expected up to {groups} groups that hold {chosen} experts, found {top}"
        )
    scale = reader.number("routed_scaling_factor")
    if not 0 < scale < float("inf"):
        raise CheckpointError(f"config.json: routed_scaling_factor must be a positive number, found {scale}")
    return {"scale": scale, "groups": groups, "top_groups": top}


def _whole(reader: ConfigReader, key: str) -> int:
    value: Any = reader.value(key)
    if type(value) is not int or value < 0:
        raise CheckpointError(f"config.json: {key} must be a whole number from 0 on, found {value!r}")
    return value
