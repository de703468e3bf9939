"""Jump-ahead: what the grammar forces is not sampled, and nothing else differs from sampling it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from engine.fake_runtime import FakeRuntime
from small_tokenizers import byte_fallback, byte_level, metaspace
from structured.schemas import random_schema

from llmctl.engine.jump_ahead import MOST_TOKENS
from llmctl.engine.llm_engine import LLMEngine
from llmctl.engine.output import OutputProcessor, TextOutput, merge_outputs
from llmctl.engine.request import FinishReason, Request
from llmctl.engine.sampling_params import SamplingParams
from llmctl.engine.scheduler_config import SchedulerConfig
from llmctl.errors import RequestError
from llmctl.structured.compiler import GrammarCompiler
from llmctl.structured.matcher import TokenMatcher
from llmctl.structured.spec import GrammarSpec, json_schema
from llmctl.text.tokenizer import Tokenizer

TOKENIZER = byte_level()
EOS = TOKENIZER.eos_token_ids
COMPILER = GrammarCompiler(TOKENIZER, TOKENIZER.vocab_size, EOS)
FIXED = GrammarSpec("regex", "[a-c]the lazy dog jumps over the quick brown fox[a-c]{2}")


def matcher(spec: GrammarSpec, compiler: GrammarCompiler = COMPILER, *, forcing: bool = True) -> TokenMatcher:
    return compiler.submit(spec, forcing=forcing).result().matcher()


def one_by_one(found: TokenMatcher) -> set[int]:
    """llguidance's mask, whatever is known to be forced."""
    bits = np.unpackbits(np.frombuffer(found._matcher.compute_bitmask(), np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist())


class Run:
    def __init__(self, *, jumps: bool, blocks: int = 200, budget: int = 64, in_flight: int = 1, **config: Any) -> None:
        self.runtime = FakeRuntime(blocks, 4, 160, TOKENIZER.vocab_size, in_flight)
        self.engine = LLMEngine(self.runtime, SchedulerConfig(8, budget, **config), EOS)
        self.engine.jumps = jumps
        self.failed: dict[str, str] = {}
        self.engine.on_failed = lambda name, error: self.failed.update({name: str(error)})
        self.parts: dict[str, list[TextOutput]] = {}
        self._texts = OutputProcessor(TOKENIZER)

    def add(self, name: str, params: SamplingParams, prompt: Sequence[int] = (7, 8, 9), **fields: Any) -> Request:
        grammar = params.grammar
        found = None if grammar is None else matcher(grammar, forcing=not params.singles_out_tokens)
        request = Request(name, prompt, params, matcher=found, **fields)
        self.engine.add_request(request)
        self._texts.add(name, request.prompt_token_ids, params)
        return request

    def step(self) -> None:
        processed = self._texts.process(self.engine.step())
        self.engine.abort(processed.aborts)
        self.engine.scheduler.check()
        for output in processed.outputs:
            self.parts.setdefault(output.request_id, []).append(output)

    def outputs(self) -> dict[str, TextOutput]:
        while self.engine.has_unfinished():
            self.step()
        return {name: replace_times(merge_outputs(parts)) for name, parts in self.parts.items()}


def replace_times(output: TextOutput) -> Any:
    """All of an output but when it came, and where parts of it did."""
    fields = {name: getattr(output, name) for name in output.__struct_fields__}
    return {name: value for name, value in fields.items() if name not in ("times", "num_cached_tokens")}


def held(spec: GrammarSpec, **options: Any) -> SamplingParams:
    return SamplingParams(grammar=spec, **{"max_tokens": 100, **options})


VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.0},
    {"repetition_penalty": 1.3, "presence_penalty": 0.5},
    {"logprobs": 2},
    {"stop": ("dog", '":', "1")},
    {"stop": ('"',), "min_tokens": 6, "include_stop_str_in_output": True},
    {"max_tokens": 9},
    {"ignore_eos": True, "min_tokens": 20},
    {"allowed_token_ids": tuple(range(5, 200))},
    {"bad_words": ((40,), (50, 51))},
)


def _specs() -> list[GrammarSpec]:
    """Some that force much of their outputs, and any others."""
    names = ("the_quick_brown_fox", "jumps_over", "the_lazy_dog")
    values: tuple[Any, ...] = ({"type": "boolean"}, {"enum": ["dog sleeps", "fox does not"]}, {"const": "quotes 你好"})
    found = [
        FIXED,
        GrammarSpec("choice", '["the quick brown fox", "the lazy dog", "the dog sleeps"]'),
        GrammarSpec("gbnf", 'root ::= [0-9] " lazy " ("dog" | "fox") " jumps over " [a-c]+'),
        GrammarSpec("lark", 'start: A "the lazy " ("dog jumps" | "fox jumps") A\nA: /[a-c]/'),
    ]
    for value in values * 3:
        schema = {"type": "object", "properties": dict.fromkeys(names, value), "required": names}
        found.append(json_schema({**schema, "additionalProperties": False}, "x"))
    for seed in range(20):
        spec = json_schema(random_schema(random.Random(seed)), "x")
        try:
            COMPILER.submit(spec, forcing=True).result()
        except RequestError:
            continue
        found.append(spec)
    return found


