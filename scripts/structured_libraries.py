#!/usr/bin/env python3
"""The libraries that structured output could stand on, side by side: llguidance, which it does, and xgrammar.

    python scripts/structured_libraries.py --model demo:smollm2-135m --library llguidance
    python scripts/structured_libraries.py --model demo:smollm2-135m --library xgrammar    # pip install xgrammar

One library a process, because what importing it takes is a part of the answer. Schemas are compiled for the model's
vocabulary; then each is walked: a mask, one of the tokens it allows, drawn with a seed, taken in, up to --tokens times.
Last, schemas with keywords that few implement: a library enforces them, refuses them, or takes them in silence.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import mean, median
from typing import Any, Protocol

import numpy as np
import psutil
from md_table import print_table
from numpy.typing import NDArray

from llmctl.bench.environment import describe_environment
from llmctl.bench.inprocess import prepare_engine
from llmctl.config import ServeConfig
from llmctl.structured.compiler import GrammarCompiler
from llmctl.structured.spec import json_schema
from llmctl.text.tokenizer import Tokenizer

TEXT: dict[str, Any] = {"type": "string"}
WHOLE: dict[str, Any] = {"type": "integer"}


def record(**properties: Any) -> dict[str, Any]:
    """An object with just these properties."""
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


def listed(items: Any, **keywords: Any) -> dict[str, Any]:
    """An array."""
    return {"type": "array", "items": items, **keywords}


ADDRESS = record(street=TEXT, zip={"type": "string", "pattern": "^[0-9]{5}$"}, country={"enum": ["de", "fr", "us"]})
NODE = {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}
SCHEMAS: Sequence[dict[str, Any]] = (
    record(name=TEXT, age=WHOLE),
    record(name={**TEXT, "minLength": 1, "maxLength": 40}, age={**WHOLE, "minimum": 0, "maximum": 150}),
    record(answer={"enum": ["yes", "no", "maybe"]}, why=TEXT),
    record(people=listed(record(name=TEXT, address=ADDRESS))),
    record(steps=listed(record(explanation=TEXT, output=TEXT)), final_answer=TEXT),
    record(matrix=listed(listed({"type": "number"}, minItems=3, maxItems=3), minItems=2, maxItems=2)),
    record(a=record(b=record(c=record(d=record(e=TEXT))))),
    record(e={"enum": [f"value-{i}" for i in range(500)]}),
    record(**{f"field_{i}": WHOLE for i in range(60)}),
    {"type": "object", "properties": {f"field_{i}": WHOLE for i in range(60)}, "additionalProperties": False},
    {"type": "object"},
    {"type": "object", "additionalProperties": WHOLE},
    {"$ref": "#/$defs/node", "$defs": {"node": record(value=WHOLE, next=NODE)}},
    listed({"anyOf": [record(type={"const": f"t{i}"}, value=TEXT) for i in range(20)]}),
    listed({**TEXT, "minLength": 1, "maxLength": 64}, minItems=1, maxItems=100),
    {"type": "string", "minLength": 10, "maxLength": 300},
    {"type": "string", "format": "date-time"},
    {"type": "string", "format": "uuid"},
    {"type": "string", "pattern": "^(red|green|blue)( (light|dark))?$"},
    {"type": "integer", "minimum": 17, "maximum": 4711},
    {"type": "number", "minimum": -1.5, "exclusiveMaximum": 100},
)
RARE: dict[str, dict[str, Any]] = {
    "uniqueItems": listed(WHOLE, uniqueItems=True),
    "contains": listed({}, contains=WHOLE),
    "not": {"not": TEXT},
    "if": {"if": TEXT, "then": {"minLength": 3}},
    "propertyNames": {"type": "object", "propertyNames": {"pattern": "^a"}},
    "dependentRequired": {"type": "object", "dependentRequired": {"a": ["b"]}},
    "unevaluatedProperties": {"type": "object", "unevaluatedProperties": False},
    "an unknown format": {"type": "string", "format": "foo"},
    "look-ahead": {"type": "string", "pattern": "^a(?=b)"},
    "a remote $ref": {"$ref": "http://example.org/schema"},
    "an overlapping oneOf": {"oneOf": [WHOLE, {"type": "number"}]},
    "$dynamicRef": {"$dynamicRef": "#a"},
    "minContains": {"type": "array", "minContains": 1},
}


class Matcher(Protocol):
    """One output's place in its grammar."""

    def fill(self, row: NDArray[np.uint32]) -> None: ...

    def accept(self, token_id: int) -> bool: ...


