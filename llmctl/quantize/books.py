"""Weights as codes of a code book: float8 with a scale a row, NF4 with a scale a block. Needs no calibration data."""

from __future__ import annotations

import torch
from torch import Tensor

from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.graph.code_books import CODE_BOOKS
from llmctl.graph.graph import QuantScheme
from llmctl.quantize.grid import split_groups

_SMALLEST = 1e-38
_E4M3_MAX = 448.0


def quantize_book(weight: Tensor, scheme: QuantScheme) -> QuantizedWeight:
    """Round a weight f32 ``[N, K]`` to the nearest values of ``scheme.book``, scaled by each group's largest.

    Raises:
        ValueError: the group size does not divide K.
    """
    groups = split_groups(weight, scheme.group_size)
    quantize = _fp8 if scheme.book == "fp8_e4m3" else _sorted_book
    codes, scales = quantize(groups, scheme.book)
    zeros = torch.zeros_like(scales, dtype=torch.uint8)
    return QuantizedWeight(codes.reshape(weight.shape), scales, zeros, scheme)


def _fp8(groups: Tensor, _: str) -> tuple[Tensor, Tensor]:
    """Codes are computed against scales exact in bfloat16: a reader decodes in their dtype, which is then 16 bits."""
    scales = (groups.abs().amax(dim=-1) / _E4M3_MAX).clamp(min=_SMALLEST).bfloat16().float()
    values = (groups / scales.unsqueeze(-1)).clamp(-_E4M3_MAX, _E4M3_MAX)
    return values.to(torch.float8_e4m3fn).view(torch.uint8), scales


def _sorted_book(groups: Tensor, book: str) -> tuple[Tensor, Tensor]:
    """As bitsandbytes 0.50 (quantize_4bit), to the bit: times the reciprocal, midpoints to the lower code."""
    values = torch.tensor(CODE_BOOKS[book].values, device=groups.device)
    scales = groups.abs().amax(dim=-1)
    scaled = (groups * (1.0 / scales.clamp(min=_SMALLEST)).unsqueeze(-1)).clamp(-1, 1)
    return torch.bucketize(scaled, (values[:-1] + values[1:]) / 2).to(torch.uint8), scales
