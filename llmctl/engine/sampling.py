"""Sampling parameters of a request, and their translation into one plain ``SamplingBatch`` per step.

Nothing here touches logits: the runtime samples where the logits are.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmctl.engine.step import SamplingBatch
from llmctl.errors import RequestError

if TYPE_CHECKING:
    from llmctl.engine.request import Request
    from llmctl.text.tokenizer import Tokenizer

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 64


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled and when it ends. Names and defaults are vLLM's and OpenAI's.

    Attributes:
        n: samples wanted of one prompt; the engine runs each as a request of its own (see ``sample``).
        temperature: 0 = greedy. top_k: 0 or -1 = off. top_p: (0, 1], 1 = off. min_p: [0, 1], 0 = off.
        repetition_penalty: > 0, 1 = off. presence_penalty, frequency_penalty: [-2, 2], 0 = off.
        logit_bias: token id -> additive bias in [-100, 100].
        seed: None derives one from the engine's seed.
        stop: strings that end the output. stop_token_ids: token ids that end it.
        bad_words: token sequences that must not be produced (see ``bad_word_ids``).
        min_tokens: end-of-sequence and stop ids (and stop strings) are suppressed before that many tokens.
        max_tokens: None = up to the engine's max_model_len; 0 computes (and scores) the prompt only.
        ignore_eos: do not stop at end-of-sequence tokens.
        allowed_token_ids: only these may be sampled.
        logprobs: None = none; n = the sampled token's and the n most likely ones, at most 20.
        prompt_logprobs: 0 = the log-probability of every prompt token after the first; alternatives are not offered.
        skip_special_tokens: leave special tokens out of the text.
        include_stop_str_in_output: keep the stop string (or stop token) in the text.

    Raises:
        RequestError: a value out of range; ``param`` names the field.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    min_tokens: int = 0
    max_tokens: int | None = None
    ignore_eos: bool = False
    allowed_token_ids: tuple[int, ...] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids", "allowed_token_ids"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        _check_ranges(self)
        _check_collections(self)

    @property
    def greedy(self) -> bool:
        """Whether every token is the argmax."""
        return self.temperature == 0.0

    @property
    def penalised(self) -> bool:
        """Whether any penalty needs the request's token history."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def sample(self, index: int) -> SamplingParams:
        """Parameters of the ``index``-th of the ``n`` samples: n = 1, and a seed of its own.

        Sample 0 keeps the seed, so the first of many samples equals the only sample of the same request.
        """
        seed = self.seed
        if seed is not None and index:
            seed = derive_seed(seed, index)
        return replace(self, n=1, seed=seed)

    def check_vocab(self, vocab_size: int) -> None:
        """Refuse token ids that the model does not have.

        Raises:
            RequestError: an id outside ``0 .. vocab_size-1``.
        """
        groups: dict[str, Collection[int]] = {
            "logit_bias": self.logit_bias or (),
            "stop_token_ids": self.stop_token_ids,
            "allowed_token_ids": self.allowed_token_ids or (),
            "bad_words": [t for word in self.bad_words for t in word],
        }
        for name, ids in groups.items():
            for token in ids:
                if not 0 <= token < vocab_size:
                    raise RequestError(
                        f"{name}: token id {token} is outside the vocabulary (0 to {vocab_size - 1})", param=name
                    )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require(params: SamplingParams, name: str, low: float, high: float, *, open_low: bool = False) -> None:
    """Refuse a number outside [low, high] ((low, high] when ``open_low``), NaN, or one of the wrong type."""
    value = getattr(params, name)
    whole = SamplingParams.__annotations__[name].startswith("int")
    number = _is_int(value) or (not whole and isinstance(value, float))
    if number and math.isfinite(value) and (low < value if open_low else low <= value) and value <= high:
        return
    bounds = f"greater than {low:g}" if open_low else f"at least {low:g}"
    if math.isfinite(high):
        bounds += f" and at most {high:g}"
    kind = "an integer" if whole else "a number"
    raise RequestError(f"{name}: expected {kind} {bounds}, found {value!r}", param=name)


