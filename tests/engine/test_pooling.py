"""Requests that are embedded: which hidden states count, whatever cuts, caches or preempts a prompt."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
from fake_runtime import FakeRuntime, hidden_of

from llmctl.engine.llm_engine import LLMEngine, TokenOutput
from llmctl.engine.pooling import Pooling
from llmctl.engine.request import FinishReason, Request
from llmctl.engine.sampling_params import SamplingParams
from llmctl.engine.scheduler_config import SchedulerConfig
from llmctl.errors import RequestError

PROMPT = [3, 1, 4, 1, 5, 9, 2, 7, 6, 5]
NOTHING = SamplingParams(max_tokens=0)
on_poolings = pytest.mark.parametrize("pooling", list(Pooling))
on_depths = pytest.mark.parametrize("depth", [1, 2])


def embedding(name: str, pooling: Pooling, prompt: Iterable[int] = PROMPT, **fields: int) -> Request:
    return Request(name, list(prompt), NOTHING, pooling=pooling, **fields)


def chat(name: str, tokens: int = 8, *, prompt: Iterable[int] = PROMPT, **fields: int) -> Request:
    return Request(name, list(prompt), SamplingParams(max_tokens=tokens, ignore_eos=True), **fields)


def run(engine: LLMEngine, *requests: Request, also: Request | None = None) -> dict[str, list[TokenOutput]]:
    """Outputs of these, and of one that runs already."""
    engine.add_requests(requests)
    outputs: dict[str, list[TokenOutput]] = {r.request_id: [] for r in (*requests, also) if r is not None}
    for _ in range(1000):
        if not engine.has_unfinished():
            return outputs
        for output in engine.step():
            outputs[output.request_id].append(output)
    raise AssertionError("the engine does not end")


def check(outputs: list[TokenOutput], request: Request) -> None:
    """One output, of the whole prompt's hidden states."""
    (output,) = outputs
    history = list(zip(request.prompt_token_ids, range(request.num_prompt_tokens), strict=True))
    states = np.stack([hidden_of(history[: i + 1]) for i in range(len(history))])
    expected = states[-1] if request.pooling is Pooling.LAST else states.sum(0) / np.float32(len(states))
    assert output.embedding is not None
    assert output.embedding.dtype == np.float32
    np.testing.assert_array_equal(output.embedding, expected)
    assert (output.new_token_ids, output.finish_reason) == ((), FinishReason.STOP)
    assert output.times is not None


@on_poolings
@pytest.mark.parametrize("budget", [1, 3, 4, 9, 10, 64])
def test_a_prompt_cut_anywhere(pooling: Pooling, budget: int) -> None:
    engine = LLMEngine(FakeRuntime(), SchedulerConfig(max_num_batched_tokens=budget))
    for length in (1, 4, 10):
        request = embedding("r", pooling, PROMPT[:length])
        check(run(engine, request)["r"], request)


@on_poolings
@on_depths
def test_no_logits_are_asked_for(pooling: Pooling, depth: int) -> None:
    runtime = FakeRuntime(steps_in_flight=depth)
    engine = LLMEngine(runtime, SchedulerConfig(max_num_batched_tokens=4))
    run(engine, embedding("r", pooling))
    pieces = [piece for plan in runtime.plans for piece in plan.slices]
    assert not any(piece.sample or piece.score_targets for piece in pieces)
    rows = [(len(piece.token_ids), piece.pool_rows) for piece in pieces]
    assert rows == ([(4, 4), (4, 4), (2, 2)] if pooling is Pooling.MEAN else [(4, 0), (4, 0), (2, 1)])
    assert engine.stats().num_generated_tokens == 0


@on_poolings
def test_a_cached_prefix_is_read_where_only_the_last_token_counts(pooling: Pooling) -> None:
    engine = LLMEngine(FakeRuntime(), SchedulerConfig())
    run(engine, chat("warm"))
    request = embedding("r", pooling)
    outputs = run(engine, request)["r"]
    check(outputs, request)
    assert outputs[0].num_cached_tokens == (8 if pooling is Pooling.LAST else 0)


@on_poolings
def test_what_an_embedding_computes_is_there_for_others(pooling: Pooling) -> None:
    engine = LLMEngine(FakeRuntime(), SchedulerConfig())
    run(engine, embedding("first", pooling))
    assert run(engine, chat("r"))["r"][-1].num_cached_tokens == 8


@on_poolings
@on_depths
def test_a_prompt_preempted_half_way(pooling: Pooling, depth: int) -> None:
    """A more important request takes its blocks when a part of it is computed; it begins again."""
    config = SchedulerConfig(max_num_batched_tokens=3, policy="priority", enable_prefix_caching=False)
    for steps in range(1, 7):
        engine = LLMEngine(FakeRuntime(num_blocks=8, steps_in_flight=depth), config)
        request = embedding("r", pooling, PROMPT + PROMPT, priority=1)
        engine.add_request(request)
        for _ in range(steps):
            assert not engine.step()
        outputs = run(engine, chat("urgent", prompt=PROMPT + PROMPT, priority=-1), also=request)["r"]
        assert request.num_preemptions or (depth, steps) == (2, 6)  # its last step was in flight
        check(outputs, request)


@on_depths
def test_chats_beside_embeddings_have_the_tokens_that_they_have_alone(depth: int) -> None:
    """Also those that bring no seed: theirs is by their number."""
    alone = LLMEngine(FakeRuntime(steps_in_flight=depth), SchedulerConfig())
    expected = run(alone, *(chat(f"c{i}", prompt=PROMPT[i:]) for i in range(3)))
    mixed = LLMEngine(FakeRuntime(num_blocks=40, steps_in_flight=depth), SchedulerConfig(max_num_batched_tokens=7))
    requests = []
    for i, pooling in enumerate((Pooling.LAST, Pooling.MEAN, Pooling.MEAN)):
        requests += [embedding(f"e{i}", pooling, [i, *PROMPT]), chat(f"c{i}", prompt=PROMPT[i:])]
    found = run(mixed, *requests)
    for name, outputs in expected.items():
        assert [o.new_token_ids for o in found[name]] == [o.new_token_ids for o in outputs]
        assert all(o.embedding is None for o in found[name])
    for request in requests[::2]:
        check(found[request.request_id], request)


def test_an_embedding_that_is_to_generate_is_refused() -> None:
    engine = LLMEngine(FakeRuntime(), SchedulerConfig())
    for tokens in (1, None):
        with pytest.raises(RequestError, match="max_tokens: expected 0 with pooling"):
            engine.add_request(
                Request("r", PROMPT, SamplingParams(max_tokens=tokens), pooling=Pooling.LAST),
            )


@on_poolings
def test_one_as_long_as_the_context(pooling: Pooling) -> None:
    runtime = FakeRuntime()
    request = embedding("r", pooling, [i % 7 for i in range(runtime.limits.max_model_len)])
    check(run(LLMEngine(runtime, SchedulerConfig(max_num_batched_tokens=10)), request)["r"], request)
