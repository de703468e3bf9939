"""Codes and scales refined after a method has made them: coordinate descent on the layer's squared output error.

GPTQ never takes a decision back. Here every code, in turn, moves to its best point given all others, and scales are
fitted to the codes by least squares, both in the metric of the Hessian. Zero points stay.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.quantize.grid import storable
from llmctl.quantize.stats import output_errors

_BLOCK = 64  # columns whose moves are gathered into one matrix product
_MOST = 1 << 22  # elements of the normal equations held at once
_RIDGE = 1e-4  # of the normal equations' mean diagonal: groups whose codes are all zero have no scale of their own


def refine(weight: Tensor, start: QuantizedWeight, hessian: Tensor, sweeps: int) -> QuantizedWeight:
    """Refine a quantized weight; no row's error rises.

    Args:
        weight: f32 ``[N, K]``, what is to be met.
        start: its quantization.
        hessian: ``[K, K]``, positive definite; the error of a row d of differences is ``d @ hessian @ d``.
        sweeps: times that all scales and then all codes are gone through.
    """
    metric = hessian.float()
    for _ in range(sweeps):
        start = _move_codes(weight, _fit_scales(weight, start, metric), metric)
    return start


def _move_codes(weight: Tensor, start: QuantizedWeight, metric: Tensor) -> QuantizedWeight:
    top = 2**start.scheme.bits - 1
    groups, pivots = start.group_index().tolist(), metric.diagonal().tolist()
    scales = start.scales.float().T.contiguous()
    codes = start.codes.T.float()  # [K, N]: a column of the weight is a row here
    slope = metric @ (start.dequantize() - weight).T
    width = len(codes)
    for begin in range(0, width, _BLOCK):
        end = min(begin + _BLOCK, width)
        moves = torch.empty(end - begin, codes.shape[1])
        for i, k in enumerate(range(begin, end)):
            scale = scales[groups[k]]
            code = codes[k].sub(slope[k].div(scale).div_(pivots[k])).round_().clamp_(0, top)
            moves[i] = code.sub(codes[k]).mul_(scale)
            codes[k] = code
            slope[k + 1 : end].addcmul_(metric[k, k + 1 : end].unsqueeze(1), moves[i])
        slope[end:] += metric[end:, begin:end] @ moves
    return replace(start, codes=codes.T.contiguous().to(torch.uint8))


def _fit_scales(weight: Tensor, start: QuantizedWeight, metric: Tensor) -> QuantizedWeight:
    group = start.group_index()
    count = start.scales.shape[1]
    rows = max(1, _MOST // (count * count))
    parts = [slice(begin, begin + rows) for begin in range(0, len(weight), rows)]
    scales = torch.cat([_fitted(weight[part], start.take_rows(part), group, metric) for part in parts])
    found = replace(start, scales=scales.half())
    better = output_errors(found.dequantize() - weight, metric) < output_errors(start.dequantize() - weight, metric)
    return replace(start, scales=torch.where(better.unsqueeze(1), found.scales, start.scales))


def _fitted(weight: Tensor, start: QuantizedWeight, group: Tensor, metric: Tensor) -> Tensor:
    """Scales f32 ``[N, G]`` with the least error of the given codes, exact in float16."""
    scales = start.scales.float()
    rows, count = scales.shape
    points = start.codes.float() - start.zeros.float()[:, group]
    by_group = torch.zeros(rows, count)
    normal = torch.empty(rows, count, count)
    for g in range(count):
        columns = (group == g).nonzero().squeeze(1)
        product = (points[:, columns] @ metric[columns]).mul_(points)
        normal[:, g] = by_group.zero_().index_add_(1, group, product)
    slope = ((weight - points * scales[:, group]) @ metric).mul_(points)
    right = torch.zeros(rows, count).index_add_(1, group, slope)
    diagonal = normal.diagonal(dim1=1, dim2=2)
    diagonal += _RIDGE * diagonal.mean(dim=1, keepdim=True) + torch.finfo(torch.float32).tiny
    factor, _ = torch.linalg.cholesky_ex(normal)  # of no use where it failed, and then of no smaller error
    return storable(scales + torch.cholesky_solve(right.unsqueeze(-1), factor).squeeze(-1))
