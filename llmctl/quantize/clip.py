"""Clip search: narrower grids that lose the largest weights of a group but place the others better.

Part of AWQ (Lin et al., 2023).
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmctl.graph.graph import QuantScheme
from llmctl.quantize.grid import fit_grid, split_groups
from llmctl.quantize.stats import gram_blocks, group_errors, output_errors


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
    groups = split_groups(weight, scheme.group_size)
    best = torch.ones(groups.shape[:2])
    least = torch.full_like(best, torch.inf)
    for step in range(steps + 1):
        ratio = 1 - max_shrink * step / steps
        snapped = fit_grid(groups, scheme.bits, scheme.symmetric, ratio).snap(groups)
        found = group_errors(snapped.sub_(groups), blocks)
        better = found < least
        best[better] = ratio
        least = torch.where(better, found, least)
    clipped = _row_errors(weight, gram, scheme, best)
    plain = _row_errors(weight, gram, scheme, 1.0)
    return torch.where((clipped < plain).unsqueeze(1), best, torch.ones_like(best))


def _row_errors(weight: Tensor, gram: Tensor, scheme: QuantScheme, ratio: Tensor | float) -> Tensor:
    groups = split_groups(weight, scheme.group_size)
    snapped = fit_grid(groups, scheme.bits, scheme.symmetric, ratio).snap(groups).reshape(weight.shape)
    return output_errors(snapped.sub_(weight), gram)
