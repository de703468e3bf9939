"""AWQ (Lin et al., 2023): protect the channels that matter by scaling them up before rounding, then clip.

``X @ W.T == (X / s) @ (W * s).T`` for any positive ``s`` per input channel, so ``1/s`` can be folded into whatever
produces X. The search tries ``s`` from activation and weight magnitudes and keeps the one with the least output error
on the calibration inputs; doing nothing is always among the candidates. Both searches measure with the inputs' Gram
matrix: the error over every calibration token, not over a sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.graph.graph import QuantScheme
from llmctl.quantize.clip import search_clip
from llmctl.quantize.grid import fit_grid, split_groups
from llmctl.quantize.rtn import quantize_rtn
from llmctl.quantize.stats import InputStats, output_errors, row_parts

_SEARCH_ROWS = 256


@dataclass(frozen=True)
class ScaleChoice:
    """The outcome of a scale search.

    Attributes:
        scales: f32 ``[K]``; multiply the weight's columns, divide the inputs.
        alpha: exponent of the activation magnitudes that won; None when no scaling was best.
        error: mean squared output error with these scales; baseline: without.
    """

    scales: Tensor
    alpha: float | None
    error: float
    baseline: float


def search_scales(
    weights: Sequence[Tensor], stats: InputStats, scheme: QuantScheme, columns: Tensor | None = None, steps: int = 20
) -> ScaleChoice:
    """The channel scales with the least output error under round-to-nearest.

    Args:
        weights: f32 ``[N, K]``, those of all quantized linears that read these inputs.
        stats: the inputs' statistics.
        columns: i64 ``[K]``, the producer's row behind each input channel where several channels come from one row
            (grouped-query attention); they get one scale. None: one row each.
        steps: exponents tried, evenly spaced over [0, 1].
    """
    gram = stats.gram.float()
    # One exponent is looked for: evenly spaced rows tell it as well as all of them, which then confirm it.
    step = -(-sum(map(len, weights)) // _SEARCH_ROWS)
    sample = [weight[::step] for weight in weights]
    trials = [
        (_rounding_error(sample, gram, scheme, scales), alpha, scales)
        for alpha, scales in _candidates(weights, stats, scheme, columns, steps)
    ]
    _, alpha, scales = min(trials, key=lambda trial: trial[:2])
    ones = torch.ones_like(scales)
    baseline = _rounding_error(weights, gram, scheme, ones)
    error = _rounding_error(weights, gram, scheme, scales)
    if error < baseline:
        return ScaleChoice(scales, alpha, error, baseline)
    return ScaleChoice(ones, None, baseline, baseline)


def _parts(weights: Sequence[Tensor]) -> Iterator[Tensor]:
    """Some rows at a time: there is no copy of a whole weight in memory."""
    return (weight[rows] for weight in weights for rows in row_parts(*weight.shape))


def _rounding_error(weights: Sequence[Tensor], gram: Tensor, scheme: QuantScheme, scales: Tensor) -> float:
    error = 0.0
    for part in _parts(weights):
        groups = split_groups(part * scales, scheme.group_size)
        snapped = fit_grid(groups, scheme.bits, scheme.symmetric).snap(groups).reshape(part.shape)
        error += float(output_errors(snapped.div_(scales).sub_(part), gram).sum())
    return error


def _candidates(
    weights: Sequence[Tensor], stats: InputStats, scheme: QuantScheme, columns: Tensor | None, steps: int
) -> Iterator[tuple[float, Tensor]]:
    """``mean|x|**a / mean|w|**(1-a)`` for a in (0, 1], where w is taken relative to its group's largest."""
    size_x = stats.mean_abs
    size_w = torch.zeros_like(size_x, dtype=torch.float64)
    for part in _parts(weights):
        groups = split_groups(part.abs(), scheme.group_size)
        peaks = groups.amax(dim=-1, keepdim=True).clamp(min=1e-12)
        size_w += groups.div_(peaks).reshape(part.shape).sum(dim=0, dtype=torch.float64)
    size_w = (size_w / sum(map(len, weights))).float()
    if columns is not None:
        size_x, size_w = tie(size_x, columns), tie(size_w, columns)
    size_x, size_w = size_x.clamp(min=1e-8), size_w.clamp(min=1e-8)
    for step in range(steps + 1):
        alpha = step / steps
        scales = size_x.pow(alpha) / size_w.pow(1 - alpha)
        scales = (scales / (scales.max() * scales.min()).sqrt()).clamp(1e-4, 1e4)
        yield alpha, scales


def tie(values: Tensor, columns: Tensor) -> Tensor:
    """Each channel's value replaced by the mean over the channels of the same producer row."""
    rows = int(columns.max()) + 1
    sums = values.new_zeros(rows).index_add_(0, columns, values)
    counts = values.new_zeros(rows).index_add_(0, columns, torch.ones_like(values))
    return (sums / counts.clamp(min=1))[columns]


def quantize_awq(weight: Tensor, gram: Tensor, scheme: QuantScheme) -> QuantizedWeight:
    """Quantize a weight ``[N, K]`` whose columns are scaled already: clip search, then round to nearest."""
    return quantize_rtn(weight, scheme, search_clip(weight, gram, scheme))