@pytest.mark.parametrize(
    "engine",
    [
        {},
        {"blocks": 70},
        {"budget": 9},
        {"blocks": 70, "in_flight": 2, "enable_prefix_caching": False},
        {"budget": 12, "in_flight": 2, "itl_target": None},
    ],
)
def test_outputs_are_those_of_sampling_every_token(engine: dict[str, Any]) -> None:
    specs, runs = _specs(), [Run(jumps=jumps, **engine) for jumps in (False, True)]
    found = []
    for run in runs:
        for i, spec in enumerate(specs):
            options = VARIANTS[i % len(VARIANTS)]
            run.add(str(i), held(spec, **{"seed": i, **options}))
            run.add(f"free {i}", SamplingParams(max_tokens=5, seed=i))
        found.append(run.outputs())
    assert found[0] == found[1]
    assert runs[0].failed == runs[1].failed
    sampled, jumping = (run.engine.stats() for run in runs)
    assert sampled.num_generated_tokens >= jumping.num_generated_tokens - 10 * MOST_TOKENS
    assert (sampled.num_forced_tokens, jumping.num_forced_tokens > 100) == (0, True)
    assert jumping.num_steps < sampled.num_steps
    if "blocks" in engine:
        assert jumping.num_preemptions > 2


def test_forced_tokens_come_with_the_sampled_one_before_them() -> None:
    run = Run(jumps=True)
    request = run.add("a", held(FIXED))
    run.step()
    (first,) = run.parts["a"]
    assert len(first.token_ids) == 1 + MOST_TOKENS == 1 + request.num_forced
    assert first.text[1:] == TOKENIZER.decode(first.token_ids[1:])
    run.step()
    piece = run.runtime.plans[-1].slices[0]
    assert piece.token_ids == list(first.token_ids)
    assert piece.sample


def test_an_output_that_is_forced_to_its_end_ends_without_a_step_more() -> None:
    run = Run(jumps=True)
    run.add("a", held(GrammarSpec("regex", "[a-c] dog")))
    (output,) = run.outputs().values()
    assert output["text"][1:] == " dog"
    assert output["finish_reason"] is FinishReason.STOP
    assert len(run.runtime.plans) == 1


@pytest.mark.parametrize("tokens", range(1, 9))
def test_max_tokens_cuts_what_is_forced(tokens: int) -> None:
    run = Run(jumps=True)
    run.add("a", held(FIXED, max_tokens=tokens))
    (output,) = run.outputs().values()
    assert (len(output["token_ids"]), output["finish_reason"]) == (tokens, FinishReason.LENGTH)
    assert len(run.runtime.plans) == 1


def test_log_probabilities_are_of_every_token() -> None:
    run = Run(jumps=True)
    run.add("a", held(FIXED, logprobs=0, seed=1))
    run.add("b", held(FIXED, seed=1))
    with_them, without = run.outputs().values()
    assert with_them["token_ids"] == without["token_ids"]
    assert len(with_them["logprobs"]) == len(with_them["token_ids"])
    assert len(run.parts["a"]) == len(with_them["token_ids"]) > len(run.parts["b"])


def test_tenants_are_charged_for_forced_tokens_as_for_sampled_ones() -> None:
    served = []
    for jumps in (False, True):
        run = Run(jumps=jumps)
        request = run.add("a", held(FIXED))
        run.outputs()
        served.append(request.account.served)
    assert served[0] == served[1]


def test_the_tokens_forced_at_once_are_those_that_the_masks_force_one_by_one() -> None:
    """Canonical ones: as the tokenizer spells the text, short of where what follows may join in."""
    total = 0
    for spec in _specs():
        found, alone = matcher(spec), matcher(spec)
        rng = np.random.default_rng(1)
        for _ in range(60):
            forced = found.forced(100)
            for token in forced:
                assert one_by_one(alone) == {token}
                assert not alone.accept(token) or token == forced[-1]
            total += len(forced)
            ended = [found.accept(token) for token in forced]
            if any(ended):
                break
            token = int(rng.choice(sorted(one_by_one(alone))))
            if token in EOS or found.accept(token) | alone.accept(token):
                break
    assert total > 300


def test_forced_tokens_are_the_tokenizer_s_own() -> None:
    text = "the lazy dog jumps over the quick brown fox"
    found = matcher(GrammarSpec("regex", f"{text}!"))
    ids = found.forced(1000)
    assert ids == TOKENIZER.encode(f"{text}!", add_special_tokens=False)
    assert found.forced(3) == ids[:3]


