"""How far a model's next-token distributions are from another's on the same windows of text.

Differences are paired: both models see the same tokens, so that their difference is known better than either value.
Standard errors are over windows, whose tokens depend on one another.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from llmctl.checkpoint.reader import Checkpoint
from llmctl.errors import UsageError
from llmctl.quantize.evaluate import Protocol, Window, checkpoint_logits, tokenizer_digest
from llmctl.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Divergence:
    """A comparison of two models; nats a token, means over ``tokens`` scored tokens.

    Attributes:
        kl: ``KL(original || other)`` of the next-token distributions; kl_error: its standard error.
        delta_nll: by how much the other model's negative log-likelihood is higher; delta_nll_error: its standard error.
        top1: share of positions where both find the same token most likely.
    """

    kl: float
    kl_error: float
    delta_nll: float
    delta_nll_error: float
    top1: float
    tokens: int

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


def window_log_probs(checkpoint: Checkpoint, windows: Sequence[Window]) -> Iterator[Tensor]:
    """The distributions that predict each window's scored tokens: f32 ``[scored, vocab]``, natural logarithms.

    Raises:
        UsageError: a window longer than the model's context.
    """
    for logits in checkpoint_logits(checkpoint, windows):
        yield logits.log_softmax(dim=-1)


def divergence(original: Iterable[Tensor], other: Iterable[Tensor], windows: Sequence[Window]) -> Divergence:
    """Compare the distributions of two models on the same windows, both as ``window_log_probs`` gives them.

    Raises:
        ValueError: not a tensor for each window.
    """
    found = [_compare(p, q, window[-fresh:]) for p, q, (window, fresh) in zip(original, other, windows, strict=True)]
    sums = torch.tensor([values[:3] for values in found], dtype=torch.float64)
    counts = torch.tensor([fresh for _, fresh in windows], dtype=torch.float64)
    (kl, nll, top1), errors = sums.sum(dim=0) / counts.sum(), _standard_errors(sums, counts)
    return Divergence(float(kl), errors[0], float(nll), errors[1], float(top1), int(counts.sum()))


def measure_divergence(original: Checkpoint, other: Checkpoint, text: str, protocol: Protocol) -> Divergence:
    """Compare two models on a text.

    Raises:
        UsageError: too little text, or models with different tokenizers.
    """
    if tokenizer_digest(original) != tokenizer_digest(other):
        raise UsageError(f"{other.path}: has another tokenizer than {original.path}; distributions do not compare")
    tokenizer = Tokenizer.from_files(original.aux_files(), where=str(original.path))
    windows = protocol.windows(tokenizer.encode(text, add_special_tokens=False))
    return divergence(window_log_probs(original, windows), window_log_probs(other, windows), windows)


def _compare(p: Tensor, q: Tensor, targets: Sequence[int]) -> tuple[float, float, float]:
    """Sums over a window: KL, difference of the targets' negative log-likelihoods, equal first choices."""
    column = torch.tensor(targets).unsqueeze(1)
    kl = float(torch.sum(p.exp() * (p - q), dtype=torch.float64))
    nll = float(torch.sum(p.gather(1, column) - q.gather(1, column), dtype=torch.float64))
    return kl, nll, float((p.argmax(dim=-1) == q.argmax(dim=-1)).sum())


def _standard_errors(sums: Tensor, counts: Tensor) -> list[float]:
    """Of ratios ``sums.sum(0) / counts.sum()``, windows being the sample; NaN for a single window."""
    windows = len(counts)
    if windows < 2:
        return [math.nan] * sums.shape[1]
    residuals = sums - (sums.sum(dim=0) / counts.sum()) * counts.unsqueeze(1)
    spread = residuals.square().sum(dim=0) * windows / (windows - 1)
    return [float(value) for value in spread.sqrt() / counts.sum()]