class Library(Protocol):
    """What is compared."""

    def compile(self, schema: dict[str, Any]) -> Callable[[], Matcher]:
        """What makes matchers of a schema; raises where it is refused."""
        ...


class Llguidance:
    """As llmctl uses it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        import llguidance  # noqa: F401

        self._compiler = GrammarCompiler(tokenizer, vocab_size, tokenizer.eos_token_ids)

    def compile(self, schema: dict[str, Any]) -> Callable[[], Matcher]:
        return self._compiler.compile(json_schema(schema, "schema")).matcher


class Xgrammar:
    """With the white space that it takes by itself, on two threads, without a cache."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        import xgrammar

        special = tokenizer.special_token_ids
        texts = [b"" if i in special else tokenizer.token_bytes(i) for i in range(vocab_size)]
        raw = xgrammar.VocabType.RAW
        ends = sorted(tokenizer.eos_token_ids)
        info = xgrammar.TokenizerInfo(texts, raw, vocab_size=vocab_size, stop_token_ids=ends)
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=2, cache_enabled=False)
        self._matcher = xgrammar.GrammarMatcher

    def compile(self, schema: dict[str, Any]) -> Callable[[], Matcher]:
        made = self._compiler.compile_json_schema(json.dumps(schema), any_whitespace=True, strict_mode=False)
        return lambda: _XgrammarMatcher(self._matcher(made))


class _XgrammarMatcher:
    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def fill(self, row: NDArray[np.uint32]) -> None:
        import torch

        self._matcher.fill_next_token_bitmask(torch.from_numpy(row.view(np.int32))[None])

    def accept(self, token_id: int) -> bool:
        return not self._matcher.accept_token(token_id) or bool(self._matcher.is_terminated())


LIBRARIES: dict[str, Callable[[Tokenizer, int], Library]] = {"llguidance": Llguidance, "xgrammar": Xgrammar}


def timed(times: list[float], work: Callable[..., Any], *arguments: Any) -> Any:
    """What ``work`` gives; the seconds it took go to ``times``."""
    began = time.perf_counter()
    made = work(*arguments)
    times.append(time.perf_counter() - began)
    return made


def walk(matcher: Matcher, vocab_size: int, tokens: int, masks: list[float], taken: list[float]) -> None:
    """Write as much of an output, at random."""
    draws = random.Random(0)
    row = np.zeros(-(-vocab_size // 32), np.uint32)
    for _ in range(tokens):
        timed(masks, matcher.fill, row)
        allowed = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))
        if not len(allowed) or timed(taken, matcher.accept, int(draws.choice(allowed))):
            return


def takes(library: Library, schema: dict[str, Any]) -> bool:
    """Whether it does not refuse the schema."""
    try:
        library.compile(schema)
    except Exception:  # each has errors of its own
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--library", choices=LIBRARIES, required=True)
    parser.add_argument("--tokens", type=int, default=64, help="of each walk")
    options = parser.parse_args()
    benched = prepare_engine(replace(ServeConfig(), model=options.model))
    vocab_size = benched.engine.limits.vocab_size
    memory, loading = psutil.Process().memory_info().rss, list[float]()
    library = timed(loading, LIBRARIES[options.library], benched.tokenizer, vocab_size)
    timed(loading, library.compile, SCHEMAS[0])  # with it, what is made once for the vocabulary
    memory = psutil.Process().memory_info().rss - memory
    compiling, masks, taken = list[float](), list[float](), list[float]()
    for schema in SCHEMAS:
        walk(timed(compiling, library.compile, schema)(), vocab_size, options.tokens, masks, taken)
    rare = [name for name, schema in RARE.items() if takes(library, schema)]
    rows = [
        ["import, and what is made for a vocabulary", f"{sum(loading):.2f} s, {memory / 2**20:.0f} MiB"],
        ["compile, median / worst", f"{1e3 * median(compiling):.1f} / {1e3 * max(compiling):.1f} ms"],
        ["mask, mean / p99", f"{1e6 * mean(masks):.0f} / {1e6 * float(np.percentile(masks, 99)):.0f} µs"],
        ["taking a token in, mean", f"{1e6 * mean(taken):.1f} µs"],
        [f"of {len(RARE)} schemas with rare keywords, not refused", ", ".join(rare) or "none"],
    ]
    print_table(["", options.library], rows)
    print(f"{vocab_size} tokens; {describe_environment()['cpu_model']}")


if __name__ == "__main__":
    main()
