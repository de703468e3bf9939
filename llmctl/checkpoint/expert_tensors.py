"""Tensors that hold all experts of a layer, seen as one tensor an expert and projection, which is how most are stored.

Newer checkpoints may have ``experts.gate_up_proj`` [E, 2 F, H] and ``experts.down_proj`` [E, H, F]; Granite's are
called ``input_linear.weight`` and ``output_linear.weight``. Each expert's gate comes first, as a matrix [out, in].
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_FUSED = (
    (re.compile(r"(.+\.experts)\.(gate_up_proj|down_proj)"), ""),
    (re.compile(r"(.+\.block_sparse_moe)\.(input_linear|output_linear)\.weight"), ".experts"),
)
_PROJECTIONS = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "input_linear": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
    "output_linear": ("down_proj",),
}


@dataclass(frozen=True)
class ExpertSlice:
    """One expert's matrix in a tensor of all; ``rows``: half-open, of its second axis."""

    name: str
    expert: int
    rows: tuple[int, int]


def expert_slices(name: str, shape: Sequence[int]) -> Iterator[ExpertSlice]:
    """The matrices that a tensor holds; none of one that is not of all experts."""
    for pattern, below in _FUSED:
        found = pattern.fullmatch(name)
        if found is None or len(shape) != 3:
            continue
        roles = _PROJECTIONS[found[2]]
        rows = shape[1] // len(roles)
        if not rows or rows * len(roles) != shape[1]:
            return
        for expert in range(shape[0]):
            for i, role in enumerate(roles):
                yield ExpertSlice(f"{found[1]}{below}.{expert}.{role}.weight", expert, (i * rows, (i + 1) * rows))
