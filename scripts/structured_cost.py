#!/usr/bin/env python3
"""What grammars cost: the same requests on one engine, all held by one JSON schema, and free, in turn.

    python scripts/structured_cost.py --model demo:smollm2-135m --pairs 15

Each pair generates with 32 requests at once, held and free, in one process without HTTP; every other pair begins with
the other. Counted from the first step after all prompts are computed. Prints the medians, their ranges, and the median
of the ratios within pairs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

from llmctl.bench.environment import describe_environment
from llmctl.bench.inprocess import prepare_engine
from llmctl.config import ServeConfig
from llmctl.engine.llm_engine import LLMEngine
from llmctl.engine.request import Request
from llmctl.engine.sampling_params import SamplingParams
from llmctl.structured.compiler import GrammarCompiler
from llmctl.structured.spec import json_schema

PROMPT = "Write a JSON list of people with name, age, tags and kind:\n"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "kind": {"enum": ["person", "robot"]},
    },
    "required": ["name", "age", "tags", "kind"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": PERSON, "minItems": 50}
"""Long enough that no output ends by itself."""


def tokens_per_second(engine: LLMEngine, requests: Sequence[Request]) -> float:
    """Of decode steps with all requests in them."""
    engine.add_requests(requests)
    began, tokens = None, 0
    while engine.has_unfinished():
        made = sum(len(output.new_token_ids) for output in engine.step())
        if began is not None:
            tokens += made
        elif made == len(requests):
            began = time.perf_counter()
    if began is None or not tokens:
        raise SystemExit("no step had all requests in it: fewer --requests")
    return tokens / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=16, help="of each output")
    parser.add_argument("--pairs", type=int, default=15)
    options = parser.parse_args()
    config = replace(ServeConfig(), model=options.model, max_num_seqs=options.requests)
    benched = prepare_engine(config, requests=options.requests)
    engine, ids = benched.engine, benched.tokenizer.encode(PROMPT)
    compiler = GrammarCompiler(benched.tokenizer, engine.limits.vocab_size, engine.eos_token_ids)
    spec = json_schema(SCHEMA, "response_format")
    grammar = compiler.submit(spec).result()

    def requests(name: str, held: bool) -> list[Request]:
        made = []
        for i in range(options.requests):
            params = SamplingParams(
                max_tokens=options.tokens, seed=i, ignore_eos=True, temperature=0.8, grammar=spec if held else None
            )
            made.append(Request(f"{name}-{i}", ids, params, matcher=grammar.matcher() if held else None))
        return made

    def run(name: str, held: bool) -> float:
        return tokens_per_second(engine, requests(name, held))

    for held in (False, True):
        run(f"warm-{held}", held)
    rates: dict[bool, list[float]] = {False: [], True: []}
    for pair in range(options.pairs):
        for held in (False, True) if pair % 2 == 0 else (True, False):
            rates[held].append(run(f"{pair}-{held}", held))
    for held, name in ((False, "free"), (True, "held")):
        print(f"{name}: {median(rates[held]):.1f} tok/s ({min(rates[held]):.1f}-{max(rates[held]):.1f})")
    ratio = median(held / free for free, held in zip(rates[False], rates[True], strict=True))
    print(f"held by a schema / free, median of {options.pairs} pairs: {ratio:.3f}")
    print(describe_environment().get("cpu_model"))


if __name__ == "__main__":
    main()
