"""Statistics of a linear's calibration inputs, and the output error that a weight error causes on them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmctl.quantize.grid import split_groups


@dataclass(frozen=True)
class InputStats:
    """What the algorithms need to know of a linear's calibration inputs ``X [T, K]``.

    Attributes:
        gram: f32 ``[K, K]``, ``X.T @ X / T``: with it the squared error of the layer's output is exact over all T
            tokens at a cost that does not grow with T.
        mean_abs: f32 ``[K]``, mean of ``|X|`` over tokens.
        tokens: T.
    """

    gram: Tensor
    mean_abs: Tensor
    tokens: int

    @classmethod
    def of(cls, inputs: Tensor, chunk: int = 2048) -> InputStats:
        """Statistics of ``[T, K]`` inputs, ``chunk`` tokens at a time.

        A matrix of this size is the largest thing that a wide linear takes: in float64 one of 11008 columns is 970 MB.
        """
        tokens, width = inputs.shape
        gram = torch.zeros(width, width)
        mean_abs = torch.zeros(width, dtype=torch.float64)
        for start in range(0, tokens, chunk):
            part = inputs[start : start + chunk].float()
            gram.addmm_(part.T, part)
            mean_abs += part.abs().sum(dim=0, dtype=torch.float64)
        return cls(gram.div_(max(tokens, 1)), (mean_abs / max(tokens, 1)).float(), tokens)

    def scaled(self, scales: Tensor) -> InputStats:
        """Statistics of ``X / scales`` (f32 ``[K]``)."""
        return InputStats(self.gram / torch.outer(scales, scales), self.mean_abs / scales, self.tokens)


def output_errors(delta: Tensor, gram: Tensor) -> Tensor:
    """Mean squared output error of each row, ``diag(D @ gram @ D.T)``: f32 ``[N]`` of a weight error D ``[N, K]``."""
    return ((delta @ gram) * delta).sum(dim=1).clamp_(min=0)


def group_errors(delta: Tensor, gram_blocks: Tensor) -> Tensor:
    """Each group's own share of that error: f32 ``[N, G]`` of f32 ``[N, G, group]`` and ``[G, group, group]``."""
    return (torch.einsum("ngi,gij->ngj", delta, gram_blocks) * delta).sum(dim=-1).clamp_(min=0)


def gram_blocks(gram: Tensor, group_size: int) -> Tensor:
    """Diagonal blocks ``[G, group, group]`` of a ``[K, K]`` Gram matrix."""
    width = gram.shape[0]
    size = width if group_size == -1 else group_size
    blocks = split_groups(gram, size).reshape(width // size, size, width // size, size)
    index = torch.arange(width // size)
    return blocks[index, :, index, :]


def relative_error(weight: Tensor, quantized: Tensor, gram: Tensor | None) -> float:
    """``||X (W - Q).T||² / ||X W.T||²`` over the calibration inputs; over white inputs when ``gram`` is None."""
    if gram is None:
        return float((weight - quantized).square().sum() / weight.square().sum().clamp(min=1e-30))
    gram = gram.float()
    return float(output_errors(weight - quantized, gram).sum() / output_errors(weight, gram).sum().clamp(min=1e-30))
