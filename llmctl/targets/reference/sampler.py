"""Sampling in torch, vectorised over rows: the reference for every runtime's sampler.

The order of ops is SamplingBatch's. Every filter is a threshold on a row's values, so ties are never broken by sort
order: top-k keeps all tokens at least as likely as the k-th; top-p keeps a token when the tokens more likely than it
hold less than p of the mass that top-k left; min-p keeps tokens of at least min_p times the largest probability. The
draw is the first token, in id order, at which the float64 running sum of the kept mass exceeds ``u * total``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmctl.engine.step import SamplingBatch, TokenLogprobs
from llmctl.targets.reference.logprobs import describe
from llmctl.targets.reference.philox import uniform

# Top-p looks at this many of the most likely tokens first; only rows whose mass p lies deeper are sorted in full.
_NUCLEUS = 512


def sample(logits: Tensor, batch: SamplingBatch) -> tuple[NDArray[np.int32], Sequence[TokenLogprobs | None] | None]:
    """One token per row.

    Args:
        logits: f32 [R, V], the model's raw output; not modified.
        batch: parameters of the same R rows.

    Returns:
        Token ids i32 [R], and log-probabilities per row (None when no row asks). A row whose every token is forbidden
        gets token 0.
    """
    adjusted = _penalised(_restricted(logits, batch), batch)
    tokens = adjusted.argmax(dim=-1)
    rows = np.flatnonzero(batch.temperature > 0)
    if len(rows):
        tokens[torch.from_numpy(rows).to(logits.device)] = _draw(adjusted, rows, batch)
    return tokens.cpu().numpy().astype(np.int32), _logprobs(logits, tokens, batch.num_logprobs)


def _restricted(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Logit bias and token masks."""
    if batch.bias_rows is not None and batch.bias_ids is not None and batch.bias_values is not None:
        where = (_index(batch.bias_rows, logits), _index(batch.bias_ids, logits))
        logits = logits.index_put(where, torch.from_numpy(batch.bias_values).to(logits), accumulate=True)
    mask = batch.mask()
    if mask is not None:
        octets = np.ascontiguousarray(mask, dtype="<u4").view(np.uint8)
        allowed = np.unpackbits(octets, axis=1, bitorder="little")[:, : logits.shape[1]].astype(bool)
        logits = logits.masked_fill(~torch.from_numpy(allowed).to(logits.device), -torch.inf)
    return logits


