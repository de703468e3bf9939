"""Integer grids: one scale and one zero point per group of weights, and the way between weights and codes.

Everything here is a pure function of tensors. A *group* is the last axis; any leading axes are batch axes
(``[..., group]`` weights have ``[...]`` scales). Two promises hold for every grid made here, because checkpoint
formats rely on them:

* scales are float32 tensors whose values are exact in float16, and codes are always computed against those
  values, so that what is stored is what was measured;
* zero points of asymmetric grids lie in ``[1, 2**bits - 1]``: GPTQ's first format stores ``zero - 1`` unsigned.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmctl.errors import UsageError
from llmctl.graph.graph import QuantScheme

BITS = (3, 4, 8)

_SMALLEST_SCALE = 2.0**-24  # least positive float16
_LARGEST_SCALE = 65504.0  # greatest finite float16
_PREFERRED_GROUPS = (32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Grid:
    """Points ``(code - zero) * scale`` for codes ``0 .. 2**bits - 1``.

    Attributes:
        scales: f32 ``[...]``, exact in float16, positive.
        zeros: f32 ``[...]``, whole numbers.
        bits: width of a code.
    """

    scales: Tensor
    zeros: Tensor
    bits: int

    def encode(self, groups: Tensor) -> Tensor:
        """Nearest codes of ``[..., group]`` weights: f32 whole numbers of the same shape (ties to even)."""
        codes = torch.div(groups, self.scales.unsqueeze(-1)).round_().add_(self.zeros.unsqueeze(-1))
        return codes.clamp_(0, 2**self.bits - 1)

    def decode(self, codes: Tensor) -> Tensor:
        """Weights of ``[..., group]`` codes: f32 of the same shape."""
        return (codes - self.zeros.unsqueeze(-1)).mul_(self.scales.unsqueeze(-1))

    def snap(self, groups: Tensor) -> Tensor:
        """``decode(encode(groups))``: the nearest grid points."""
        return self.encode(groups).sub_(self.zeros.unsqueeze(-1)).mul_(self.scales.unsqueeze(-1))


def fit_grid(groups: Tensor, bits: int, symmetric: bool, ratio: Tensor | float = 1.0) -> Grid:
    """The grid that spans each group's range, shrunk by ``ratio``.

    Args:
        groups: f32 ``[..., group]`` weights.
        bits: width of a code.
        symmetric: zero point fixed at ``2**(bits-1)``; the range is then ``±max|w|``.
        ratio: share of the range kept, in (0, 1]; a number or a tensor that broadcasts to ``[...]``.
    """
    low, high = group_range(groups)
    return grid_over(low * ratio, high * ratio, bits, symmetric)


def group_range(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest of each group's weights and zero, f32 ``[...]`` of ``[..., group]``."""
    low, high = groups.aminmax(dim=-1)
    return low.clamp_(max=0), high.clamp_(min=0)


def grid_over(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> Grid:
    """The grid that spans ``low <= 0`` to ``high >= 0``, f32 ``[...]``."""
    top = 2**bits - 1
    if symmetric:
        scales = storable(2 * torch.maximum(-low, high) / top)
        return Grid(scales, torch.full_like(scales, 2 ** (bits - 1)), bits)
    scales = storable((high - low) / top)
    # A zero point of 0 cannot be stored: such groups spend code 0 on one step below zero.
    unsigned = torch.round(-low / scales) < 1
    scales = torch.where(unsigned, storable(high / (top - 1)), scales)
    return Grid(scales, torch.round(-low / scales).clamp_(1, top), bits)


def storable(scales: Tensor) -> Tensor:
    return scales.clamp(_SMALLEST_SCALE, _LARGEST_SCALE).half().float()


def split_groups(weight: Tensor, group_size: int) -> Tensor:
    """View ``[N, K]`` as ``[N, G, group]``; ``group_size`` -1 makes one group of a row.

    Raises:
        ValueError: the group size does not divide K.
    """
    rows, width = weight.shape
    size = width if group_size == -1 else group_size
    if size <= 0 or width % size:
        raise ValueError(f"group size {group_size} does not divide {width}")
    return weight.reshape(rows, width // size, size)


def group_sizes_for(widths: set[int]) -> list[int]:
    """Group sizes that divide every width: powers of two from 32 up, other multiples of 32 (else of 8), then -1."""
    least = min(widths)
    fitting = [g for g in range(8, least + 1) if all(w % g == 0 for w in widths)]
    powers = [g for g in _PREFERRED_GROUPS if g in fitting]
    others = [g for g in fitting if g % 32 == 0 and g not in powers]
    return [*(powers + others or [g for g in fitting if g % 8 == 0] or fitting), -1]


def check_scheme(scheme: QuantScheme, widths: dict[str, int]) -> None:
    """Refuse a scheme that cannot hold linears of these input widths (name -> width).

    Raises:
        UsageError: bits not among 3, 4, 8; or a group size that does not divide a width, with the sizes that do.
    """
    if scheme.bits not in BITS:
        nearest = min(BITS, key=lambda bits: abs(bits - scheme.bits))
        raise UsageError(
            f"--bits {scheme.bits}: expected one of {', '.join(map(str, BITS))}", fix=f"--bits {nearest}", param="bits"
        )
    size = scheme.group_size
    if size != -1 and size <= 0:
        raise UsageError(f"--group-size {size}: expected a positive number, or -1 for one group a row")
    if size == -1:
        return
    bad = sorted({width for width in widths.values() if width % size})
    if bad:
        offers = ", ".join(map(str, group_sizes_for(set(widths.values()))))
        name = next(n for n, w in widths.items() if w == bad[0])
        raise UsageError(
            f"--group-size {size} does not divide the input width {bad[0]} of {name}",
            fix=f"group sizes that divide every width here: {offers}",
            param="group_size",
        )