def _check_ranges(params: SamplingParams) -> None:
    infinity = math.inf
    _require(params, "n", 1, 128)
    _require(params, "temperature", 0, infinity)
    _require(params, "top_k", -1, infinity)
    _require(params, "top_p", 0, 1, open_low=True)
    _require(params, "min_p", 0, 1)
    _require(params, "repetition_penalty", 0, infinity, open_low=True)
    _require(params, "presence_penalty", -2, 2)
    _require(params, "frequency_penalty", -2, 2)
    _require(params, "min_tokens", 0, infinity)
    optional = {"seed": (-(2**63), 2**64 - 1), "max_tokens": (0, infinity), "logprobs": (0, MAX_LOGPROBS)}
    for name, (low, high) in optional.items():
        if getattr(params, name) is not None:
            _require(params, name, low, high)
    if params.prompt_logprobs is not None:
        _require(params, "prompt_logprobs", 0, 0)
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        raise RequestError(
            f"min_tokens: expected at most max_tokens ({params.max_tokens}), found {params.min_tokens}",
            param="min_tokens",
        )


def _check_collections(params: SamplingParams) -> None:
    if isinstance(params.stop, str) or not all(isinstance(s, str) and s for s in params.stop):
        raise RequestError("stop: expected non-empty strings", param="stop")
    if len(params.stop) > MAX_STOP_STRINGS:
        raise RequestError(f"stop: expected at most {MAX_STOP_STRINGS} strings, found {len(params.stop)}", param="stop")
    for token, bias in (params.logit_bias or {}).items():
        if not _is_int(token) or isinstance(bias, bool) or not isinstance(bias, int | float) or not abs(bias) <= 100:
            raise RequestError(
                f"logit_bias: expected token ids with values from -100 to 100, found {token!r}: {bias!r}",
                param="logit_bias",
            )
    if params.allowed_token_ids is not None and not params.allowed_token_ids:
        raise RequestError("allowed_token_ids: expected at least one token id, found none", param="allowed_token_ids")
    for name in ("stop_token_ids", "allowed_token_ids"):
        if not all(_is_int(token) for token in getattr(params, name) or ()):
            raise RequestError(f"{name}: expected integers", param=name)
    if not all(word and all(_is_int(token) for token in word) for word in params.bad_words):
        raise RequestError("bad_words: expected non-empty sequences of token ids", param="bad_words")


FIELD_NAMES = frozenset(f.name for f in fields(SamplingParams))


def derive_seed(seed: int, index: int) -> int:
    """An independent u64 seed for stream ``index`` of ``seed`` (blake2b of both)."""
    data = (seed % 2**64).to_bytes(8, "little") + index.to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, person=b"llmctl.seed").digest(), "little")


