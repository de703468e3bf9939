"""Grammars compiled for one tokenizer, by llguidance, in threads beside the engine.

llguidance compiles in about a millisecond and makes masks lazily, in tens of microseconds; what it makes of a grammar
is shared by all requests with that grammar. Its limits bound what a hostile grammar takes (``_LIMITS``); what it does
not implement it refuses by name.
"""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from llmctl.errors import RequestError
from llmctl.niceness import be_a_nice_thread
from llmctl.structured.gbnf import gbnf_to_lark
from llmctl.structured.matcher import STEP_SECONDS, TOO_SLOW, TokenMatcher
from llmctl.structured.regex import quoted
from llmctl.structured.repeated_keys import counts_repeated_keys
from llmctl.structured.spec import ANSWER, GrammarSpec

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

    from llmctl.text.tokenizer import Tokenizer

Made = TypeVar("Made")

THREADS = 2
STACK_BYTES = 256 << 20
"""Of a compiling thread, of which only what is used is there. llguidance recurses along chains of rules and ``$ref``: a
source of ``MAX_SOURCE_CHARS`` that is nothing but a chain overflowed 32 MiB."""
MAX_CACHED = 64
MAX_CACHED_CHARS = 1 << 20
"""Of the sources of all that is cached: a grammar takes some 10 bytes a character, and what masks have been made of."""

# White space between the tokens of a JSON text: a space, or one or two line breaks and an indentation of up to 20, as
# llama.cpp has it. So there is no endless white space.
_JSON_SPACE = r"( |\n{1,2}[ \t]{0,20})?"
# In the place of what a schema may bring under "x-guidance": it could weaken itself.
_JSON_OPTIONS = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_flexible": True,
    "whitespace_pattern": _JSON_SPACE,
    "coerce_one_of": False,
    "lenient": False,
    # One spelling of a character: a name that a schema spells out must not come again as "\u0061".
    "json_allowed_escapes": '"\\bfnrt',
    "json_allow_general_unicode_escapes": False,
}
# In the first line: errors count lines. Where only one text can follow, llguidance allows one token, of the text as the
# tokenizer spells it and short of where what comes after it may join in; or every token that begins the text.
_HEADERS = {True: "%llguidance {} ", False: '%llguidance {"no_forcing": true} '}
_EXCERPT = re.compile(r"\n\s*\d+ \| ")
_PLACE = re.compile(r"^at \d+\(\d+\): (failed to compile JSON schema: )?")
_MAX_MESSAGE = 400
_NICENESS = 3
"""How much nicer than the worker threads that compile are: of a busy processor they get the smaller share. Not the
smallest, at which grammars of some ms took more than ``grammar_queue.COMPILE_SECONDS`` beside other processes."""
_PROBES = ("name", " name", 'a": "b', "x1 \u00e9\n")
_MIN_PROPERTIES = "minProperties above 1 and the number of required properties, where others may be added"


class CompiledGrammar:
    """What the requests with one grammar share."""

    def __init__(self, prototype: LLMatcher, num_words: int) -> None:
        self._prototype = prototype
        self._num_words = num_words

    def matcher(self) -> TokenMatcher:
        """The state of a new output."""
        return TokenMatcher(self._prototype.deep_copy(), self._num_words)


