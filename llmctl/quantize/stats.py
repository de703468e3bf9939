"""Statistics of a linear's calibration inputs, and the output error that a weight error causes on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llmctl.quantize.grid import split_groups

_BLOCKS, _LEAST_BLOCK = 6, 192  # a symmetric matrix is gone through by block columns, its upper blocks alone
_PART = 1 << 21  # weights whose errors are computed at once: no copy of a whole weight, and products still large


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
    def of(cls, inputs: Tensor, chunk: int = 2048, as_read: Callable[[Tensor], Tensor] = Tensor.float) -> InputStats:
        """Statistics of ``as_read``, f32, of ``[T, K]`` inputs, ``chunk`` tokens at a time.

        A matrix of this size is the largest thing that a wide linear takes: in float64 one of 11008 columns is 970 MB.
        """
        tokens, width = inputs.shape
        gram = torch.zeros(width, width, device=inputs.device)
        mean_abs = torch.zeros(width, dtype=torch.float64, device=inputs.device)
        for start in range(0, tokens, chunk):
            part = as_read(inputs[start : start + chunk])
            for columns in _block_columns(width):
                gram[: columns.stop, columns].addmm_(part[:, : columns.stop].T, part[:, columns])
            mean_abs += part.abs().sum(dim=0, dtype=torch.float64)
        for columns in _block_columns(width):
            gram[columns, : columns.start] = gram[: columns.start, columns].T
        return cls(gram.div_(max(tokens, 1)), (mean_abs / max(tokens, 1)).float(), tokens)

    def scaled(self, scales: Tensor) -> InputStats:
        """Statistics of ``X / scales`` (f32 ``[K]``)."""
        return InputStats(self.gram / torch.outer(scales, scales), self.mean_abs / scales, self.tokens)


def output_errors(delta: Tensor, gram: Tensor) -> Tensor:
    """Mean squared output error of each row, ``diag(D @ gram @ D.T)``: f32 ``[N]`` of a weight error D ``[N, K]``."""
    total = delta.new_zeros(len(delta))
    for columns in _block_columns(len(gram)):
        own, before = delta[:, columns], delta[:, : columns.start]
        product = own @ gram[columns, columns]
        product.addmm_(before, gram[: columns.start, columns], alpha=2)
        total += product.mul_(own).sum(dim=1)
    return total.clamp_(min=0)


def _block_columns(width: int) -> Iterator[slice]:
    size = max(_LEAST_BLOCK, -(-width // _BLOCKS))
    return (slice(start, min(start + size, width)) for start in range(0, width, size))


def group_errors(delta: Tensor, gram_blocks: Tensor) -> Tensor:
    """Each group's own share of that error: f32 ``[G, N]`` of f32 ``[G, N, group]`` and ``[G, group, group]``."""
    return torch.bmm(delta, gram_blocks).mul_(delta).sum(dim=-1).clamp_(min=0)


def gram_blocks(gram: Tensor, group_size: int) -> Tensor:
    """Diagonal blocks ``[G, group, group]`` of a ``[K, K]`` Gram matrix."""
    width = gram.shape[0]
    size = width if group_size == -1 else group_size
    blocks = split_groups(gram, size).reshape(width // size, size, width // size, size)
    index = torch.arange(width // size, device=gram.device)
    return blocks[index, :, index, :]


def row_parts(rows: int, width: int, elements: int = _PART) -> Iterator[slice]:
    """The rows of a matrix, so many at a time that they hold about ``elements``."""
    step = max(1, elements // max(width, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def relative_error(weight: Tensor, quantized: Tensor, gram: Tensor | None) -> float:
    """``||X (W - Q).T||² / ||X W.T||²`` over the calibration inputs; over white inputs when ``gram`` is None."""
    wrong = whole = 0.0
    for rows in row_parts(*weight.shape):
        wrong += _size(weight[rows] - quantized[rows], gram)
        whole += _size(weight[rows], gram)
    return wrong / max(whole, 1e-30)


def _size(value: Tensor, gram: Tensor | None) -> float:
    return float((value.square() if gram is None else output_errors(value, gram)).sum())
