"""How far a model's next-token distributions are from another's on the same windows of text.

Differences are paired: both models see the same tokens, so that their difference is known better than either value.
Standard errors are over windows, whose tokens depend on one another.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from llmctl.errors import UsageError
from llmctl.evaluate.distributions import OnProgress, Window, pieces, targets_of
from llmctl.evaluate.perplexity import check_finite


@dataclass(frozen=True)
class Divergence:
    """A comparison of two models; nats a token, means over ``tokens`` scored tokens.

    Attributes:
        kl: ``KL(original || other)`` of the next-token distributions; kl_error: its standard error.
        delta_nll: by how much the other model's negative log-likelihood is higher; delta_nll_error: its standard error.
        top1: share of positions where both find the same token most likely.
        nll, original_nll: each model's own negative log-likelihood.
    """

    kl: float
    kl_error: float
    delta_nll: float
    delta_nll_error: float
    top1: float
    tokens: int
    nll: float
    original_nll: float

    def to_json(self) -> dict[str, Any]:
        """The comparison as JSON data."""
        return asdict(self)


def spread_windows(tokens: Sequence[int], context: int, count: int) -> list[Window]:
    """``count`` windows of ``context`` tokens, spread evenly from the text's first token to its last.

    Raises:
        UsageError: less text than that many windows without overlap, a context of one token, or no window.
    """
    if count < 1 or context < 2:
        raise UsageError(f"{count} windows of {context} tokens: expected at least 1 of at least 2")
    if len(tokens) < count * context:
        raise UsageError(
            f"{count} windows of {context} tokens need {count * context} tokens of text, found {len(tokens)}"
        )
    step = (len(tokens) - context) / max(count - 1, 1)
    starts = [round(i * step) for i in range(count)]
    return [(list(tokens[start : start + context]), context - 1) for start in starts]


def divergence(
    original: Iterable[Tensor],
    other: Iterable[Tensor],
    windows: Sequence[Window],
    on_progress: OnProgress | None = None,
) -> Divergence:
    """Compare two models' distributions over the same windows (see ``distributions.py``).

    Args:
        on_progress: told how many tokens are compared.

    Raises:
        ValueError: not a tensor for each piece of the windows.
        UsageError: their vocabularies differ.
        LlmctlError: a model computes something that is not finite.
    """
    counts = torch.tensor([scored for _, scored in windows], dtype=torch.float64)
    total = int(counts.sum())
    sums = torch.zeros(len(windows), 5, dtype=torch.float64)
    done = 0
    for (index, positions), p, q in zip(pieces(windows), original, other, strict=True):
        if p.shape != q.shape:
            raise UsageError(f"vocabularies of {p.shape[1]} and {q.shape[1]} tokens: distributions do not compare")
        sums[index] += _compare(p, q, targets_of(windows[index], positions))
        done += len(positions)
        if on_progress is not None:
            on_progress(done, total)
    kl, delta, top1, nll, original_nll = (sums.sum(dim=0) / total).tolist()
    for who, value in (("the original", original_nll), ("the model", nll), ("the model", kl)):
        check_finite(who, value)
    errors = _standard_errors(sums[:, :2], counts)
    return Divergence(kl, errors[0], delta, errors[1], top1, total, nll, original_nll)


def kl_sum(p: Tensor, q: Tensor) -> Tensor:
    """Sum over rows of ``KL(p || q)``, f64 scalar, of log-probabilities f32 ``[rows, vocab]``."""
    return torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum(dtype=torch.float64)


def _compare(p: Tensor, q: Tensor, targets: Tensor) -> Tensor:
    """Sums over rows, f64 [5]: KL, difference of the negative log-likelihoods, equal first choices, both of these."""
    own, before = (-x.gather(1, targets[:, None]).double() for x in (q, p))
    same = (p.argmax(dim=-1) == q.argmax(dim=-1)).double()
    return torch.stack([kl_sum(p, q), (own - before).sum(), same.sum(), own.sum(), before.sum()])


def _standard_errors(sums: Tensor, counts: Tensor) -> list[float]:
    """Of ratios ``sums.sum(0) / counts.sum()``, windows being the sample; NaN for a single window."""
    windows = len(counts)
    if windows < 2:
        return [math.nan] * sums.shape[1]
    residuals = sums - (sums.sum(dim=0) / counts.sum()) * counts.unsqueeze(1)
    spread = residuals.square().sum(dim=0) * windows / (windows - 1)
    return [float(value) for value in spread.sqrt() / counts.sum()]