def test_a_special_token_s_text_is_forced_without_the_special_token() -> None:
    found = matcher(GrammarSpec("regex", "<[|]im_end[|]></s>"))
    ids = found.forced(1000)
    assert b"".join(TOKENIZER.token_bytes(i) for i in ids) == b"<|im_end|></s>"
    assert not TOKENIZER.special_token_ids & set(ids)


@pytest.mark.parametrize("tokenizer", [byte_fallback(), metaspace()])
def test_nothing_is_forced_where_texts_cannot_be_spelt_as_the_tokenizer_does(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, tokenizer.eos_token_ids)
    spec = GrammarSpec("regex", "fox dog")
    assert matcher(spec, compiler).forced(9) == []
    masks = [one_by_one(matcher(spec, compiler, forcing=forcing)) for forcing in (True, False)]
    assert masks[0] == masks[1]


def test_an_end_of_sequence_token_that_lark_names_is_sampled() -> None:
    (eos,) = EOS
    spec = GrammarSpec("lark", f'start: LETTER " dog" <[{eos}]>\nLETTER: /[a-c]/')
    for jumps in (False, True):
        run = Run(jumps=jumps)
        run.add("a", held(spec, skip_special_tokens=False))  # or its text would not show that it was taken for text
        output = run.outputs()["a"]
        assert output["token_ids"][-1] == eos
        assert (output["text"][1:], output["finish_reason"]) == (" dog", FinishReason.STOP)


def test_a_step_that_forces_for_too_long_ends_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    found = matcher(FIXED)
    found.accept(found.forced(1)[0] if found.forced(1) else TOKENIZER.encode("a", add_special_tokens=False)[0])
    monkeypatch.setattr("llmctl.structured.matcher.STEP_SECONDS", -1.0)
    assert not found.problem
    assert found.forced(9)
    assert "more than" in found.problem


def test_a_request_that_singles_out_tokens_spells_as_it_likes() -> None:
    """Here without the tokens that the tokenizer would take."""
    letters = tuple(TOKENIZER.encode(c, add_special_tokens=False)[0] for c in "the fox")
    text = "the fox"
    assert not set(TOKENIZER.encode(text, add_special_tokens=False)) <= set(letters)
    run = Run(jumps=True)
    run.add("a", held(GrammarSpec("regex", text), allowed_token_ids=letters))
    assert run.outputs()["a"]["text"] == text
    for fields in ({"logit_bias": {3: 1.0}}, {"bad_words": ((3,),)}, {"stop_token_ids": (3,)}):
        assert SamplingParams(**fields).singles_out_tokens
    assert not SamplingParams(stop=("a",), logprobs=1, min_tokens=3, ignore_eos=True).singles_out_tokens


def test_a_forced_chunk_leaves_a_token_to_each_request_behind() -> None:
    run = Run(jumps=True, budget=12)
    run.add("a", held(FIXED))
    for i in range(3):
        run.add(str(i), SamplingParams(max_tokens=30, ignore_eos=True))
    for _ in range(3):
        run.step()
    plans = run.runtime.plans[1:]
    assert [[len(piece.token_ids) for piece in plan.slices] for plan in plans] == [[9, 1, 1, 1], [8, 1, 1, 1]]
    assert [plan.slices[0].sample for plan in plans] == [False, True]


@pytest.mark.parametrize(("budget", "making_way"), [(18, 1), (17, 2)])
def test_a_more_important_request_enters_beside_forced_chunks(budget: int, making_way: int) -> None:
    """They are no prompts, which would keep it out. Who has one makes room too, where the step does not hold both."""
    run = Run(jumps=True, policy="priority", budget=budget)
    run.add("a", held(FIXED), priority=1)
    run.add("b", SamplingParams(max_tokens=80, ignore_eos=True), priority=2)
    run.step()
    assert run.engine.scheduler.requests["a"].num_forced == MOST_TOKENS
    run.engine.scheduler.max_num_seqs = 2
    run.add("c", SamplingParams(max_tokens=3, ignore_eos=True), priority=0)
    run.step()
    assert "c" in [piece.request_id for piece in run.runtime.plans[-1].slices]
    assert run.engine.stats().num_preemptions == making_way


def test_a_prompt_is_cut_beside_a_forced_chunk_as_beside_a_decode() -> None:
    run = Run(jumps=True, itl_target=0.001)
    run.add("a", held(FIXED))
    run.step()
    run.add("b", SamplingParams(max_tokens=1), prompt=range(60))
    run.step()
    chunk, prompt = run.runtime.plans[-1].slices
    assert len(chunk.token_ids) == 1 + MOST_TOKENS
    assert len(prompt.token_ids) < 40


def test_a_device_that_runs_ahead_does_not_jump() -> None:
    for in_flight, jumps in ((1, True), (2, False)):
        runtime = FakeRuntime(steps_in_flight=in_flight)
        assert LLMEngine(runtime, SchedulerConfig(), EOS).jumps is jumps
