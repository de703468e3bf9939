"""The parameters of a step's requests as one plain ``SamplingBatch``.

Nothing here touches logits: the runtime samples where the logits are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmctl.engine.request import Request
from llmctl.engine.sampling_params import SamplingParams
from llmctl.engine.step import SamplingBatch
from llmctl.structured.matcher import TokenMatcher


class SamplingBatcher:
    """Makes the SamplingBatch of each step.

    Most steps sample the very requests that the last one did. Then only the positions are new, and whatever else
    follows the requests' output; all other columns are the arrays of the last batch.

    Attributes:
        follows_output: a row of the last batch needs the ids of all output before the token it samples.

    Args:
        vocab_size: width of the logits. eos_token_ids: suppressed while a row is short of its ``min_tokens``.
    """

    def __init__(self, vocab_size: int, eos_token_ids: Collection[int] = frozenset()) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._requests: tuple[Request, ...] | None = None
        self._columns: dict[str, Any] = {}
        self._penalised = self._biased = self._constrained = self.follows_output = False

    def batch(self, requests: tuple[Request, ...], positions: Sequence[int]) -> SamplingBatch:
        """The batch of the requests whose next token is to be sampled, in row order.

        Args:
            positions: index in its sequence of each token to be sampled: beyond the known tokens by those in flight,
                of which there must be none where a row ``follows_output``.
        """
        if requests != self._requests:  # by identity: requests have no equality of their own
            self._requests = requests
            self._set_columns([r.params for r in requests], [r.seed for r in requests])
        columns = self._columns
        if self._penalised or self._biased or self._constrained:
            columns = {**columns, **self._step_columns(requests, positions)}
        return SamplingBatch(positions=np.array(positions, np.int64), **columns)

    def _set_columns(self, params: Sequence[SamplingParams], seeds: list[int]) -> None:
        self._penalised = any(p.penalised for p in params)
        self.follows_output = any(p.follows_output for p in params)
        self._biased = any(p.logit_bias or p.min_tokens or p.bad_words for p in params)
        self._constrained = any(p.grammar is not None for p in params)
        self._columns = {
            "temperature": np.array([0 if p.greedy else _factor(p.temperature) for p in params], np.float32),
            "seeds": np.array(seeds, np.uint64),
            "top_k": _column(params, lambda p: 0 if p.greedy else max(p.top_k, 0), 0, np.int32),
            "top_p": _column(params, lambda p: 1.0 if p.greedy else _factor(p.top_p), 1.0, np.float32),
            "min_p": _column(params, lambda p: 0.0 if p.greedy else p.min_p, 0.0, np.float32),
            "repetition_penalty": _column(params, lambda p: _factor(p.repetition_penalty), 1.0, np.float32),
            "presence_penalty": _column(params, lambda p: p.presence_penalty, 0.0, np.float32),
            "frequency_penalty": _column(params, lambda p: p.frequency_penalty, 0.0, np.float32),
            "allowed_mask": _allowed_masks(params, self._vocab_size),
            "num_logprobs": _column(params, lambda p: -1 if p.logprobs is None else p.logprobs, -1, np.int32),
        }

    def _step_columns(self, requests: Sequence[Request], positions: Sequence[int]) -> dict[str, Any]:
        """The columns that depend on the output so far: on its ids or on its length."""
        found: dict[str, Any] = {}
        if self._penalised:
            found["prompt_ids"] = tuple(_history(r, r.prompt_token_ids) for r in requests)
            found["output_ids"] = tuple(_history(r, r.output_token_ids) for r in requests)
        rows, ids, values = _biases(requests, positions, self._eos_token_ids)
        if rows:
            found["bias_rows"] = np.array(rows, np.int32)
            found["bias_ids"] = np.array(ids, np.int32)
            found["bias_values"] = np.array(values, np.float32)
        if self._constrained:
            found["grammar_mask"] = partial(self._grammar_masks, requests, positions, self._columns["allowed_mask"])
        return found

    def _grammar_masks(
        self, requests: Sequence[Request], positions: Sequence[int], fixed: NDArray[np.uint32] | None
    ) -> NDArray[np.uint32]:
        """The masks of this step: what each row's grammar allows of what its parameters do."""
        free = _allowed_row(None, self._vocab_size)
        masks = np.empty((len(requests), len(free)), np.uint32)
        for row, (request, position) in enumerate(zip(requests, positions, strict=True)):
            if request.matcher is None:
                masks[row] = free if fixed is None else fixed[row]
                continue
            request.matcher.fill(masks[row])
            if fixed is not None:
                masks[row] &= fixed[row]
            _end_with_grammar(masks[row], request, request.matcher, position, self._eos_token_ids)
        return masks


