"""LLMEngine: how requests end, what their outputs carry, seeds, time stamps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fake_runtime import FakeRuntime, expected_tokens, score_of

from llmctl.engine.llm_engine import LLMEngine, TokenOutput
from llmctl.engine.request import FinishReason, Request
from llmctl.engine.sampling_params import SamplingParams
from llmctl.engine.scheduler_config import SchedulerConfig

PROMPT = [3, 1, 4, 1, 5, 9, 2, 7]


def engine_of(eos: frozenset[int] = frozenset(), **kwargs: Any) -> LLMEngine:
    runtime = FakeRuntime(steps_in_flight=kwargs.pop("steps_in_flight", 1))
    return LLMEngine(runtime, SchedulerConfig(**kwargs.pop("config", {})), eos, **kwargs)


def run(engine: LLMEngine, request: Request) -> list[TokenOutput]:
    engine.add_request(request)
    outputs = []
    while engine.has_unfinished():
        outputs += engine.step()
    return outputs


def tokens_of(outputs: list[TokenOutput]) -> list[int]:
    return [token for output in outputs for token in output.new_token_ids]


def greedy(**params: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 12, **params})


@pytest.fixture(scope="module")
def plain() -> list[int]:
    """What the prompt yields when nothing ends it."""
    tokens = tokens_of(run(engine_of(), Request("r", PROMPT, greedy())))
    assert len(tokens) == 12
    assert len(set(tokens[:6])) == 6, "the tests below need distinct tokens"
    return tokens


def test_max_tokens_ends_with_length(plain: list[int]) -> None:
    outputs = run(engine_of(), Request("r", PROMPT, greedy(max_tokens=3)))
    assert tokens_of(outputs) == plain[:3]
    assert [o.finish_reason for o in outputs] == [None, None, FinishReason.LENGTH]


def test_no_max_tokens_runs_to_max_model_len() -> None:
    outputs = run(engine_of(), Request("r", PROMPT, greedy(max_tokens=None)))
    assert len(PROMPT) + len(outputs) == 64
    assert outputs[-1].finish_reason is FinishReason.LENGTH


def test_eos_ends_and_is_part_of_the_output(plain: list[int]) -> None:
    engine = engine_of(frozenset({plain[2]}))
    outputs = run(engine, Request("r", PROMPT, greedy()))
    assert tokens_of(outputs) == plain[:3]
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == (FinishReason.STOP, None)
    ignoring = run(engine, Request("s", PROMPT, greedy(ignore_eos=True)))
    assert tokens_of(ignoring) == plain


def test_stop_token_ends_and_is_named_even_when_eos_is_ignored(plain: list[int]) -> None:
    outputs = run(engine_of(), Request("r", PROMPT, greedy(stop_token_ids=(plain[1],), ignore_eos=True)))
    assert tokens_of(outputs) == plain[:2]
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == (FinishReason.STOP, plain[1])


def test_an_end_on_the_last_allowed_token_counts_as_stop(plain: list[int]) -> None:
    outputs = run(engine_of(frozenset({plain[2]})), Request("r", PROMPT, greedy(max_tokens=3)))
    assert outputs[-1].finish_reason is FinishReason.STOP


def test_min_tokens_is_held_against_eos_and_stop_ids(plain: list[int]) -> None:
    params = greedy(min_tokens=5, stop_token_ids=(plain[2],))
    tokens = tokens_of(run(engine_of(frozenset({plain[1]})), Request("r", PROMPT, params)))
    assert len(tokens) >= 5
    assert tokens[0] == plain[0]
    assert not {plain[1], plain[2]} & set(tokens[:5])


def test_allowed_tokens_and_bias_reach_the_sampler() -> None:
    outputs = run(engine_of(), Request("r", PROMPT, greedy(allowed_token_ids=(7, 9))))
    assert set(tokens_of(outputs)) <= {7, 9}
    assert set(tokens_of(run(engine_of(), Request("r", PROMPT, greedy(logit_bias={8: 100.0}))))) == {8}


def test_logprobs_are_carried_only_for_those_who_asked() -> None:
    engine = engine_of()
    engine.add_requests([Request("a", PROMPT, greedy(logprobs=2)), Request("b", [1, 2], greedy())])
    outputs = {o.request_id: o for o in engine.step()}
    assert outputs["b"].logprobs is None
    assert outputs["a"].logprobs is not None
    assert len(outputs["a"].logprobs) == 1
    assert len(outputs["a"].logprobs[0].top_ids) == 2


@pytest.mark.parametrize("budget", [3, 5, 512])
@pytest.mark.parametrize("max_tokens", [0, 2])
def test_prompt_scores_do_not_depend_on_chunking_or_cached_prefixes(budget: int, max_tokens: int) -> None:
    engine = engine_of(config={"max_num_batched_tokens": budget})
    run(engine, Request("warm", PROMPT, greedy()))
    outputs = run(engine, Request("r", PROMPT, greedy(max_tokens=max_tokens, prompt_logprobs=0)))
    history = list(zip(PROMPT, range(len(PROMPT)), strict=True))
    expected = [score_of(history[:i], PROMPT[i]) for i in range(1, len(PROMPT))]
    given = [o.prompt_scores for o in outputs if o.prompt_scores is not None]
    assert len(given) == 1
    np.testing.assert_allclose(given[0].logprobs, expected, rtol=1e-6)
    assert len(tokens_of(outputs)) == max_tokens
    assert outputs[-1].finish_reason is FinishReason.LENGTH


def test_prompt_scores_survive_preemption() -> None:
    engine = LLMEngine(
        FakeRuntime(num_blocks=6), SchedulerConfig(max_num_batched_tokens=4, enable_prefix_caching=False)
    )
    params = greedy(max_tokens=8, prompt_logprobs=0, ignore_eos=True)
    requests = [Request(str(i), [i, *PROMPT, i], params, priority=i) for i in range(3)]
    engine.add_requests(requests)
    scores = {}
    for _ in range(200):
        for output in engine.step():
            if output.prompt_scores is not None:
                assert output.request_id not in scores
                scores[output.request_id] = output.prompt_scores
    assert engine.stats().num_preemptions
    for request in requests:
        history = list(zip(request.prompt_token_ids, range(10), strict=True))
        expected = [score_of(history[:i], history[i][0]) for i in range(1, 10)]
        np.testing.assert_allclose(scores[request.request_id].logprobs, expected, rtol=1e-6)


def test_abort_frees_blocks_at_once_and_passes_over_the_unknown() -> None:
    engine = engine_of()
    engine.add_requests([Request("a", PROMPT, greedy()), Request("b", PROMPT, greedy())])
    engine.step()
    assert engine.stats().kv_cache_usage > 0
    outputs = engine.abort(["a", "nobody", "a"])
    assert [(o.request_id, o.finish_reason) for o in outputs] == [("a", FinishReason.ABORT)]
    engine.scheduler.check()
    engine.abort(["b"])
    assert engine.stats().kv_cache_usage == 0
    assert not engine.has_unfinished()
    assert engine.step() == []


def test_abort_of_a_request_in_flight_drops_its_result() -> None:
    engine = engine_of(steps_in_flight=2, config={"max_num_batched_tokens": 8})
    engine.add_requests([Request("a", PROMPT, greedy()), Request("b", PROMPT[::-1], greedy())])
    engine.step()
    engine.abort(["b"])
    again = Request("b", [1, 2, 3], greedy())
    engine.add_request(again)
    outputs: list[TokenOutput] = []
    while engine.has_unfinished():
        outputs += engine.step()
        engine.scheduler.check()
    assert tokens_of([o for o in outputs if o.request_id == "b"]) == expected_tokens(
        again, again.seed, engine.limits, frozenset()
    )


def test_unseeded_requests_repeat_per_engine_seed_and_differ_from_each_other() -> None:
    def sample(seed: int) -> list[list[int]]:
        engine = engine_of(seed=seed)
        return [tokens_of(run(engine, Request(str(i), PROMPT, SamplingParams(max_tokens=6)))) for i in range(3)]

    first = sample(1)
    assert first == sample(1)
    assert first != sample(2)
    assert len({tuple(tokens) for tokens in first}) == 3


def test_a_seed_gives_the_same_tokens_on_any_engine() -> None:
    params = SamplingParams(max_tokens=6, seed=-5)
    one = run(engine_of(seed=1), Request("a", PROMPT, params))
    other_engine = engine_of(seed=2)
    run(other_engine, Request("x", PROMPT, SamplingParams(max_tokens=3)))
    assert tokens_of(one) == tokens_of(run(other_engine, Request("b", PROMPT, params)))


def ticking() -> Callable[[], float]:
    now = 100.0

    def clock() -> float:
        nonlocal now
        now += 1.0
        return now

    return clock


def test_time_stamps_follow_the_clock_and_a_given_arrival() -> None:
    engine = engine_of(clock=ticking())
    outputs = run(engine, Request("r", PROMPT, greedy(max_tokens=2), arrival_time=50.0))
    times = outputs[-1].times
    assert times is not None
    assert (times.arrival, times.first_scheduled, times.first_token, times.finished) == (50.0, 102.0, 103.0, 105.0)
    assert run(engine, Request("s", PROMPT, greedy(max_tokens=1)))[-1].times.arrival == 106.0  # type: ignore[union-attr]


def test_stats_count() -> None:
    engine = engine_of()
    run(engine, Request("a", PROMPT, greedy(max_tokens=3)))
    outputs = run(engine, Request("b", PROMPT, greedy(max_tokens=3)))
    stats = engine.stats()
    assert outputs[-1].num_cached_tokens == 4
    assert stats.num_generated_tokens == 6
    assert stats.num_scheduled_tokens == (8 + 2) + (4 + 2)
    assert stats.num_steps == 6
    assert stats.last_step_tokens == 1
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (16, 4)


def test_close_aborts_and_closes_the_runtime() -> None:
    engine = engine_of(steps_in_flight=2)
    engine.add_request(Request("a", PROMPT, greedy()))
    engine.step()
    engine.close()
    assert not engine.has_unfinished()
    assert isinstance(engine.runtime, FakeRuntime)
    assert engine.runtime.closed


def test_a_leak_is_noticed_when_idle() -> None:
    engine = engine_of()
    engine.scheduler.pool.allocate(1)
    engine.add_request(Request("a", PROMPT, greedy(max_tokens=1)))
    with pytest.raises(RuntimeError, match="1 blocks are held"):
        engine.step()
