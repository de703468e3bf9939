"""Requests whose sliding layers let go of blocks, and blocks that nobody holds full of NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from llmctl.engine.llm_engine import LLMEngine
from llmctl.engine.request import Request
from llmctl.engine.sampling_params import SamplingParams

Fill = Callable[[int, int], None]
"""Fills a block with a byte."""


def outputs(engine: LLMEngine, requests: list[Request]) -> list[list[int]]:
    """The tokens of each, block tables checked at every step."""
    for request in requests:
        engine.add_request(request)
    while engine.has_unfinished():
        engine.step()
        engine.scheduler.check()
    return [request.output_token_ids for request in requests]


def conversations(vocab: int, lengths: list[int], new: int, shared: int = 0) -> list[Request]:
    """Greedy requests of random prompts, ``shared`` tokens of all alike before ``lengths`` of each its own."""
    rng = np.random.default_rng(3)
    head = rng.integers(0, vocab, shared).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
    return [Request(str(i), head + rng.integers(0, vocab, n).tolist(), params) for i, n in enumerate(lengths)]


def poison_what_is_free(engine: LLMEngine, fill: Fill) -> None:
    """From now on blocks that nobody holds are of NaN, which all ones are in every dtype of a cache. They are zeros
    when they are handed out: native kernels multiply lanes that nobody wrote by 0."""
    pool = engine.scheduler.pool
    allocate, release = pool.allocate, pool.release

    def fill_all(blocks: Iterable[int], byte: int) -> None:
        for block in blocks:
            fill(block, byte)

    def allocated(count: int) -> list[int]:
        blocks = allocate(count)
        fill_all(blocks, 0)
        return blocks

    def released(blocks: Sequence[int]) -> None:
        release(blocks)
        fill_all([block for block in blocks if not pool.num_holders(block)], 0xFF)

    fill_all(range(pool.num_blocks), 0xFF)
    pool.allocate, pool.release = allocated, released  # type: ignore[method-assign]
