"""Round to nearest: every weight to the closest point of its group's grid. Needs no calibration data."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.graph.graph import QuantScheme
from llmctl.quantize.grid import Grid, fit_grid, split_groups
from llmctl.quantize.grid_search import search_grid
from llmctl.quantize.stats import row_parts

_FINE_BITS = 8  # a range of so many steps loses nothing that a search could find
_FLOOR = 0.01  # importance of a weight of zero; that of one as large as its group's root mean square is 1 more
_LEAST = 1e-36


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
    return _nearest(fit_grid(groups, scheme.bits, scheme.symmetric, ratio), weight, scheme)


def quantize_searched(weight: Tensor, scheme: QuantScheme) -> QuantizedWeight:
    """Round to nearest on grids searched for the least error of the weights, the large ones of a group above all.

    Equal importance clips too much: large weights often meet large inputs. KL of SmolLM2-135M at 4 bits, group 64,
    asymmetric: 0.335 on grids that span the range, 0.375 with equal importance, 0.328 on these; symmetric: 0.460, 0.381
    on these.

    Raises:
        ValueError: the group size does not divide K.
    """
    if scheme.bits >= _FINE_BITS:
        return quantize_rtn(weight, scheme)
    parts = [weight[rows] for rows in row_parts(*weight.shape)]
    found = [search_grid(part, scheme, _importance(part, scheme.group_size)) for part in parts]
    grid = Grid(torch.cat([g.scales for g in found]), torch.cat([g.zeros for g in found]), scheme.bits)
    return _nearest(grid, weight, scheme)


def _importance(weight: Tensor, group_size: int) -> Tensor:
    """Of each weight of f32 ``[N, K]``, by its size in its group."""
    squares = split_groups(weight, group_size).square()
    squares.div_(squares.mean(dim=-1, keepdim=True).clamp_(min=_LEAST)).square_().add_(_FLOOR)
    return squares.reshape(weight.shape)


def _nearest(grid: Grid, weight: Tensor, scheme: QuantScheme) -> QuantizedWeight:
    """The codes are made by parts, as no copy of the weight is in memory."""
    groups = split_groups(weight, scheme.group_size)
    codes = torch.empty(groups.shape, dtype=torch.uint8, device=weight.device)
    for rows in row_parts(*weight.shape):
        codes[rows] = Grid(grid.scales[rows], grid.zeros[rows], grid.bits).encode(groups[rows])
    return assemble(grid, codes, scheme)


def assemble(grid: Grid, codes: Tensor, scheme: QuantScheme, g_idx: Tensor | None = None) -> QuantizedWeight:
    """A QuantizedWeight from a ``[N, G]`` grid and codes ``[N, G, group]`` or ``[N, K]``; ``g_idx`` i32 ``[K]``."""
    return QuantizedWeight(
        codes=codes.reshape(len(codes), -1).to(torch.uint8),
        scales=grid.scales.half(),
        zeros=grid.zeros.to(torch.uint8),
        scheme=replace(scheme, act_order=g_idx is not None),
        g_idx=g_idx,
    )
