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

_BLOCK, _INNER = 128, 16  # columns whose moves are gathered into one matrix product
_MOST = 1 << 22  # elements of a matrix held at once
_RIDGE = 1e-4  # of the normal equations' mean diagonal: groups whose codes are all zero have no scale of their own
_NOISE = 1e-6  # of an error in float32, of which a change may be made up


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
    codes = start.codes.T.float()  # [K, N]: a column of the weight is a row here
    slope = metric @ (start.dequantize() - weight).T
    scales = start.scales.float().T[start.group_index()]
    width = len(codes)
    for begin in range(0, width, _BLOCK):
        end = min(begin + _BLOCK, width)
        moves = codes.new_empty(end - begin, codes.shape[1])
        for first in range(begin, end, _INNER):
            some = slice(first, min(first + _INNER, end))
            made = moves[first - begin : some.stop - begin]
            _move_some(codes[some], slope[some], scales[some], metric[some, some], made, 2**start.scheme.bits - 1)
            slope[some.stop : end].addmm_(metric[some.stop : end, some], made)
        slope[end:].addmm_(metric[end:, begin:end], moves)
    return replace(start, codes=codes.T.contiguous().to(torch.uint8))


def _move_some(codes: Tensor, slope: Tensor, scales: Tensor, metric: Tensor, moves: Tensor, top: int) -> None:
    """Move one row after another of codes f32 ``[k, N]``, in place; ``moves``: by how much, in weights."""
    steps = (scales * metric.diagonal().unsqueeze(1)).reciprocal_()
    rows = zip(codes.unbind(), slope.unbind(), scales.unbind(), steps.unbind(), moves.unbind(), strict=True)
    for k, (code, own, scale, step, move) in enumerate(rows):
        found = torch.addcmul(code, own, step, value=-1).round_().clamp_(0, top)
        torch.sub(found, code, out=move).mul_(scale)
        code.copy_(found)
        slope[k + 1 :].addcmul_(metric[k, k + 1 :].unsqueeze(1), move)


def _fit_scales(weight: Tensor, start: QuantizedWeight, metric: Tensor) -> QuantizedWeight:
    order = None if start.g_idx is None else start.group_index().argsort(stable=True)
    if order is not None:
        metric = metric[order][:, order]
    count = start.scales.shape[1]
    rows = max(1, _MOST // max(count * count, len(metric)))
    parts = [slice(begin, begin + rows) for begin in range(0, len(weight), rows)]
    return replace(start, scales=torch.cat([_fitted(weight[p], start.take_rows(p), order, metric) for p in parts]))


def _fitted(weight: Tensor, start: QuantizedWeight, order: Tensor | None, metric: Tensor) -> Tensor:
    """Scales f16 ``[N, G]`` with the least error of the given codes; the old ones for rows without a smaller error.

    Args:
        order: brings columns group by group, in which ``metric`` is already; None: they are.
    """
    points = start.codes.float() - start.zeros.float()[:, start.group_index()]
    if order is not None:
        weight, points = weight[:, order], points[:, order]
    scales = start.scales.float()
    rows, count = scales.shape
    size = points.shape[1] // count
    normal = scales.new_zeros(rows, count, count)  # its lower half
    for g in range(count):
        own, below = slice(g * size, (g + 1) * size), slice(g * size, None)
        product = (points[:, own] @ metric[own, below]).mul_(points[:, below])
        normal[:, g:, g] = product.view(rows, -1, size).sum(dim=-1)
    delta = torch.addcmul(weight, points, scales.repeat_interleave(size, dim=1), value=-1)
    slope = delta @ metric
    error = delta.mul_(slope).sum(dim=1)
    right = slope.mul_(points).view(rows, count, size).sum(dim=-1)
    diagonal = normal.diagonal(dim1=1, dim2=2)
    ridge = _RIDGE * diagonal.mean(dim=1, keepdim=True) + torch.finfo(torch.float32).tiny
    factor, _ = torch.linalg.cholesky_ex(normal + torch.diag_embed(ridge.expand(-1, count)))  # it reads the lower half
    found = storable(scales + torch.cholesky_solve(right.unsqueeze(-1), factor).squeeze(-1))
    step = found - scales
    along = torch.bmm(normal, step.unsqueeze(-1)).squeeze(-1) - 0.5 * diagonal * step  # step @ along is half its square
    change = 2 * (step * (along - right)).sum(dim=1)  # not a number where the factorisation failed
    return torch.where((change < -_NOISE * error).unsqueeze(1), found, scales).half()
