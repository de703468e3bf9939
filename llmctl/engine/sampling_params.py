"""How a request is sampled: the parameters, their ranges, and the seeds of its samples."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from llmctl.errors import RequestError
from llmctl.structured.spec import GrammarSpec

if TYPE_CHECKING:
    from llmctl.text.tokenizer import Tokenizer

_INDEX = re.compile(r"\$\[(\d+)\]")
"""Where msgspec found the first fault of a list, as it says."""

MAX_INT = 2**63 - 1
"""Of counts that nothing else bounds."""
MAX_LOGPROBS = 20
MAX_SAMPLES = 128
MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 1024
MAX_BAD_WORDS = 1024
MAX_BAD_WORD_CHARS = 256


@dataclass(frozen=True)
class Range:
    """The numbers from ``low`` (itself left out when ``open_low``) to ``high``; never NaN or infinite."""

    low: float
    high: float = math.inf
    open_low: bool = False

    def __contains__(self, value: float) -> bool:
        # isfinite overflows on an integer beyond a float's range, which is finite all the same.
        finite = isinstance(value, int) or math.isfinite(value)
        return finite and (self.low < value if self.open_low else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        text = f"greater than {self.low:g}" if self.open_low else f"at least {self.low:g}"
        return f"{text} and at most {self.high:g}" if math.isfinite(self.high) else text


LOGIT_BIAS = Range(-100, 100)
_BIAS = Annotated[float, msgspec.Meta(ge=LOGIT_BIAS.low, le=LOGIT_BIAS.high)]
RANGES = {
    "n": Range(1, MAX_SAMPLES),
    "temperature": Range(0),
    "top_k": Range(-1, MAX_INT),
    "top_p": Range(0, 1),
    "min_p": Range(0, 1),
    "repetition_penalty": Range(0, open_low=True),
    "presence_penalty": Range(-2, 2),
    "frequency_penalty": Range(-2, 2),
    "seed": Range(-(2**63), 2**64 - 1),
    "min_tokens": Range(0),
    "max_tokens": Range(0),
    "logprobs": Range(0, MAX_LOGPROBS),
    "prompt_logprobs": Range(0, MAX_LOGPROBS),
}
"""Of every number among the fields of SamplingParams, when it is not None."""


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled and when it ends. Names and defaults are vLLM's and OpenAI's.

    Attributes:
        n: samples wanted of one prompt; the engine runs each as a request of its own (see ``samples``).
        temperature: 0 = greedy. top_k: 0 or -1 = off. top_p: [0, 1], 0 = greedy, 1 = off. min_p: [0, 1], 0 = off.
        repetition_penalty: > 0, 1 = off. presence_penalty, frequency_penalty: [-2, 2], 0 = off.
        logit_bias: token id -> additive bias in [-100, 100].
        seed: None derives one from the engine's seed.
        stop: strings that end the output, at most 64 of at most 1024 characters, be they special tokens that the text
            leaves out. stop_token_ids: ids that end it.
        bad_words: token sequences that must not be produced (see ``bad_word_ids``).
        min_tokens: end-of-sequence and stop ids (and stop strings) are suppressed before that many tokens.
        max_tokens: None = up to the engine's max_model_len; 0 computes (and scores) the prompt only.
        ignore_eos: do not stop at end-of-sequence tokens.
        allowed_token_ids: only these may be sampled.
        grammar: what the output must match; the output ends when it can only be complete.
        logprobs: None = none; n = the sampled token's and the n most likely ones, at most 20.
        prompt_logprobs: None = none; n = every prompt token's after the first and the n most likely ones, at most 20.
        skip_special_tokens: leave special tokens out of the text, but for ``shown_special_token_ids``.
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
    shown_special_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    grammar: GrammarSpec | None = None

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
        return self.temperature == 0.0 or self.top_p == 0.0

    @property
    def penalised(self) -> bool:
        """Whether any penalty needs the request's token history."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def follows_output(self) -> bool:
        """Whether sampling needs the ids of the output so far, not only their count."""
        return self.penalised or self.grammar is not None or any(len(word) > 1 for word in self.bad_words)

    @property
    def singles_out_tokens(self) -> bool:
        """Whether it treats some tokens unlike others, so that no grammar may choose among spellings of a text."""
        listed = self.logit_bias or self.stop_token_ids or self.bad_words
        return bool(listed) or self.allowed_token_ids is not None

    def samples(self) -> tuple[SamplingParams, ...]:
        """Parameters of each of the ``n`` samples: n = 1, and a seed of its own.

        Sample 0 keeps the seed, so the first of many samples equals the only sample of the same request.
        """
        seeds = (derive_seed(self.seed, i) if i and self.seed is not None else self.seed for i in range(self.n))
        return tuple(self._sample(seed) for seed in seeds)

    def _sample(self, seed: int | None) -> SamplingParams:
        """As ``replace``, without checking again what may be many ids."""
        made = copy(self)
        object.__setattr__(made, "n", 1)
        object.__setattr__(made, "seed", seed)
        return made

    def check_vocab(self, vocab_size: int) -> None:
        """Refuse token ids that the model does not have.

        Raises:
            RequestError: an id outside ``0 .. vocab_size-1``.
        """
        groups: dict[str, Collection[int]] = {
            "logit_bias": self.logit_bias or (),
            "stop_token_ids": self.stop_token_ids,
            "allowed_token_ids": self.allowed_token_ids or (),
            "bad_words": tuple(chain.from_iterable(self.bad_words)),
        }
        for name, ids in groups.items():
            check_known(name, ids, vocab_size)


