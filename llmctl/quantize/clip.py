"""Clip search: narrower grids that lose the largest weights of a group but place the others better.

Part of AWQ (Lin et al., 2023).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmctl.graph.graph import QuantScheme
from llmctl.quantize.grid import fit_grid, grid_over, group_range, split_groups
from llmctl.quantize.stats import gram_blocks, group_errors, output_errors, row_parts

_PART = 1 << 18  # weights whose groups are searched at once: what the trials go through stays in a core's cache


def search_clip(weight: Tensor, gram: Tensor, scheme: QuantScheme, steps: int = 10, max_shrink: float = 0.5) -> Tensor:
    """Clip ratio of each group, f32 ``[N, G]``, with the least output error under round-to-nearest.

    Groups are searched on their own part of the error; a row keeps its clipping only if the error of the whole row,
    cross terms included, falls. So no row's measured error ever rises.

    Args:
        weight: f32 ``[N, K]``. gram: ``[K, K]`` of the inputs.
        steps: ratios tried, from 1 down to ``1 - max_shrink``.
    """
    gram = gram.float()
    blocks = gram_blocks(gram, scheme.group_size)
    ratios = [1 - max_shrink * step / steps for step in range(steps + 1)]
    parts = (split_groups(weight[rows], scheme.group_size) for rows in row_parts(len(weight), weight.shape[1], _PART))
    best = torch.cat([_best_ratios(groups, blocks, scheme, ratios) for groups in parts])
    for rows in row_parts(*weight.shape):
        clipped = _row_errors(weight[rows], gram, scheme, best[rows])
        plain = _row_errors(weight[rows], gram, scheme, 1.0)
        best[rows].masked_fill_((clipped >= plain).unsqueeze(1), 1.0)
    return best


def _best_ratios(groups: Tensor, blocks: Tensor, scheme: QuantScheme, ratios: Sequence[float]) -> Tensor:
    """For each group of f32 ``[N, G, group]`` the ratio of the least error of its own: f32 ``[N, G]``."""
    groups = groups.transpose(0, 1).contiguous()
    low, high = group_range(groups)
    best = torch.ones_like(low)
    least = torch.full_like(low, torch.inf)
    for ratio in ratios:
        snapped = grid_over(low * ratio, high * ratio, scheme.bits, scheme.symmetric).snap(groups)
        found = group_errors(snapped.sub_(groups), blocks)
        best.masked_fill_(found < least, ratio)
        least = torch.minimum(least, found)
    return best.T.contiguous()


def _row_errors(weight: Tensor, gram: Tensor, scheme: QuantScheme, ratio: Tensor | float) -> Tensor:
    groups = split_groups(weight, scheme.group_size)
    snapped = fit_grid(groups, scheme.bits, scheme.symmetric, ratio).snap(groups).reshape(weight.shape)
    return output_errors(snapped.sub_(weight), gram)
