#!/usr/bin/env python3
"""What grammars cost, and what jump-ahead saves: the same requests on one engine, in two ways in turn.

    python scripts/structured_cost.py --model demo:smollm2-135m --pairs 15
    python scripts/structured_cost.py --model demo:smollm2-135m --pairs 15 --against sampled --schema keys --tokens 128

Each pair generates with --requests at once, all held by one JSON schema, and against that the same without the schema
(free), or without jump-ahead (sampled); in one process without HTTP; every other pair begins with the other. Counted
from the first step after all prompts are computed. Prints the medians, their ranges, the median of the ratios within
pairs, and how many tokens were forced.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from llmctl.bench.environment import describe_environment
from llmctl.bench.inprocess import prepare_engine
from llmctl.config import ServeConfig
from llmctl.engine.llm_engine import LLMEngine
from llmctl.engine.request import Request
from llmctl.engine.sampling_params import SamplingParams
from llmctl.structured.compiler import GrammarCompiler
from llmctl.structured.spec import json_schema

PROMPT = "Write a JSON list of people with name, age, tags and kind:\n"


def listed(**properties: Any) -> dict[str, Any]:
    """An array of objects with just these properties, so long that no output ends by itself."""
    item = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    return {"type": "array", "items": item, "minItems": 50}


SCHEMAS = {
    "people": listed(
        name={"type": "string", "maxLength": 40},
        age={"type": "integer"},
        tags={"type": "array", "items": {"type": "string"}},
        kind={"enum": ["person", "robot"]},
    ),
    "keys": listed(
        customer_identifier={"type": "integer"},
        given_and_family_name={"type": "string", "maxLength": 20},
        is_regular_customer={"type": "boolean"},
        number_of_items_ordered={"type": "integer"},
        total_price_in_cents={"type": "integer"},
        method_of_payment={"enum": ["credit_card_payment", "direct_bank_transfer", "cash_on_delivery"]},
        shipping_postal_code={"type": "string", "pattern": "^[0-9]{5}$"},
        estimated_delivery_days={"type": "integer", "maximum": 30},
    ),
}


def tokens_per_second(engine: LLMEngine, requests: Sequence[Request]) -> float:
    """Of decode steps with all requests in them."""
    engine.add_requests(requests)
    began, tokens = None, 0
    while engine.has_unfinished():
        outputs = engine.step()
        if began is not None:
            tokens += sum(len(output.new_token_ids) for output in outputs)
        elif len(outputs) == len(requests):
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
    parser.add_argument("--schema", choices=SCHEMAS, default="people")
    parser.add_argument("--against", choices=("free", "sampled"), default="free")
    options = parser.parse_args()
    config = replace(ServeConfig(), model=options.model, max_num_seqs=options.requests)
    benched = prepare_engine(config, requests=options.requests)
    engine, ids = benched.engine, benched.tokenizer.encode(PROMPT)
    compiler = GrammarCompiler(benched.tokenizer, engine.limits.vocab_size, engine.eos_token_ids)
    spec = json_schema(SCHEMAS[options.schema], "response_format")
    grammar = compiler.submit(spec, forcing=True).result()

    def requests(name: str, way: str) -> list[Request]:
        made = []
        for i in range(options.requests):
            held = way != "free"
            params = SamplingParams(
                max_tokens=options.tokens, seed=i, ignore_eos=True, temperature=0.8, grammar=spec if held else None
            )
            made.append(Request(f"{name}-{i}", ids, params, matcher=grammar.matcher() if held else None))
        return made

    def run(name: str, way: str) -> float:
        engine.jumps = way != "sampled"
        return tokens_per_second(engine, requests(name, way))

    ways = (options.against, "held")
    for way in ways:
        run(f"warm-{way}", way)
    before = engine.stats()
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for pair in range(options.pairs):
        for way in ways if pair % 2 == 0 else ways[::-1]:
            rates[way].append(run(f"{pair}-{way}", way))
    for way in ways:
        print(f"{way}: {median(rates[way]):.1f} tok/s ({min(rates[way]):.1f}-{max(rates[way]):.1f})")
    ratio = median(held / other for other, held in zip(*rates.values(), strict=True))
    print(f"held by a schema / {options.against}, median of {options.pairs} pairs: {ratio:.3f}")
    after = engine.stats()
    forced = after.num_forced_tokens - before.num_forced_tokens
    held_tokens = (after.num_generated_tokens - before.num_generated_tokens) / 2
    print(f"forced, of the tokens held by the schema: {forced / held_tokens:.1%}")
    print(describe_environment().get("cpu_model"))


if __name__ == "__main__":
    main()