def _factor(value: float) -> float:
    """A positive number within bounds that float32 holds, its inverse and its product with a logit too.

    Else it would be 0 or infinite there, and a forbidden token's logit, -inf, times 0 is not a number. Numbers beyond
    the bounds sample as the bounds do: a distribution that is flat, or all at its peak.
    """
    return min(max(value, 1e-30), 1e30)


def _history(request: Request, ids: Sequence[int]) -> NDArray[np.int32]:
    """Token history for the penalties; empty for a row that has none."""
    return np.array(ids if request.params.penalised else (), np.int32)


def _column(
    params: Sequence[SamplingParams], value: Callable[[SamplingParams], float], off: float, dtype: Any
) -> NDArray[Any] | None:
    """One value a row, or None when every row has it off."""
    values = [value(p) for p in params]
    return np.array(values, dtype) if any(v != off for v in values) else None


def _biases(
    requests: Sequence[Request], positions: Sequence[int], eos_token_ids: Collection[int]
) -> tuple[list[int], list[int], list[float]]:
    """Coordinates of every additive bias: logit_bias, min_tokens' suppressed ids, and bad words about to complete."""
    rows: list[int] = []
    ids: list[int] = []
    values: list[float] = []
    for row, (request, position) in enumerate(zip(requests, positions, strict=True)):
        params = request.params
        if not (params.logit_bias or params.min_tokens or params.bad_words):
            continue
        forbidden = _forbidden_ids(request, position, eos_token_ids)
        bias = dict.fromkeys(sorted(forbidden), -math.inf)
        for token, value in (params.logit_bias or {}).items():
            bias.setdefault(token, float(value))
        rows += [row] * len(bias)
        ids += bias.keys()
        values += bias.values()
    return rows, ids, values


def _forbidden_ids(request: Request, position: int, eos_token_ids: Collection[int]) -> set[int]:
    params = request.params
    forbidden: set[int] = set()
    if position - request.num_prompt_tokens < params.min_tokens:
        forbidden.update(params.stop_token_ids)
        if not params.ignore_eos:
            forbidden.update(eos_token_ids)
    for word in params.bad_words:
        prefix = word[:-1]
        if not prefix or tuple(request.last_output_tokens(len(prefix))) == prefix:
            forbidden.add(word[-1])
    return forbidden


def _end_with_grammar(
    mask: NDArray[np.uint32], request: Request, matcher: TokenMatcher, position: int, eos_token_ids: Collection[int]
) -> None:
    """Fit a grammar's mask to the request's ends and forbidden tokens. One that is left with nothing is a dead end."""
    params = request.params
    narrowed = params.allowed_token_ids is not None or not eos_token_ids
    if params.stop_token_ids or params.ignore_eos or params.min_tokens or params.bad_words:
        narrowed = True
        for token in params.stop_token_ids:
            _set_bit(mask, token, matcher.complete)
        forbidden = _forbidden_ids(request, position, eos_token_ids)
        if params.ignore_eos:
            forbidden.update(eos_token_ids)
        for token in forbidden:
            _set_bit(mask, token, False)
    if matcher.problem or (narrowed and not mask.any()):
        matcher.dead_end = True
        mask[:] = 0xFFFFFFFF  # what is sampled is not taken in


def _set_bit(mask: NDArray[np.uint32], token: int, value: bool) -> None:
    bit = np.uint32(1 << token % 32)
    mask[token // 32] = mask[token // 32] | bit if value else mask[token // 32] & ~bit


def _allowed_masks(params: Sequence[SamplingParams], vocab_size: int) -> NDArray[np.uint32] | None:
    if all(p.allowed_token_ids is None for p in params):
        return None
    return np.stack([_allowed_row(p.allowed_token_ids, vocab_size) for p in params])


@lru_cache(maxsize=256)
def _allowed_row(allowed: tuple[int, ...] | None, vocab_size: int) -> NDArray[np.uint32]:
    """u32 [ceil(V/32)] with bit v%32 of word v//32 set when token v may be sampled. Read-only: it is shared."""
    words = -(-vocab_size // 32)
    bits = np.zeros(words * 32, np.uint8)
    bits[:vocab_size] = allowed is None
    if allowed is not None:
        bits[list(allowed)] = 1
    row = np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)
    row.setflags(write=False)
    return row
