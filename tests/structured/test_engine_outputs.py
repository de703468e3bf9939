"""Whole outputs of the engine, from a runtime that picks any allowed token: what ended with ``stop`` is valid."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jsonschema_rs
import pytest
from engine.fake_runtime import FakeRuntime
from small_tokenizers import byte_level
from structured.schemas import random_schema

from llmctl.engine.llm_engine import LLMEngine
from llmctl.engine.output import OutputProcessor, TextOutput, merge_outputs
from llmctl.engine.request import FinishReason, Request
from llmctl.engine.sampling_params import SamplingParams
from llmctl.engine.scheduler_config import SchedulerConfig
from llmctl.errors import LlmctlError, RequestError
from llmctl.structured.compiler import GrammarCompiler
from llmctl.structured.matcher import TokenMatcher
from llmctl.structured.spec import GrammarSpec, json_schema

TOKENIZER = byte_level()
EOS = TOKENIZER.eos_token_ids
COMPILER = GrammarCompiler(TOKENIZER, TOKENIZER.vocab_size, EOS)


class Run:
    """An engine of random tokens, small enough to preempt, and the texts of its outputs."""

    def __init__(self, *, blocks: int = 60, in_flight: int = 1, eos: frozenset[int] = EOS) -> None:
        self.runtime = FakeRuntime(blocks, 4, 160, TOKENIZER.vocab_size, in_flight)
        self.engine = LLMEngine(self.runtime, SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=32), eos)
        self.failed: dict[str, LlmctlError] = {}
        self.engine.on_failed = self.failed.__setitem__
        self._texts = OutputProcessor(TOKENIZER)
        self._parts: dict[str, list[TextOutput]] = {}

    def add(self, name: str, params: SamplingParams, compiler: GrammarCompiler = COMPILER) -> None:
        grammar = params.grammar
        matcher = None
        if grammar is not None:
            matcher = compiler.submit(grammar, forcing=not params.singles_out_tokens).result().matcher()
        self.engine.add_request(Request(name, [7, 8, 9], params, matcher=matcher))
        self._texts.add(name, [7, 8, 9], params)

    def outputs(self) -> dict[str, TextOutput]:
        while self.engine.has_unfinished():
            processed = self._texts.process(self.engine.step())
            self.engine.abort(processed.aborts)
            for output in processed.outputs:
                self._parts.setdefault(output.request_id, []).append(output)
        return {name: merge_outputs(parts) for name, parts in self._parts.items()}


def constrained(spec: GrammarSpec, **options: Any) -> SamplingParams:
    return SamplingParams(grammar=spec, **{"max_tokens": 150, **options})


def _valid_outputs(seeds: Sequence[int], **engine: Any) -> Counter[str]:
    """What became of random schemas, three outputs each."""
    run = Run(**engine)
    validators: dict[str, jsonschema_rs.Draft202012Validator] = {}
    seen: Counter[str] = Counter()
    for seed in seeds:
        schema = random_schema(random.Random(seed))
        try:
            for sample in range(3):
                spec = json_schema(schema, "x")
                # A preference for what closes: else few outputs end within the context.
                bias = dict.fromkeys(_closing(), 100.0) if sample else None
                run.add(f"{seed}-{sample}", constrained(spec, seed=sample, logit_bias=bias if sample == 2 else None))
        except RequestError:
            seen["refused"] += 1
            continue
        validator = jsonschema_rs.Draft202012Validator(schema, validate_formats=True)
        validators |= {f"{seed}-{sample}": validator for sample in range(3)}
    for name, output in run.outputs().items():
        seen[str(output.finish_reason)] += 1
        if output.finish_reason is FinishReason.STOP:
            assert validators[name].is_valid(json.loads(output.text)), (name, output.text)
            assert output.stop_reason is None
    assert not run.failed
    seen["preempted"] = run.engine.stats().num_preemptions
    return seen


def _closing() -> list[int]:
    return [i for i in range(TOKENIZER.vocab_size) if TOKENIZER.token_bytes(i) in (b'"', b"}", b"]")]


def test_whatever_ends_with_stop_is_valid() -> None:
    seen = _valid_outputs(range(60), blocks=100)
    assert seen["stop"] > 80
    assert seen["length"]
    assert seen["refused"] < 25


@pytest.mark.slow
@pytest.mark.parametrize("in_flight", [1, 2])
def test_a_thousand_schemas(in_flight: int) -> None:
    total: Counter[str] = Counter()
    for begin in range(0, 1000, 50):
        total += _valid_outputs(range(begin, begin + 50), blocks=70, in_flight=in_flight)
    assert total["stop"] > 1200
    assert total["preempted"] > 20
    assert total["refused"] < 350


@pytest.mark.parametrize("in_flight", [1, 2])
def test_an_output_is_the_same_alone_and_among_others_that_preempt_it(in_flight: int) -> None:
    spec = json_schema({"type": "array", "items": {"type": "integer"}, "minItems": 12}, "x")
    params = [constrained(spec, seed=i, max_tokens=60) for i in range(6)]
    alone = []
    for each in params:
        run = Run()
        run.add("a", each)
        alone.append(run.outputs()["a"].token_ids)
    run = Run(blocks=24, in_flight=in_flight)
    for i, each in enumerate(params):
        run.add(str(i), each)
        run.add(f"free {i}", SamplingParams(max_tokens=20, seed=i))
    found = run.outputs()
    assert run.engine.stats().num_preemptions > 2
    assert [found[str(i)].token_ids for i in range(6)] == alone


@pytest.mark.parametrize("eos", [EOS, frozenset[int]()])
def test_an_output_ends_with_its_grammar(eos: frozenset[int]) -> None:
    """With its last character in it, and without a step for an end-of-sequence token; also where there is none."""
    compiler = GrammarCompiler(TOKENIZER, TOKENIZER.vocab_size, eos)
    run = Run(eos=eos)
    run.add("a", constrained(GrammarSpec("regex", "[a-c]{3}x")), compiler)
    run.add("n", constrained(GrammarSpec("regex", "[a-c]{3}x"), min_tokens=30), compiler)
    run.add("i", constrained(GrammarSpec("regex", "[a-c]{2,40}"), ignore_eos=True), compiler)
    run.add("e", constrained(GrammarSpec("regex", "(a|bc)?"), max_tokens=5), compiler)
    found = run.outputs()
    for name in "an":
        assert re.fullmatch("[a-c]{3}x", found[name].text)
        assert found[name].finish_reason is FinishReason.STOP
        assert not EOS & set(found[name].token_ids)
    assert re.fullmatch("[a-c]{40}", found["i"].text)
    assert found["i"].finish_reason is FinishReason.STOP
    assert not run.failed


def test_the_end_of_sequence_may_come_only_where_the_grammar_is_complete() -> None:
    run = Run()
    for i in range(20):
        bias = dict.fromkeys(EOS, 100.0)
        run.add(str(i), constrained(GrammarSpec("regex", "(abc)+"), seed=i, logit_bias=bias))
    for output in run.outputs().values():
        assert re.fullmatch("(abc)+", output.text)


def test_stop_token_ids_end_it_only_where_it_is_complete() -> None:
    (brace,) = TOKENIZER.encode("}", add_special_tokens=False)
    run = Run(eos=frozenset())
    run.add("a", constrained(GrammarSpec("regex", "[a-z]{4}(x)*"), stop_token_ids=(brace,), logit_bias={brace: 100.0}))
    output = run.outputs()["a"]
    assert re.fullmatch("[a-z]{4}x*", output.text)
    assert (output.finish_reason, output.stop_reason) == (FinishReason.STOP, brace)


def test_other_fields_narrow_a_grammar() -> None:
    run = Run()
    letters = [TOKENIZER.encode(c, add_special_tokens=False)[0] for c in "abc"]
    run.add("allowed", constrained(GrammarSpec("regex", "[a-z]{6}"), allowed_token_ids=letters))
    run.add("bad", constrained(GrammarSpec("regex", "[a-c]{6}"), bad_words=((letters[0],), (letters[1],))))
    found = run.outputs()
    assert re.fullmatch("[a-c]{6}", found["allowed"].text)
    assert found["bad"].text == "cccccc"


def test_a_dead_end_fails_one_request_alone() -> None:
    run = Run()
    letters = [TOKENIZER.encode(c, add_special_tokens=False)[0] for c in "ab"]
    spec = GrammarSpec("regex", "[a-b]{3}[x-y]{3}", "guided_regex")
    run.add("dead", constrained(spec, allowed_token_ids=letters))
    run.add("alive", constrained(spec))
    found = run.outputs()
    assert re.fullmatch("[a-b]{3}[x-y]{3}", found["alive"].text)
    assert found["dead"].finish_reason is None
    assert run.failed.keys() == {"dead"}
    assert run.failed["dead"].param == "guided_regex"
    assert "no token is left" in str(run.failed["dead"])
    run.engine.scheduler.check_idle()


def test_a_request_with_a_grammar_needs_its_matcher() -> None:
    engine = Run().engine
    with pytest.raises(RequestError, match="its matcher"):
        engine.add_request(Request("a", [1], constrained(GrammarSpec("regex", "a"))))


def test_rows_without_a_grammar_have_no_mask() -> None:
    """What has no grammar pays nothing once those that have one are gone."""
    run = Run()
    run.add("a", constrained(GrammarSpec("regex", "abcdefghijk")))
    run.add("b", SamplingParams(max_tokens=30, ignore_eos=True))
    masks = []
    execute = run.runtime.execute

    def watched(plan: Any, sampling: Any) -> Any:
        masks.append(sampling.masked)
        return execute(plan, sampling)

    run.runtime.execute = watched  # type: ignore[method-assign]
    run.outputs()
    assert masks[0]
    assert not masks[-1]
    assert masks == sorted(masks, reverse=True)


def test_masks_are_filled_when_the_runtime_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    run, filled = Run(), []
    run.add("a", constrained(GrammarSpec("regex", "abc|def")))
    execute, fill = run.runtime.execute, TokenMatcher.fill

    def counted(self: TokenMatcher, row: Any) -> None:
        filled.append(1)
        fill(self, row)

    def watched(plan: Any, sampling: Any) -> Any:
        assert not filled
        found = execute(plan, sampling)
        assert filled == [1]
        filled.clear()
        return found

    monkeypatch.setattr(TokenMatcher, "fill", counted)
    run.runtime.execute = watched  # type: ignore[method-assign]
    run.outputs()
