"""SmoothQuant (Xiao et al., 2023): part of what is hard to round is moved from activations to weights.

W8A8 rounds a token's activations on one grid, whose step its largest channel decides. Dividing channels by ``s`` and
multiplying the weight's columns by it leaves the product as it is. SmoothQuant takes ``s = max|x|**a / max|w|**(1-a)``
with one exponent for a model; here it is searched for every activation, by the error of the outputs with both rounded,
and so is whether a channel's largest value or its root mean square counts. A search of every channel's own scale (the
model of that error is convex in the scales' logarithms) was no better on other tokens than those it saw.

Part of the error is the weights', whose rows have one scale each. GPTQ on the rounded activations' Gram matrix takes
some of it away where tokens are many times as many as columns; with fewer it fits these tokens alone, and the error of
others rises. So the last tokens decide. Sweeps took nothing more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor

from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.graph.graph import QuantScheme
from llmctl.quantize.awq import ScaleChoice, tie
from llmctl.quantize.gptq import Factored, GptqOptions, quantize_gptq
from llmctl.quantize.rtn import quantize_rtn
from llmctl.quantize.stats import InputStats
from llmctl.targets.reference.kernels import dequantize_rows, quantize_rows

_SAMPLE = 256  # tokens, evenly spaced, and as many rows: the search multiplies them once for every candidate
_GPTQ = GptqOptions(sweeps=0)
_HELD = 8  # of so many tokens one, at the end, is not seen by GPTQ
_STEPS = 10
_LEAST = 1e-5


def search_smoothing(
    weights: Sequence[Tensor], inputs: Tensor, scheme: QuantScheme, columns: Tensor | None = None
) -> ScaleChoice:
    """The channel scales with the least output error under W8A8.

    Args:
        weights: f32 ``[N, K]``, those of all quantized linears that read these inputs.
        inputs: f32 ``[T, K]``.
        columns: as ``awq.search_scales`` has it.
    """
    some = _every(inputs, _SAMPLE)
    rows = torch.cat([_every(weight, max(1, _SAMPLE // len(weights))) for weight in weights])
    wanted = some @ rows.T

    def error(scales: Tensor) -> float:
        rounded = quantize_rtn(rows * scales, scheme).dequantize()
        return float((_as_int8(some / scales) @ rounded.T).sub_(wanted).square().sum() / len(some))

    ones = inputs.new_ones(inputs.shape[1])
    baseline = error(ones)
    best = ScaleChoice(ones, None, baseline, baseline)
    for size_x, size_w in product(_sizes([inputs], columns), _sizes(weights, columns)):
        for step in range(_STEPS + 1):
            alpha = step / _STEPS
            scales = size_x.pow(alpha) / size_w.pow(1 - alpha)
            scales = (scales / (scales.max() * scales.min()).sqrt()).clamp(1e-4, 1e4)
            if (found := error(scales)) < best.error:
                best = ScaleChoice(scales, alpha, found, baseline)
    return best


def _sizes(values: Sequence[Tensor], columns: Tensor | None) -> list[Tensor]:
    """The largest and the root mean square of every column, f32 ``[K]``; one for ``columns`` that share a row."""
    largest = torch.stack([value.abs().amax(dim=0) for value in values]).amax(dim=0)
    squares = torch.stack([value.square().sum(dim=0) for value in values]).sum(dim=0)
    found = (largest, (squares / sum(map(len, values))).sqrt())
    return [(size if columns is None else tie(size, columns)).clamp(min=_LEAST) for size in found]


def w8a8_rounding(inputs: Tensor) -> Callable[[Tensor, QuantScheme], QuantizedWeight]:
    """What rounds a weight f32 ``[N, K]`` that reads these inputs, f32 ``[T, K]``: GPTQ, or to nearest.

    GPTQ sees the rounded inputs but for the last eighth of the tokens, on which the lesser error decides.

    Raises:
        LlmctlError: as ``Factored.of``: never where the inputs' squares are finite.
    """
    held = len(inputs) // _HELD
    if not held:
        return quantize_rtn
    seen, unseen = inputs.split([len(inputs) - held, held])
    factored = Factored.of(InputStats.of(seen, as_read=_as_int8).gram, _GPTQ)

    def rounded(weight: Tensor, scheme: QuantScheme) -> QuantizedWeight:
        found = (quantize_rtn(weight, scheme), quantize_gptq(weight, factored, scheme, _GPTQ))
        return min(found, key=lambda one: w8a8_error(weight, one.dequantize(), unseen))

    return rounded


def w8a8_error(weight: Tensor, quantized: Tensor, inputs: Tensor) -> float:
    """``||int8(X) Q.T - X W.T||² / ||X W.T||²`` over evenly spaced tokens of f32 ``[T, K]`` inputs."""
    some = _every(inputs, _SAMPLE)
    wanted = some @ weight.T
    wrong = (_as_int8(some) @ quantized.T).sub_(wanted).square().sum()
    return float(wrong / wanted.square().sum().clamp(min=1e-30))


def _as_int8(inputs: Tensor) -> Tensor:
    """What is left of f32 ``[T, K]`` activations after every token has been rounded to int8."""
    return dequantize_rows(*quantize_rows(inputs))


def _every(rows: Tensor, count: int) -> Tensor:
    """Evenly spaced rows, ``count`` at most."""
    return rows[:: -(-len(rows) // count)]
