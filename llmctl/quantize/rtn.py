"""Round to nearest: every weight to the closest point of its group's grid. Needs no calibration data."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.graph.graph import QuantScheme
from llmctl.quantize.grid import Grid, fit_grid, split_groups


def quantize_rtn(weight: Tensor, scheme: QuantScheme, ratio: Tensor | float = 1.0) -> QuantizedWeight:
    """Quantize a linear's weight.

    Args:
        weight: f32 ``[N, K]``.
        scheme: bits, group size, symmetry; columns belong to groups in order.
        ratio: clip ratio of the grids, a number or ``[N, G]``.

    Raises:
        ValueError: the group size does not divide K.
    """
    groups = split_groups(weight, scheme.group_size)
    grid = fit_grid(groups, scheme.bits, scheme.symmetric, ratio)
    return assemble(grid, grid.encode(groups), scheme)


def assemble(grid: Grid, codes: Tensor, scheme: QuantScheme, g_idx: Tensor | None = None) -> QuantizedWeight:
    """A QuantizedWeight from a ``[N, G]`` grid and codes ``[N, G, group]`` or ``[N, K]``; ``g_idx`` i32 ``[K]``."""
    return QuantizedWeight(
        codes=codes.reshape(len(codes), -1).to(torch.uint8),
        scales=grid.scales.half(),
        zeros=grid.zeros.to(torch.uint8),
        scheme=replace(scheme, act_order=g_idx is not None),
        g_idx=g_idx,
    )