def _penalised(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Repetition penalty (Keskar et al. 2019), then frequency and presence penalties (OpenAI's definition)."""
    if batch.repetition_penalty is batch.presence_penalty is batch.frequency_penalty is None:
        return logits
    logits = logits.clone()
    empty = np.zeros(0, np.int32)
    for row in range(len(logits)):
        output = batch.output_ids[row] if batch.output_ids is not None else empty
        prompt = batch.prompt_ids[row] if batch.prompt_ids is not None else empty
        if batch.repetition_penalty is not None and batch.repetition_penalty[row] != 1:
            ids = _index(np.unique(np.concatenate([prompt, output])), logits)
            penalty, values = float(batch.repetition_penalty[row]), logits[row, ids]
            logits[row, ids] = torch.where(values > 0, values / penalty, values * penalty)
        frequency = float(batch.frequency_penalty[row]) if batch.frequency_penalty is not None else 0.0
        presence = float(batch.presence_penalty[row]) if batch.presence_penalty is not None else 0.0
        if (frequency or presence) and len(output):
            seen, counts = np.unique(output, return_counts=True)
            logits[row, _index(seen, logits)] -= _floats(counts, logits) * frequency + presence
    return logits


def _draw(logits: Tensor, rows: NDArray[np.int64], batch: SamplingBatch) -> Tensor:
    """Temperature, filters and the draw for the given rows: i64 [len(rows)]."""

    def pick(values: NDArray | None) -> Tensor | None:
        return None if values is None else _floats(values[rows], logits)

    values = logits if len(rows) == len(logits) else logits[torch.from_numpy(rows).to(logits.device)]
    peak = values.amax(-1, keepdim=True)
    peak = torch.where(peak.isinf(), 0.0, peak)
    temperature = pick(batch.temperature)
    assert temperature is not None
    scaled = (values - peak) / temperature[:, None]
    top_k = None if batch.top_k is None else batch.top_k[rows]
    least = _least_kept(scaled, top_k, pick(batch.top_p), pick(batch.min_p))
    mass = scaled.exp()
    if least is not None:
        mass = mass.masked_fill(scaled < least[:, None], 0.0)
    cdf = mass.double().cumsum(-1)
    total = cdf[:, -1:].contiguous()
    draw = torch.from_numpy(uniform(batch.seeds[rows], batch.positions[rows])).to(logits.device)[:, None]
    chosen = torch.searchsorted(cdf, draw * total, right=True)
    # u * total can round up to total: then the last token that has any mass is the one.
    return torch.minimum(chosen, torch.searchsorted(cdf, total))[:, 0]


def _least_kept(
    scaled: Tensor, top_k: NDArray[np.int32] | None, top_p: Tensor | None, min_p: Tensor | None
) -> Tensor | None:
    """The smallest scaled logit that every filter keeps, f32 [R]; None when no row filters."""
    least = None
    if top_k is not None and (top_k > 0).any():
        least = _kth_value(scaled, top_k)
    if top_p is not None and bool((top_p < 1).any()):
        nucleus = _nucleus_value(scaled, top_p, least)
        least = nucleus if least is None else torch.maximum(least, nucleus)
    if min_p is not None and bool((min_p > 0).any()):
        floor = min_p.log()
        least = floor if least is None else torch.maximum(least, floor)
    return least


def _kth_value(scaled: Tensor, top_k: NDArray[np.int32]) -> Tensor:
    vocab = scaled.shape[1]
    k = np.where(top_k > 0, np.minimum(top_k, vocab), vocab)
    filtered = k < vocab
    if not filtered.any():
        return scaled.new_full((len(scaled),), -torch.inf)
    best = scaled.topk(int(k[filtered].max()), dim=-1).values
    position = _index(np.where(filtered, k, 1) - 1, scaled)[:, None]
    kth = best.gather(1, position)[:, 0]
    return torch.where(torch.from_numpy(filtered).to(scaled.device), kth, -torch.inf)


def _nucleus_value(scaled: Tensor, top_p: Tensor, least: Tensor | None) -> Tensor:
    """Value of the last token, from the most likely down, before which less than ``top_p`` of the mass lies."""
    mass = scaled.exp().double()
    if least is not None:
        mass = mass.masked_fill(scaled < least[:, None], 0.0)
    wanted = top_p.double() * mass.sum(-1)
    result = scaled.new_full((len(scaled),), -torch.inf)
    pending = torch.nonzero(top_p < 1)[:, 0]
    for count in (min(_NUCLEUS, scaled.shape[1]), scaled.shape[1]):
        best, order = mass[pending].topk(count, dim=-1)
        before = best.cumsum(-1) - best
        kept = (before < wanted[pending, None]).sum(-1).clamp(min=1)
        found = (kept < count) | (count == scaled.shape[1])
        last = order.gather(1, kept[:, None] - 1)
        result[pending[found]] = scaled[pending].gather(1, last)[:, 0][found]
        pending = pending[~found]
        if not len(pending):
            break
    return result


def _logprobs(
    logits: Tensor, tokens: Tensor, num_logprobs: NDArray[np.int32] | None
) -> Sequence[TokenLogprobs | None] | None:
    """Log-probabilities of the raw distribution for the rows that ask."""
    if num_logprobs is None or not (num_logprobs >= 0).any():
        return None
    rows = np.flatnonzero(num_logprobs >= 0)
    index = torch.from_numpy(rows).to(logits.device)
    entries = describe(logits[index], tokens[index], int(num_logprobs.max())).entries(num_logprobs[rows].tolist())
    result: list[TokenLogprobs | None] = [None] * len(logits)
    for row, entry in zip(rows.tolist(), entries, strict=True):
        result[row] = entry
    return result


def _index(values: NDArray, like: Tensor) -> Tensor:
    return torch.from_numpy(values.astype(np.int64)).to(like.device)


def _floats(values: NDArray, like: Tensor) -> Tensor:
    return torch.from_numpy(values.astype(np.float32)).to(like.device)