def check_known(name: str, ids: Collection[int], vocab_size: int) -> None:
    """Refuse token ids of a parameter that the model does not have.

    Raises:
        RequestError: an id outside ``0 .. vocab_size-1``.
    """
    token = unknown_id(ids, vocab_size)
    if token is not None:
        raise RequestError(
            f"{name}: token id {short_value(token)} is outside the vocabulary (0 to {vocab_size - 1})", param=name
        )


def unknown_id(ids: Collection[int], vocab_size: int) -> int | None:
    """The first of some token ids that is outside ``0 .. vocab_size-1``; None: there is none."""
    if not ids:
        return None
    found = [*ids]
    index = _first_unlike(found, Annotated[int, msgspec.Meta(ge=0, lt=vocab_size)])
    return None if index is None else found[index]


def _first_unlike(values: list[Any], wanted: Any) -> int | None:
    """The index of the first value that is not of a type as msgspec knows them, in one pass that takes less than max()
    alone; None: there is none."""
    try:
        msgspec.convert(values, list[wanted])
    except msgspec.ValidationError as error:
        index = _INDEX.search(str(error))
        assert index is not None
        return int(index[1])
    return None


def short_value(value: object) -> str:
    """A value in a message. The middle of a number of hundreds of digits says nothing."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:16]}…{text[-8:]} ({len(text)} characters)"


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_ints(values: Iterable[Any]) -> bool:
    """Whether all are integers, as fast as C goes through them."""
    return {int}.issuperset(map(type, values))


_NUMBERS = frozenset((int, float))


def _check_range(params: SamplingParams, name: str, allowed: Range) -> None:
    """Refuse a number that is out of its range, or of the wrong type."""
    value = getattr(params, name)
    kind = SamplingParams.__annotations__[name]
    if value is None and kind.endswith("None"):
        return
    whole = kind.startswith("int")
    if (_is_int(value) or (not whole and isinstance(value, float))) and value in allowed:
        return
    expected = "an integer" if whole else "a number"
    raise RequestError(f"{name}: expected {expected} {allowed}, found {short_value(value)}", param=name)


def _check_ranges(params: SamplingParams) -> None:
    for name, allowed in RANGES.items():
        _check_range(params, name, allowed)
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        raise RequestError(
            f"min_tokens: expected at most max_tokens ({short_value(params.max_tokens)}), "
            f"found {short_value(params.min_tokens)}",
            param="min_tokens",
        )


def _check_collections(params: SamplingParams) -> None:
    if isinstance(params.stop, str) or not all(isinstance(s, str) and s for s in params.stop):
        raise RequestError("stop: expected non-empty strings", param="stop")
    check_num_stops(len(params.stop))
    _check_lengths("stop", params.stop, MAX_STOP_CHARS)
    if params.logit_bias:
        tokens, biases = [*params.logit_bias], [*params.logit_bias.values()]
        _refuse_bias(tokens, biases, _first_unlike(tokens, int))
        check_biases(tokens, biases)
    if params.allowed_token_ids is not None and not params.allowed_token_ids:
        raise RequestError("allowed_token_ids: expected at least one token id, found none", param="allowed_token_ids")
    for name in ("stop_token_ids", "allowed_token_ids"):
        if not _are_ints(getattr(params, name) or ()):
            raise RequestError(f"{name}: expected integers", param=name)
    if not all(params.bad_words) or not _are_ints(chain.from_iterable(params.bad_words)):
        raise RequestError("bad_words: expected non-empty sequences of token ids", param="bad_words")


def check_biases(tokens: Sequence[int], biases: Sequence[float]) -> None:
    """Refuse biases of tokens that are out of their range.

    Raises:
        RequestError.
    """
    _refuse_bias(tokens, biases, _first_unlike([*biases], _BIAS))


def _refuse_bias(tokens: Sequence[int], biases: Sequence[float], wrong: int | None) -> None:
    """Refuse the bias at an index, if there is one."""
    if wrong is not None:
        raise RequestError(
            f"logit_bias: expected token ids with values {LOGIT_BIAS}, found {short_value(tokens[wrong])}: "
            f"{short_value(biases[wrong])}",
            param="logit_bias",
        )


def _check_lengths(name: str, texts: Sequence[str], most: int) -> None:
    longest = max(map(len, texts), default=0)
    if longest > most:
        raise RequestError(f"{name}: expected strings of at most {most} characters, found one of {longest}", param=name)


def derive_seed(seed: int, index: int) -> int:
    """An independent u64 seed for stream ``index`` of ``seed`` (blake2b of both)."""
    data = (seed % 2**64).to_bytes(8, "little") + index.to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, person=b"llmctl.seed").digest(), "little")


def check_bad_words(words: Sequence[str]) -> None:
    """Refuse forbidden words before anything is made of them.

    Raises:
        RequestError: an empty word, one of more than 256 characters, or more than 1024 words.
    """
    check_num_bad_words(len(words))
    _check_lengths("bad_words", words, MAX_BAD_WORD_CHARS)
    if not all(word.strip() for word in words):
        raise RequestError("bad_words: expected non-empty strings", param="bad_words")


def check_num_stops(count: int) -> None:
    """Refuse too many stop strings.

    Raises:
        RequestError.
    """
    if count > MAX_STOP_STRINGS:
        raise RequestError(f"stop: expected at most {MAX_STOP_STRINGS} strings, found {count}", param="stop")


def check_num_bad_words(count: int) -> None:
    """Refuse too many forbidden words.

    Raises:
        RequestError.
    """
    if count > MAX_BAD_WORDS:
        raise RequestError(f"bad_words: expected at most {MAX_BAD_WORDS} words, found {count}", param="bad_words")


def bad_word_ids(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Token sequences of forbidden words, each as it is spelt at a text's start and after a space.

    Raises:
        RequestError: as ``check_bad_words``.
    """
    check_bad_words(words)
    spellings = [spelling for word in words for spelling in (word.lstrip(), " " + word.lstrip())]
    found = dict.fromkeys(map(tuple, tokenizer.encode_each(spellings, add_special_tokens=False)))
    found.pop((), None)
    return tuple(found)
