"""Grids searched for the least weighted squared error of the weights themselves, instead of spanning their range.

Every trial shrinks the range, rounds, and fits scale and zero point to the codes by weighted least squares; the fitted
grid counts for what it costs after float16 and whole zero points. Equal weights need no data. What GPTQ pays for a
column is its squared rounding error over the squared pivot of the Hessian's factor, which are its weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmctl.graph.graph import QuantScheme
from llmctl.quantize.grid import Grid, grid_over, split_groups, storable

_CHUNK = 1 << 17  # weights searched at once: what the trials go through stays in a core's cache
_STEPS = 12
_MAX_SHRINK = 0.5
_ROUNDS = 2  # codes and grid fitted to one another again, after the trials


def search_grid(weight: Tensor, scheme: QuantScheme, importance: Tensor) -> Grid:
    """The grid ``[N, G]`` of each group, never worse by weighted squared error than the one that spans its range.

    Args:
        weight: f32 ``[N, K]``, its groups contiguous.
        scheme: bits, group size, symmetry.
        importance: f32 ``[K]`` or ``[N, K]``, positive: weights of the squared errors.

    Raises:
        ValueError: the group size does not divide K.
    """
    size = scheme.group_size
    rows = max(1, _CHUNK // max(weight.shape[1], 1))
    shares = importance.float().expand(weight.shape)
    parts = zip(weight.split(rows), shares.split(rows), strict=True)
    found = [_search(split_groups(part, size), split_groups(share, size), scheme) for part, share in parts]
    return Grid(torch.cat([g.scales for g in found]), torch.cat([g.zeros for g in found]), scheme.bits)


def _search(groups: Tensor, shares: Tensor, scheme: QuantScheme) -> Grid:
    """Of f32 ``[N, G, group]`` weights and shares: ``[N, G]``."""
    trials = _Trials(groups.flatten(0, 1).T.contiguous(), shares.flatten(0, 1).T.contiguous(), scheme)
    best = grid_over(trials.low, trials.high, scheme.bits, scheme.symmetric)
    least = trials.error(best)
    for step in range(_STEPS + 1):
        ratio = 1 - _MAX_SHRINK * step / _STEPS
        trial = grid_over(trials.low * ratio, trials.high * ratio, scheme.bits, scheme.symmetric)
        best, least = _better(best, least, *trials.fitted(trial))
    for _ in range(_ROUNDS):
        best, least = _better(best, least, *trials.fitted(best))
    return Grid(best.scales.view(groups.shape[:2]), best.zeros.view(groups.shape[:2]), scheme.bits)


def _better(best: Grid, least: Tensor, found: Grid, error: Tensor) -> tuple[Grid, Tensor]:
    better = error < least
    scales, zeros = (
        torch.where(better, new, old) for new, old in ((found.scales, best.scales), (found.zeros, best.zeros))
    )
    return Grid(scales, zeros, best.bits), torch.where(better, error, least)


class _Trials:
    """Weighted least squares of scale and zero point, given codes; the sums that no code changes are kept.

    Weights and shares are ``[group, M]``, a group a column: torch sums and scales columns at many times the speed of
    short rows. Measured on 128 x 1024: ``aminmax``, as ``group_range`` has it, takes ten times as long as ``amin`` and
    ``amax`` of columns; codes by division, as ``Grid.encode`` has them, 1.3 times as long as by the reciprocal.
    """

    def __init__(self, weights: Tensor, shares: Tensor, scheme: QuantScheme) -> None:
        self.weights, self.shares, self.scheme = weights, shares, scheme
        self.low, self.high = weights.amin(dim=0).clamp_(max=0), weights.amax(dim=0).clamp_(min=0)
        self.weighted = weights * shares
        self.mass = shares.sum(dim=0)
        self.first = self.weighted.sum(dim=0)
        self.second = (self.weighted * weights).sum(dim=0)

    def error(self, grid: Grid) -> Tensor:
        """Of the nearest points, ``[M]``."""
        points = self._codes(grid).sub_(grid.zeros).mul_(grid.scales)
        return points.sub_(self.weights).square_().mul_(self.shares).sum(dim=0)

    def fitted(self, grid: Grid) -> tuple[Grid, Tensor]:
        """The grid fitted to the codes of ``grid``, and its error with those codes: no less than with its own."""
        codes = self._codes(grid)
        shared = codes * self.shares
        sum_c, sum_cc = shared.sum(dim=0), shared.mul_(codes).sum(dim=0)
        sum_cw = codes.mul_(self.weighted).sum(dim=0)
        zeros = grid.zeros
        if not self.scheme.symmetric:
            slope = (sum_cw - sum_c * self.first / self.mass) / (sum_cc - sum_c.square() / self.mass)
            offset = (sum_c - self.first / slope) / self.mass
            fits = slope.isfinite() & (slope > 0) & offset.isfinite()
            zeros = torch.where(fits, offset.round().clamp_(1, 2**self.scheme.bits - 1), zeros)
        along = sum_cw - zeros * self.first
        square = sum_cc - 2 * zeros * sum_c + zeros.square() * self.mass
        scales = along / square
        scales = torch.where(scales.isfinite() & (scales > 0), storable(scales), grid.scales)
        error = self.second - 2 * scales * along + scales.square() * square
        return Grid(scales, zeros, grid.bits), error

    def _codes(self, grid: Grid) -> Tensor:
        codes = torch.mul(self.weights, grid.scales.reciprocal()).round_().add_(grid.zeros)
        return codes.clamp_(0, 2**self.scheme.bits - 1)
