"""Offline generate and score."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fake_runtime import FakeRuntime, expected_tokens, score_of
from small_tokenizers import byte_level

from llmctl.engine.generate import Completion, generate, score, score_all
from llmctl.engine.llm_engine import LLMEngine
from llmctl.engine.request import FinishReason, Request
from llmctl.engine.sampling_params import SamplingParams
from llmctl.engine.scheduler_config import SchedulerConfig
from llmctl.errors import CapacityError

TOKENIZER = byte_level()


def engine_of(**config: Any) -> LLMEngine:
    return LLMEngine(FakeRuntime(num_blocks=24, vocab_size=TOKENIZER.vocab_size), SchedulerConfig(**config), {1})


def test_completions_come_in_order_of_prompts_through_a_short_queue() -> None:
    prompts: list[str | list[int]] = ["The fox", [20, 30, 40], "dog", "你好"] * 3
    engine = engine_of(max_num_queued_reqs=2, max_num_seqs=3)
    seen: list[int] = []
    done = generate(
        engine, TOKENIZER, prompts, SamplingParams(temperature=0, max_tokens=5), lambda c: seen.append(c.prompt_index)
    )
    assert [c.prompt_index for c in done] == list(range(12))
    assert sorted(seen) == list(range(12))
    for completion, prompt in zip(done, prompts, strict=True):
        ids = TOKENIZER.encode(prompt) if isinstance(prompt, str) else prompt
        alone = Request("x", ids, SamplingParams(temperature=0, max_tokens=5))
        expected = expected_tokens(alone, 0, engine.limits, frozenset({1}))
        assert list(completion.token_ids) == expected
        assert completion.prompt_token_ids == tuple(ids)
        assert completion.output.times is not None
        assert completion.output.times.finished is not None


def test_samples_of_one_prompt_differ_and_repeat() -> None:
    params = SamplingParams(n=3, seed=11, max_tokens=6)
    runs = [generate(engine_of(), TOKENIZER, ["fox"], params) for _ in range(2)]
    assert [c.token_ids for c in runs[0]] == [c.token_ids for c in runs[1]]
    assert len({c.token_ids for c in runs[0]}) == 3
    assert [c.sample_index for c in runs[0]] == [0, 1, 2]
    single = generate(engine_of(), TOKENIZER, ["fox"], SamplingParams(seed=11, max_tokens=6))
    assert single[0].token_ids == runs[0][0].token_ids


def test_a_stop_string_frees_the_request_at_once() -> None:
    engine = engine_of()
    free = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, skip_special_tokens=False)
    text = generate(engine, TOKENIZER, ["fox"], free)[0].text
    stop = next(text[i] for i in range(2, len(text)) if text[i] != "\ufffd")
    (made,) = generate(engine, TOKENIZER, ["fox"], SamplingParams(**{**free.__dict__, "stop": (stop,)}))
    assert made.text == text[: text.index(stop)]
    assert made.output.finish_reason is FinishReason.STOP
    assert made.output.stop_reason == stop
    assert made.output.times is not None
    assert made.output.times.finished is not None
    assert engine.stats().kv_cache_usage == 0


def test_a_refused_prompt_leaves_the_engine_idle() -> None:
    engine = engine_of()
    with pytest.raises(CapacityError):
        generate(engine, TOKENIZER, ["fox", [20] * 100], SamplingParams(max_tokens=4))
    assert not engine.has_unfinished()
    engine.scheduler.check()
    assert len(generate(engine, TOKENIZER, ["fox"], SamplingParams(max_tokens=4))) == 1


def test_misuse_is_refused() -> None:
    engine = engine_of()
    with pytest.raises(ValueError, match="2 prompts but 1"):
        generate(engine, TOKENIZER, ["a", "b"], [SamplingParams()])
    engine.add_request(Request("other", [20]))
    with pytest.raises(ValueError, match="busy"):
        generate(engine, TOKENIZER, ["a"], SamplingParams())
    assert engine.has_unfinished()


def test_each_prompt_may_have_parameters_of_its_own() -> None:
    made: list[Completion] = generate(
        engine_of(), TOKENIZER, ["a", "b"], [SamplingParams(max_tokens=i, ignore_eos=True) for i in (1, 4)]
    )
    assert [len(c.token_ids) for c in made] == [1, 4]


def test_scores_are_the_log_probabilities_of_each_next_token() -> None:
    ids = [20, 30, 40, 50, 60, 70, 80]
    history = list(zip(ids, range(len(ids)), strict=True))
    expected = [score_of(history[:i], ids[i]) for i in range(1, len(ids))]
    engine = engine_of(max_num_batched_tokens=3)
    np.testing.assert_allclose(score(engine, ids), expected, rtol=1e-6)
    several = score_all(engine, [ids, [20], ids[:3]])
    np.testing.assert_allclose(several[0], expected, rtol=1e-6)
    assert [len(s) for s in several] == [6, 0, 2]
    assert score(engine, [20] * 64).shape == (63,)
    with pytest.raises(CapacityError, match="max_model_len is 64"):
        score(engine, [20] * 65)
