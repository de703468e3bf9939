"""Steps in flight: what runs ahead and what waits, and that nobody sees a difference in the outputs."""

from __future__ import annotations

from typing import Any

import pytest
from fake_runtime import FakeRuntime, expected_tokens

from llmctl.engine.llm_engine import LLMEngine, TokenOutput
from llmctl.engine.request import FinishReason, Request
from llmctl.engine.sampling_params import SamplingParams
from llmctl.engine.scheduler_config import SchedulerConfig
from llmctl.engine.step import IN_FLIGHT

PROMPT = [3, 1, 4, 1, 5, 9, 2, 7]


def overlapped(eos: frozenset[int] = frozenset(), **config: Any) -> LLMEngine:
    return LLMEngine(FakeRuntime(steps_in_flight=2), SchedulerConfig(**config), eos)


def request(name: str = "r", tokens: int = 8, **params: Any) -> Request:
    return Request(name, PROMPT, SamplingParams(**{"temperature": 0.0, "max_tokens": tokens, **params}))


def run(engine: LLMEngine) -> list[list[TokenOutput]]:
    """Outputs by step."""
    steps = []
    while engine.has_unfinished():
        steps.append(engine.step())
    return steps


def fed(engine: LLMEngine) -> list[bool]:
    """By step: whether a token was fed."""
    assert isinstance(engine.runtime, FakeRuntime)
    return [any(IN_FLIGHT in piece.token_ids for piece in plan.slices) for plan in engine.runtime.plans]


def tokens_of(steps: list[list[TokenOutput]], name: str = "r") -> list[int]:
    return [t for outputs in steps for o in outputs if o.request_id == name for t in o.new_token_ids]


def test_a_runtime_says_one_or_two_steps() -> None:
    for depth in (0, 3):
        with pytest.raises(ValueError, match=f"steps_in_flight: expected 1 or 2, found {depth}"):
            LLMEngine(FakeRuntime(steps_in_flight=depth), SchedulerConfig())


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 1.0, "seed": 5},
        {"min_tokens": 4, "stop_token_ids": tuple(range(39))},
        {"logit_bias": {8: 100.0}},
        {"allowed_token_ids": (7, 9)},
        {"bad_words": ((5,), (6,))},
        {"logprobs": 2},
    ],
)
def test_what_needs_no_output_ids_runs_ahead(params: dict[str, Any]) -> None:
    engine, made = overlapped(), request(**params)
    engine.add_request(made)
    steps = run(engine)
    assert tokens_of(steps) == expected_tokens(made, made.seed, engine.limits, frozenset())
    assert all(len(outputs) == 1 for outputs in steps)
    assert fed(engine) == [False, *[True] * (len(fed(engine)) - 1)]


@pytest.mark.parametrize(
    "params", [{"frequency_penalty": 1.0}, {"repetition_penalty": 1.5}, {"bad_words": ((5,), (6, 7))}]
)
def test_what_needs_the_output_ids_waits_for_them_and_still_gets_a_token_every_step(params: dict[str, Any]) -> None:
    engine, made, other = overlapped(), request(**params), request("other", 11)
    engine.add_requests([made, other])
    steps = run(engine)
    for each in (made, other):
        assert tokens_of(steps, each.request_id) == expected_tokens(each, each.seed, engine.limits, frozenset())
    assert [len(outputs) for outputs in steps] == [2] * 8 + [1] * 3
    assert fed(engine) == [False] * 9 + [True] * 2  # alone again, "other" runs ahead


def test_a_token_after_a_late_stop_reaches_nobody() -> None:
    plain = request()
    engine = overlapped()
    engine.add_request(plain)
    tokens = tokens_of(run(engine))
    assert len(set(tokens[:3])) == 3, "the test needs distinct tokens"
    engine = overlapped(frozenset({tokens[2]}))
    engine.add_request(request())
    steps = run(engine)
    assert tokens_of(steps) == tokens[:3]
    assert [o.finish_reason for outputs in steps for o in outputs] == [None, None, FinishReason.STOP]
    assert isinstance(engine.runtime, FakeRuntime)
    assert len(engine.runtime.plans) == 4  # the last one computes the end, in vain
    assert engine.step() == []
    engine.scheduler.check()
    assert engine.stats().num_generated_tokens == 3


def test_a_name_used_again_is_not_fed_the_old_requests_token() -> None:
    engine = overlapped()
    engine.add_request(request())
    engine.step()
    engine.abort(["r"])
    again = Request("r", [1, 2, 3], SamplingParams(temperature=0.0, max_tokens=5))
    engine.add_request(again)
    assert tokens_of(run(engine)) == expected_tokens(again, again.seed, engine.limits, frozenset())


def test_no_step_is_spent_on_a_request_that_ends_by_its_length() -> None:
    engine = overlapped()
    engine.add_request(request(tokens=5))
    run(engine)
    assert len(fed(engine)) == 5
    engine.add_request(request(tokens=0, prompt_logprobs=0))
    assert [o.finish_reason for outputs in run(engine) for o in outputs] == [FinishReason.LENGTH]
    assert len(fed(engine)) == 6


def test_stats_count_a_step_when_its_result_is_there() -> None:
    engine = overlapped()
    engine.add_request(request(tokens=3))
    seen = []
    while engine.has_unfinished():
        engine.step()
        stats = engine.stats()
        seen.append((stats.num_steps, stats.last_step_tokens, stats.num_generated_tokens))
    assert seen == [(1, 8, 1), (2, 1, 2), (3, 1, 3)]


@pytest.mark.parametrize("depth", [1, 2])
def test_a_crowd_in_a_small_pool_yields_what_each_yields_alone(depth: int) -> None:
    """Preemption, chunked prefill, shared prefixes and late stops at once."""
    engine = LLMEngine(FakeRuntime(10, steps_in_flight=depth), SchedulerConfig(6, 9), frozenset({0, 1, 2}))
    assert isinstance(engine.runtime, FakeRuntime)
    engine.runtime.wipe_allocated(engine.scheduler.pool)
    crowd = [Request(str(i), PROMPT[: 4 + i % 5], SamplingParams(temperature=1.0, max_tokens=20)) for i in range(12)]
    engine.add_requests(crowd)
    steps = run(engine)
    for each in crowd:
        expected = expected_tokens(each, each.seed, engine.limits, engine.eos_token_ids)
        assert tokens_of(steps, each.request_id) == expected
    assert engine.stats().num_preemptions
    assert engine.stats().prefix_cache_hits
    assert any(fed(engine)) is (depth == 2)
