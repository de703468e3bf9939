"""GPTQ (Frantar et al., 2022): quantize columns one after another, spreading each column's error over those to come.

The Hessian of a layer's squared output error is the Gram matrix of its inputs. Columns are taken in blocks, so that
the update of the remaining matrix is one product per block; the result equals the unblocked algorithm. New here:
grids searched for the error that GPTQ will pay (``grid_search.py``) and codes taken back (``refine.py``).
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.errors import LlmctlError
from llmctl.graph.graph import QuantScheme
from llmctl.quantize.grid import Grid, fit_grid, split_groups
from llmctl.quantize.grid_search import search_grid
from llmctl.quantize.refine import refine
from llmctl.quantize.rtn import assemble

log = logging.getLogger(__name__)

_BLOCK, _INNER = 128, 16  # columns whose updates are gathered into one matrix product
_RETRIES = 4  # each with ten times the damping


@dataclass(frozen=True)
class GptqOptions:
    """Knobs of GPTQ.

    Attributes:
        damp_percent: added to the Hessian's diagonal, as a share of its mean.
        act_order: take columns by falling activation energy.
        static_groups: fit every group's grid to the original weights before the first column, so that groups stay
            contiguous under ``act_order`` (no ``g_idx``).
        search: search every group's grid instead of spanning its range.
        sweeps: of coordinate descent over scales and codes after the last column.
    """

    damp_percent: float = 0.01
    act_order: bool = True
    static_groups: bool = True
    search: bool = True
    sweeps: int = 2


@dataclass(frozen=True)
class Factored:
    """A Gram matrix made ready for GPTQ.

    Attributes:
        gram: ``[K, K]``, up to a positive factor.
        order: i64 ``[K]``, in which columns are taken.
        factor: f32 ``[K, K]``, ``inverse_factor`` of the matrix in that order.
    """

    gram: Tensor
    order: Tensor
    factor: Tensor

    @classmethod
    def of(cls, gram: Tensor, options: GptqOptions) -> Factored:
        """Raises LlmctlError: it cannot be factored even with strong damping."""
        width, diagonal = len(gram), gram.diagonal()
        natural = torch.arange(width, device=gram.device)
        order = torch.argsort(diagonal, descending=True, stable=True) if options.act_order else natural
        return cls(gram, order, inverse_factor(gram[order][:, order], options.damp_percent).float())

    @property
    def inverse_order(self) -> Tensor:
        """Where each column is in ``order``."""
        return torch.argsort(self.order)

    def divide(self, rows: Tensor) -> Tensor:
        """``rows @ inv(damped gram)``, f32 ``[N, K]``."""
        return (rows[:, self.order] @ self.factor.T @ self.factor)[:, self.inverse_order]


def quantize_gptq(
    weight: Tensor,
    gram: Tensor | Factored,
    scheme: QuantScheme,
    options: GptqOptions = GptqOptions(),
) -> QuantizedWeight:
    """Quantize a linear's weight. Rows are independent: linears that share their input may be stacked.

    Args:
        weight: f32 ``[N, K]``.
        gram: ``[K, K]``, the inputs' Gram matrix up to a positive factor, or what ``Factored.of`` made of it.
        scheme: bits, group size, symmetry.

    Raises:
        ValueError: shapes do not fit.
        LlmctlError: the Hessian cannot be factored even with strong damping.
    """
    width = weight.shape[1]
    shape = (gram.gram if isinstance(gram, Factored) else gram).shape
    if shape != (width, width):
        raise ValueError(f"gram {tuple(shape)} does not fit a weight of width {width}")
    factored = gram if isinstance(gram, Factored) else Factored.of(gram, options)
    found = _quantize_columns(weight, factored, scheme, options)
    return (
        refine(weight, found, damped(factored.gram, options.damp_percent), options.sweeps) if options.sweeps else found
    )


def _quantize_columns(weight: Tensor, factored: Factored, scheme: QuantScheme, options: GptqOptions) -> QuantizedWeight:
    """GPTQ's loop over the columns in their order."""
    order, factor, inverse = factored.order, factored.factor, factored.inverse_order
    rows, width = weight.shape
    size = width if scheme.group_size == -1 else scheme.group_size
    # Rounding column i wrongly by e costs e² over its pivot's square, once the columns after it have made up for it.
    costs = factor.diagonal().square().reciprocal() if options.search else None
    grids = _Grids(rows, width, scheme, size, costs, weight.device)
    natural = torch.arange(width, device=weight.device) // size
    if options.static_groups:
        grids.fit_all(weight, inverse)
        group_of = order // size
    else:
        group_of = natural
    codes = weight.new_empty(width, rows)  # in processing order, one column of the weight per row
    work = weight.T[order].contiguous()
    block = size * (_BLOCK // size) if size <= _BLOCK else size if width % _BLOCK or size % _BLOCK else _BLOCK
    for start in range(0, width, block):
        stop = min(start + block, width)
        errors = _quantize_block(work, codes, factor, grids, group_of, start, stop)
        work[stop:] -= factor[start:stop, stop:].T @ errors
    groups = group_of[inverse]
    in_order = torch.equal(groups, natural)
    return assemble(grids.grid(), codes[inverse].T, scheme, None if in_order else groups.to(torch.int32))


class _Grids:
    """Grids of all groups ``[G, N]``, fitted at once or as their first column comes up.

    ``costs``: f32 ``[K]`` of the columns in processing order; None: grids span their groups' ranges.
    """

    def __init__(
        self, rows: int, width: int, scheme: QuantScheme, size: int, costs: Tensor | None, device: torch.device
    ) -> None:
        self.scheme, self.size, self.costs = scheme, size, costs
        self.scales, self.zeros = (torch.empty(width // size, rows, device=device) for _ in range(2))
        self.fitted = -1

    def fit_all(self, weight: Tensor, inverse: Tensor) -> None:
        grid = self._fit(weight, None if self.costs is None else self.costs[inverse])
        self.scales, self.zeros = grid.scales.T.contiguous(), grid.zeros.T.contiguous()
        self.fitted = len(self.scales) - 1

    def fit_next(self, columns: Tensor) -> None:
        self.fitted += 1
        first = self.fitted * self.size
        costs = None if self.costs is None else self.costs[first : first + self.size]
        grid = self._fit(columns.T.contiguous(), costs)
        self.scales[self.fitted], self.zeros[self.fitted] = grid.scales[:, 0], grid.zeros[:, 0]

    def _fit(self, weight: Tensor, costs: Tensor | None) -> Grid:
        if costs is None:
            return fit_grid(split_groups(weight, self.size), self.scheme.bits, self.scheme.symmetric)
        return search_grid(weight, replace(self.scheme, group_size=self.size), costs)

    def grid(self) -> Grid:
        return Grid(self.scales.T.contiguous(), self.zeros.T.contiguous(), self.scheme.bits)


def _quantize_block(
    work: Tensor, codes: Tensor, factor: Tensor, grids: _Grids, group_of: Tensor, start: int, stop: int
) -> Tensor:
    """Quantize columns ``start .. stop-1`` in place of ``work``; their scaled errors ``[stop - start, N]``."""
    errors = work.new_empty(stop - start, work.shape[1])
    inner = math.gcd(_INNER, grids.size)  # a group's grid is fitted between two, when its columns are up to date
    for first in range(start, stop, inner):
        last = min(first + inner, stop)
        made = errors[first - start : last - start]
        _quantize_some(work, codes, factor, grids, group_of, first, made)
        work[last:stop].addmm_(factor[first:last, last:stop].T, made, alpha=-1)
    return errors


def _quantize_some(
    work: Tensor, codes: Tensor, factor: Tensor, grids: _Grids, group_of: Tensor, start: int, errors: Tensor
) -> None:
    """Quantize columns from ``start`` on, one after another, into as many rows of ``errors``."""
    top, stop = 2**grids.scheme.bits - 1, start + len(errors)
    local = factor[start:stop, start:stop]
    groups, pivots = group_of[start:stop].tolist(), local.diagonal().tolist()
    rows = zip(groups, pivots, work[start:stop].unbind(), codes[start:stop].unbind(), errors.unbind(), strict=True)
    for i, (group, pivot, column, code, error) in enumerate(rows):
        if group > grids.fitted:
            first = start + i
            # Block sizes are whole groups, or whole blocks make a group: these columns hold all updates so far.
            grids.fit_next(work[first : first + grids.size])
        scale, zero = grids.scales[group], grids.zeros[group]
        torch.div(column, scale, out=code).round_().add_(zero).clamp_(0, top)
        torch.sub(code, zero, out=error).mul_(scale).sub_(column).div_(-pivot)
        # addcmul, not addr: torch's CPU addr is not vectorised and took most of the time.
        work[start + i + 1 : stop].addcmul_(local[i, i + 1 :].unsqueeze(1), error, value=-1)


def inverse_factor(gram: Tensor, damp_percent: float) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped Gram matrix, f64 ``[K, K]``.

    A column that no input reached gets a unit diagonal: it is then rounded to nearest, on its own. If the factorisation
    fails, it is tried again with ten times the damping, and a warning says so.

    Raises:
        LlmctlError: not even the strongest damping helps (inputs that are not finite).
    """
    damping = damp_percent
    for _ in range(_RETRIES + 1):
        factor = _try_factor(damped(gram, damping))
        if factor is not None:
            return factor
        log.warning("GPTQ: the Hessian is not positive definite with damping %g; trying %g", damping, damping * 10)
        damping = max(damping * 10, 1e-4)
    raise LlmctlError(
        f"GPTQ: the Hessian of a layer cannot be factored, even with damping {damping / 10:g}",
        fix="use more calibration text (--calib-samples) or a larger --damp-percent",
    )


def damped(gram: Tensor, damp_percent: float) -> Tensor:
    """The Gram matrix with a share of its mean diagonal added to the diagonal, f64; 1 where no input reached."""
    hessian = gram.double().clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal += damp_percent * diagonal.mean()
    return hessian


def _try_factor(hessian: Tensor) -> Tensor | None:
    """U, upper, with ``U.T @ U == inv(hessian)``; None if the Hessian is not positive definite.

    Factoring the Hessian from its last column to its first gives ``R @ R.T`` with R upper, and U is R's inverse: no
    inverse of the whole matrix is formed.
    """
    lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    if failed or not torch.isfinite(lower).all():
        return None
    one = torch.eye(len(hessian), dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower.flip(0, 1), one, upper=True)