class GrammarCompiler:
    """Compiles grammars off the thread that asks, and remembers the latest ones, those that were refused too.

    Args:
        tokenizer: of the model, or what reads it. vocab_size: width of its logits. eos_token_ids: allowed when a
            grammar is complete.
    """

    def __init__(
        self, tokenizer: Tokenizer | Callable[[], Tokenizer], vocab_size: int, eos_token_ids: Collection[int]
    ) -> None:
        self._model_tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = sorted(eos_token_ids)
        self._pool = ThreadPoolExecutor(
            THREADS, thread_name_prefix="llmctl-grammar", initializer=be_a_nice_thread, initargs=(_NICENESS,)
        )
        self._lock = threading.Lock()
        self._cache: OrderedDict[tuple[GrammarSpec, bool], Future[CompiledGrammar]] = OrderedDict()
        self._clocks: dict[tuple[GrammarSpec, bool], Callable[[], float]] = {}
        # Not with the first grammar: half a second of work, for which these threads may wait long on a busy machine.
        self._start(lambda: self._tokenizer)

    def submit(self, spec: GrammarSpec, *, forcing: bool = False) -> Future[CompiledGrammar]:
        """The compiled grammar, in the future; shared with others who ask for the same.

        Args:
            forcing: where only one text can follow, allow only the tokens that spell it as the tokenizer does; without
                effect where that puts something before its texts.

        The future raises RequestError for a grammar that is malformed, unsupported, too large, or matches nothing.
        """
        key = spec, forcing
        found = self._cache.get(key)
        if found is None:
            found = self._cache[key] = self._start(lambda: self._compile_timed(key))
            self._evict()
        self._cache.move_to_end(key)
        return found

    def processor_seconds(self, spec: GrammarSpec, *, forcing: bool) -> float:
        """What the compiling of a grammar has had of a processor so far; 0 before and after."""
        clock = self._clocks.get((spec, forcing))
        return 0.0 if clock is None else clock()

    def _compile_timed(self, key: tuple[GrammarSpec, bool]) -> CompiledGrammar:
        clock = self._clocks[key] = _thread_clock()
        try:
            return self.compile(*key)
        finally:
            if self._clocks.get(key) is clock:  # else another thread compiles it too: it was evicted meanwhile
                self._clocks.pop(key, None)

    def close(self) -> None:
        """Begin nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _start(self, work: Callable[[], Made]) -> Future[Made]:
        before = threading.stack_size(STACK_BYTES)  # of threads that are started now: the pool starts them here
        try:
            return self._pool.submit(work)
        finally:
            threading.stack_size(before)

    def _evict(self) -> None:
        while len(self._cache) > MAX_CACHED or sum(len(spec.source) for spec, _ in self._cache) > MAX_CACHED_CHARS:
            self._cache.popitem(last=False)

    def compile(self, spec: GrammarSpec, forcing: bool = False) -> CompiledGrammar:
        """Compile now, in a thread with a stack of ``STACK_BYTES``.

        Raises:
            RequestError: see ``submit``.
        """
        tokenizer, exact = self._tokenizer
        header = _HEADERS[forcing and exact]
        grammar = header + _llguidance_grammar(spec)
        made = _compiled(spec, grammar, tokenizer, self._eos_token_ids)
        if not spec.before:
            return made
        # By itself first: what is wrong with it is told as if nothing came before it.
        parts = [{"lark_grammar": header + spec.before}, {"name": ANSWER, "lark_grammar": grammar}]
        return _compiled(spec, json.dumps({"grammars": parts}), tokenizer, self._eos_token_ids)

    @property
    def _tokenizer(self) -> tuple[LLTokenizer, bool]:
        with self._lock:
            return self._vocabulary

    @cached_property
    def _vocabulary(self) -> tuple[LLTokenizer, bool]:
        """llguidance's, and whether it may force the spelling of a text."""
        from llguidance import LLTokenizer

        tokenizer = self._model_tokenizer
        made: Any = _Vocabulary(
            tokenizer() if callable(tokenizer) else tokenizer, self._vocab_size, self._eos_token_ids
        )
        return LLTokenizer(made, eos_token=self._eos_token_ids or None), made.exact


