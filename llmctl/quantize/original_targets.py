"""What a quantized layer is to give: the unquantized model's outputs, although its inputs are no longer that model's.

GPTAQ's asymmetric calibration (Li et al., 2025). With X the inputs that a linear has in the unquantized model and Z
those that the quantized layers before it produce, the error ``|Z Q.T - X W.T|²`` is, up to a constant, that of Q to
``W + W (X - Z).T Z inv(Z.T Z)`` on Z alone: any method that minimises output errors can take this as its weight. GPTAQ
spreads the same term column by column; to correct the weight beforehand is QEP's way (Arai and Ichikawa, 2025).
"""

from __future__ import annotations

from torch import Tensor

from llmctl.quantize.gptq import Factored

_CHUNK = 2048  # tokens in one product


def cross_gram(original: Tensor, inputs: Tensor, scales: Tensor | None = None) -> Tensor:
    """``(X - Z).T @ Z / T``, f32 ``[K, K]``, of X and Z, both f32 ``[T, K]``.

    Args:
        scales: f32 ``[K]`` by which the channels of Z are divided, and those of X are not; None: neither.
    """
    tokens, width = inputs.shape
    total = inputs.new_zeros(width, width)
    for x, z in zip(original.split(_CHUNK), inputs.split(_CHUNK), strict=True):
        total.addmm_(((x if scales is None else x / scales) - z).T, z)
    return total.div_(max(tokens, 1))


def original_target(weight: Tensor, factored: Factored, cross: Tensor, share: float) -> Tensor:
    """The weight f32 ``[N, K]`` whose outputs on Z are nearest to the original's on X, or a share of the way to it.

    Args:
        factored: Z's Gram matrix.
        cross: ``cross_gram`` of the same tokens.
        share: 0 leaves the weight as it is; 1 meets the calibration text, its noise included.
    """
    return weight + share * factored.divide(weight @ cross)
