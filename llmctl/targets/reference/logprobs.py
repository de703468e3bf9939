"""Log-probabilities of tokens, their ranks, and the most likely tokens, in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from llmctl.engine.step import TokenScores

# Tokens are put in order by keys of 8 bytes each, of so many rows at a time.
_KEY_BYTES = 32 * 2**20


def describe(logits: Tensor, tokens: Tensor, top: int) -> TokenScores:
    """What a row's distribution says of its token.

    Args:
        logits: f32 [n, V]. tokens: i64 [n]. top: how many of the most likely tokens are wanted.
    """
    logprobs = torch.log_softmax(logits, -1)
    ranks = (logits > logits.gather(1, tokens[:, None])).sum(-1) + 1
    ids = top_ids(logits, top)
    columns = (logprobs.gather(1, tokens[:, None])[:, 0], ranks.int(), ids.int(), logprobs.gather(1, ids))
    return TokenScores(*(column.cpu().numpy() for column in columns))


def top_ids(logits: Tensor, count: int) -> Tensor:
    """The ``count`` most likely tokens (all, of a smaller vocabulary), best first, of equals the lowest id first.

    Args:
        logits: f32 [n, V].

    Returns:
        i64 [n, min(count, V)]. (``Tensor.topk`` gives equals in any order, and any of them where they do not all fit.)
    """
    rows, vocab = logits.shape
    step = max(1, _KEY_BYTES // (8 * vocab))
    found = torch.empty(rows, min(count, vocab), dtype=torch.int64, device=logits.device)
    if count:
        for first in range(0, rows, step):
            found[first : first + step] = _top_ids(logits[first : first + step], found.shape[1])
    return found


def _top_ids(logits: Tensor, count: int) -> Tensor:
    vocab = logits.shape[1]
    # Bits of floats order as integers do, but for negative ones, whose order is the other way round; -0 equals 0.
    bits = (logits + 0.0).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    places = torch.arange(vocab - 1, -1, -1, device=logits.device)
    best = ((ordered.long() << 32) | places).topk(count, dim=-1).values
    return vocab - 1 - (best & 0xFFFFFFFF)