def bad_word_ids(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Token sequences of forbidden words, each as it is spelt at a text's start and after a space.

    Raises:
        RequestError: an empty word.
    """
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        if not word.strip():
            raise RequestError("bad_words: expected non-empty strings", param="bad_words")
        for spelling in (word.lstrip(), " " + word.lstrip()):
            ids = tuple(tokenizer.encode(spelling, add_special_tokens=False))
            if ids:
                found[ids] = None
    return tuple(found)


class SamplingBatcher:
    """Makes the SamplingBatch of each step.

    Most steps sample the very requests that the last one did. Then only the positions are new, and whatever else
    follows the requests' output; all other columns are the arrays of the last batch.

    Args:
        vocab_size: width of the logits. eos_token_ids: suppressed while a row is short of its ``min_tokens``.
    """

    def __init__(self, vocab_size: int, eos_token_ids: Collection[int] = frozenset()) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._requests: tuple[Request, ...] | None = None
        self._columns: dict[str, Any] = {}
        self._penalised = self._biased = False

    def batch(self, requests: tuple[Request, ...]) -> SamplingBatch:
        """The batch of the requests whose next token is to be sampled, in row order."""
        if requests != self._requests:  # by identity: requests have no equality of their own
            self._requests = requests
            self._set_columns([r.params for r in requests], [r.seed for r in requests])
        columns = self._columns
        if self._penalised or self._biased:
            columns = {**columns, **self._following_output(requests)}
        return SamplingBatch(positions=np.array([len(r.token_ids) for r in requests], np.int64), **columns)

    def _set_columns(self, params: Sequence[SamplingParams], seeds: list[int]) -> None:
        self._penalised = any(p.penalised for p in params)
        self._biased = any(p.logit_bias or p.min_tokens or p.bad_words for p in params)
        self._columns = {
            "temperature": np.array([p.temperature for p in params], np.float32),
            "seeds": np.array(seeds, np.uint64),
            "top_k": _column(params, lambda p: 0 if p.greedy else max(p.top_k, 0), 0, np.int32),
            "top_p": _column(params, lambda p: 1.0 if p.greedy else p.top_p, 1.0, np.float32),
            "min_p": _column(params, lambda p: 0.0 if p.greedy else p.min_p, 0.0, np.float32),
            "repetition_penalty": _column(params, lambda p: p.repetition_penalty, 1.0, np.float32),
            "presence_penalty": _column(params, lambda p: p.presence_penalty, 0.0, np.float32),
            "frequency_penalty": _column(params, lambda p: p.frequency_penalty, 0.0, np.float32),
            "allowed_mask": _allowed_masks(params, self._vocab_size),
            "num_logprobs": _column(params, lambda p: -1 if p.logprobs is None else p.logprobs, -1, np.int32),
        }

    def _following_output(self, requests: Sequence[Request]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self._penalised:
            found["prompt_ids"] = tuple(_history(r, r.prompt_token_ids) for r in requests)
            found["output_ids"] = tuple(_history(r, r.output_token_ids) for r in requests)
        rows, ids, values = _biases(requests, self._eos_token_ids)
        if rows:
            found["bias_rows"] = np.array(rows, np.int32)
            found["bias_ids"] = np.array(ids, np.int32)
            found["bias_values"] = np.array(values, np.float32)
        return found


def _history(request: Request, ids: Sequence[int]) -> NDArray[np.int32]:
    """Token history for the penalties; empty for a row that has none."""
    return np.array(ids if request.params.penalised else (), np.int32)


def _column(
    params: Sequence[SamplingParams], value: Callable[[SamplingParams], float], off: float, dtype: Any
) -> NDArray[Any] | None:
    """One value a row, or None when every row has it off."""
    values = [value(p) for p in params]
    return np.array(values, dtype) if any(v != off for v in values) else None


def _biases(requests: Sequence[Request], eos_token_ids: Collection[int]) -> tuple[list[int], list[int], list[float]]:
    """Coordinates of every additive bias: logit_bias, min_tokens' suppressed ids, and bad words about to complete."""
    rows: list[int] = []
    ids: list[int] = []
    values: list[float] = []
    for row, request in enumerate(requests):
        params = request.params
        if not (params.logit_bias or params.min_tokens or params.bad_words):
            continue
        forbidden = _forbidden_ids(request, eos_token_ids)
        bias = dict.fromkeys(sorted(forbidden), -math.inf)
        for token, value in (params.logit_bias or {}).items():
            bias.setdefault(token, float(value))
        rows += [row] * len(bias)
        ids += bias.keys()
        values += bias.values()
    return rows, ids, values


def _forbidden_ids(request: Request, eos_token_ids: Collection[int]) -> set[int]:
    params = request.params
    forbidden: set[int] = set()
    if request.num_output_tokens < params.min_tokens:
        forbidden.update(params.stop_token_ids)
        if not params.ignore_eos:
            forbidden.update(eos_token_ids)
    for word in params.bad_words:
        prefix = word[:-1]
        if not prefix or tuple(request.last_output_tokens(len(prefix))) == prefix:
            forbidden.add(word[-1])
    return forbidden


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