def _compiled(spec: GrammarSpec, grammar: str, tokenizer: LLTokenizer, eos_token_ids: Sequence[int]) -> CompiledGrammar:
    from llguidance import LLMatcher

    prototype = LLMatcher(tokenizer, grammar, log_level=0, limits=_limits())
    before = time.thread_time()
    first = np.frombuffer(prototype.compute_bitmask(), np.uint8)
    if prototype.is_error():
        raise _refusal(spec, prototype.get_error())
    if time.thread_time() - before > STEP_SECONDS:
        raise _refusal(spec, TOO_SLOW)
    allowed = np.flatnonzero(np.unpackbits(first, bitorder="little"))
    if not len(np.setdiff1d(allowed, eos_token_ids)):
        raise _refusal(spec, "it matches no text, or the empty text only")
    return CompiledGrammar(prototype, len(first) // 4)


class _Vocabulary:
    """A tokenizer as llguidance asks for it: the bytes of every id; none for one that no text can hold."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: list[int]) -> None:
        self._tokenizer = tokenizer
        self.special_token_ids = sorted(i for i in tokenizer.special_token_ids if i < vocab_size)
        self.tokens = [tokenizer.token_bytes(i) for i in range(vocab_size)]
        self.eos_token_id = eos_token_ids[0] if eos_token_ids else vocab_size
        if not eos_token_ids:  # llguidance wants one: an id that there is not
            self.tokens.append(b"<end>")
            self.special_token_ids.append(vocab_size)
        no_text = {*self.special_token_ids, *eos_token_ids}
        self._text_ids = {i for i, data in enumerate(self.tokens) if data and i not in no_text}
        self._ids = {self.tokens[i]: i for i in sorted(self._text_ids)}
        self._most_bytes = max(map(len, self._ids), default=1)

    @property
    def exact(self) -> bool:
        """Whether texts are spelt as the tokenizer does. Some put a space before each."""
        return all(self._spelt(text) is not None for text in _PROBES)

    def __call__(self, text: str) -> list[int]:
        """Tokens with just this text's bytes, none of them special."""
        spelt = self._spelt(text)  # None: a special token's text
        return self._longest(text.encode()) if spelt is None else spelt

    def _spelt(self, text: str) -> list[int] | None:
        """As the tokenizer spells it, if that has the text's bytes."""
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        if not self._text_ids.issuperset(ids) or b"".join(self.tokens[i] for i in ids) != text.encode():
            return None
        return ids

    def _longest(self, data: bytes) -> list[int]:
        found, at = list[int](), 0
        while at < len(data):
            sizes = range(min(self._most_bytes, len(data) - at), 0, -1)
            size = next((n for n in sizes if data[at : at + n] in self._ids), 0)
            if not size:  # no token has this byte: nothing can follow
                break
            found.append(self._ids[data[at : at + size]])
            at += size
        return found


def _limits() -> LLParserLimits:
    """What compiling and a step may take. Ordinary schemas take less than a quarter of each."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=50_000,
        step_lexer_fuel=50_000,
        step_max_items=50_000,
        max_lexer_states=10_000,
        max_grammar_size=100_000,
        verbose_errors=False,
    )


def _llguidance_grammar(spec: GrammarSpec) -> str:
    try:
        return _lark(spec)
    except (ValueError, RecursionError) as error:
        if isinstance(error, RequestError):
            raise
        raise _refusal(spec, str(error)) from error


def _lark(spec: GrammarSpec) -> str:
    if spec.kind == "json_schema":
        return _json_rule("start", json.loads(spec.source), spec)
    if spec.kind == "lark_json":
        parts = json.loads(spec.source)
        return parts["lark"] + "".join(_json_rule(name, schema, spec) for name, schema in parts["schemas"].items())
    if spec.kind == "regex":
        return _regex(spec.source)
    if spec.kind == "choice":
        return _regex("|".join(quoted(text) for text in json.loads(spec.source)))
    return gbnf_to_lark(spec.source) if spec.kind == "gbnf" else spec.source


def _json_rule(name: str, schema: dict[str, Any], spec: GrammarSpec) -> str:
    """The rule of this name that matches a schema."""
    if counts_repeated_keys(schema):
        raise _refusal(spec, _MIN_PROPERTIES)
    return f"{name}: %json {json.dumps(schema | {'x-guidance': _JSON_OPTIONS}, ensure_ascii=False)}\n"


def _regex(source: str) -> str:
    from llguidance import LLMatcher

    grammar: str = json.loads(LLMatcher.grammar_from_regex(source))["grammars"][0]["lark_grammar"]
    return grammar


def _refusal(spec: GrammarSpec, text: str) -> RequestError:
    text = _EXCERPT.split(text.replace("<non-verbose/>", ""))[0]
    line = " ".join(text.split())
    if spec.kind != "lark":  # a place in Lark that nobody wrote
        line = _PLACE.sub("", line)
    if len(line) > _MAX_MESSAGE:
        line = line[:_MAX_MESSAGE] + "…"
    return RequestError(f"{spec.param}: cannot be enforced: {line}", param=spec.param)


def _thread_clock() -> Callable[[], float]:
    """The processor time that the calling thread takes from now on, for other threads to read while it lives; infinite
    where the system does not tell."""
    if not hasattr(time, "pthread_getcpuclockid"):
        return lambda: math.inf
    clock = time.pthread_getcpuclockid(threading.get_ident())
    begun = time.clock_gettime(clock)
    return lambda: time.clock_gettime(clock) - begun
