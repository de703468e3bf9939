"""KVBlocks: what a window lets go of, what is found in the prefix cache, and that a sequence never holds more than was
promised. The whole engine over KV groups: test_engine_machine.py."""

from __future__ import annotations

import pytest
from fake_runtime import FakeRuntime
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.engine.kv_blocks import KVBlocks, longest_sequence, sequence_blocks
from llmctl.engine.llm_engine import LLMEngine
from llmctl.engine.request import Request
from llmctl.engine.sampling_params import SamplingParams
from llmctl.engine.scheduler_config import SchedulerConfig
from llmctl.engine.step import RuntimeLimits

WINDOWS = st.lists(st.sampled_from([0, 0, 9, 5, 2, 1]), min_size=1, max_size=5).map(
    lambda windows: tuple(sorted(windows, key=lambda w: (w != 0, -w)))
)


def kv(windows: tuple[int, ...], blocks: int = 100, size: int = 2, step: int = 4) -> KVBlocks:
    return KVBlocks(RuntimeLimits(blocks, size, 1000, 50, windows), step_tokens=step, key=b"k")


def running(blocks: KVBlocks, tokens: list[int], computed: int) -> Request:
    """A request that holds blocks for all of its tokens, of which so many are computed and cached."""
    request = Request("r", tokens)
    blocks.pool.extend_hashes(request.block_hashes, tokens, None, None)
    blocks.start(request, blocks.nothing)
    blocks.grow(request, len(tokens))
    request.num_computed_tokens = computed
    blocks.cache(request, range(computed // blocks.pool.block_size))
    return request


def found(blocks: KVBlocks, tokens: list[int]) -> int:
    hashes: list[bytes] = []
    blocks.pool.extend_hashes(hashes, tokens, None, None)
    return blocks.match(hashes).num_blocks


def test_blocks_that_no_later_token_sees_are_let_go() -> None:
    blocks = kv((0, 5))
    request = running(blocks, list(range(20)), 12)
    whole, sliding = request.tables
    blocks.let_go([request])
    # The token at 12 sees 8 .. 12: from the fifth block on.
    null = 100
    assert request.tables == (whole, (null,) * 4 + sliding[4:])
    assert blocks.pool.num_free == 100 - 20 + 4
    blocks.check([request])
    request.num_computed_tokens = 13  # sees 9: in the same block
    blocks.let_go([request])
    assert request.gone == (0, 4)
    blocks.release(request)
    assert (request.tables, blocks.pool.num_free) == ((), 100)


def test_a_prefix_is_found_where_its_window_is() -> None:
    blocks = kv((0, 5))
    tokens = list(range(20))
    request = running(blocks, tokens, 20)
    sliding = request.tables[1]
    blocks.let_go([request])
    blocks.release(request)
    assert found(blocks, tokens) == 10
    prefix = blocks.match(request.block_hashes)
    assert prefix.gone == (0, 8)  # the token at 20 sees 16 .. 20
    assert prefix.tables[1][8:] == sliding[8:]
    forgotten = blocks.pool._blocks[sliding[8]]
    blocks.pool._forget(forgotten)
    # A hit of ten blocks, or of nine, would read the ninth; one of eight reads the seventh and eighth.
    assert found(blocks, tokens) == 8
    blocks.pool._forget(blocks.pool._blocks[sliding[5]])
    assert found(blocks, tokens) == 8
    blocks.pool._forget(blocks.pool._blocks[sliding[6]])
    assert found(blocks, tokens) == 5
    assert found(blocks, [*tokens[:7], 99]) == 3


def test_a_prefix_needs_all_blocks_of_groups_that_see_all() -> None:
    blocks = kv((0, 0, 5))
    tokens = list(range(20))
    request = running(blocks, tokens, 20)
    third = request.tables[1][3]
    blocks.release(request)
    blocks.pool._forget(blocks.pool._blocks[third])
    assert found(blocks, tokens) == 3


@given(st.sampled_from([1, 2, 5, 9, 30]), st.integers(1, 4), st.sets(st.integers(0, 19)), st.integers(0, 20))
@settings(deadline=None)
def test_the_longest_prefix_whose_window_is_whole(window: int, size: int, lost: set[int], length: int) -> None:
    blocks = kv((window,), size=size)
    request = running(blocks, list(range(length * size)), length * size)
    for index in lost & set(range(length)):
        blocks.pool._forget(blocks.pool._blocks[request.tables[0][index]])
    whole = [
        count for count in range(length + 1) if lost.isdisjoint(range(max(0, count * size - window + 1) // size, count))
    ]
    assert blocks.match(request.block_hashes).num_blocks == max(whole)


def test_a_prompt_that_is_not_cached_is_not_looked_up_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = kv((80,))
    asked: list[bytes] = []
    match = blocks.pool.match
    monkeypatch.setattr(blocks.pool, "match", lambda keys: match(asked.append(key) or key for key in keys))  # type: ignore[func-returns-value]
    assert found(blocks, list(range(2000))) == 0
    assert len(asked) < 40  # of 1000: one a window


@given(WINDOWS, st.integers(1, 5), st.integers(1, 9), st.integers(1, 60), st.data())
@settings(deadline=None)
def test_a_sequence_holds_no_more_than_was_promised(
    windows: tuple[int, ...], size: int, step: int, length: int, data: st.DataObject
) -> None:
    promised = sequence_blocks(windows, size, step, length)
    blocks = KVBlocks(RuntimeLimits(promised, size, length, 50, windows), step_tokens=step)
    assert blocks.longest == length
    request = Request("r", [0] * length)
    assert blocks.missing_after(blocks.nothing, length) <= promised
    blocks.start(request, blocks.nothing)
    while request.num_computed_tokens < length:
        blocks.let_go([request])
        count = min(data.draw(st.integers(1, step)), length - request.num_computed_tokens)
        assert blocks.num_held(request) + blocks.missing(request, length) <= promised
        blocks.grow(request, request.num_computed_tokens + count)  # raises when the pool is empty
        request.num_computed_tokens += count
        blocks.check([request])
        assert blocks.num_held(request) == promised - blocks.pool.num_free


@given(WINDOWS, st.integers(1, 5), st.integers(1, 9), st.integers(0, 60), st.integers(1, 40))
@settings(deadline=None)
def test_the_longest_sequence_fits_and_no_longer_one(
    windows: tuple[int, ...], size: int, step: int, num_blocks: int, limit: int
) -> None:
    longest = longest_sequence(windows, size, step, num_blocks, limit)
    fits = [n for n in range(limit + 1) if sequence_blocks(windows, size, step, n) <= num_blocks]
    assert longest == max(fits)


@given(st.integers(1, 5), st.integers(1, 12), st.integers(1, 3), st.integers(0, 40), st.integers(1, 2))
@settings(max_examples=10, deadline=None)
def test_a_long_request_fits_where_its_whole_context_would_not(
    size: int, budget: int, sliding: int, prompt: int, in_flight: int
) -> None:
    """Alone, and a second time with what the first left in the prefix cache."""
    windows = (0,) + (4,) * sliding
    blocks = sequence_blocks(windows, size, budget, 60)
    runtime = FakeRuntime(blocks, size, 60, 40, steps_in_flight=in_flight, windows=windows)
    engine = LLMEngine(runtime, SchedulerConfig(max_num_batched_tokens=budget))
    runtime.wipe_allocated(engine.scheduler.pool)
    outputs = []
    for name in "ab":
        request = Request(
            name, [7] * (prompt + 1), SamplingParams(temperature=0.0, max_tokens=59 - prompt, ignore_eos=True)
        )
        engine.add_request(request)
        while engine.has_unfinished():
            engine.step()
            engine.scheduler.check()
        outputs.append(request.output_token_ids)
        assert request.num_preemptions == 0
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) == 59 - prompt
