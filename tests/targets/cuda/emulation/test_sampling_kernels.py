"""sampling.cu under emulation, against the reference sampler and targets/reference/philox.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from emulator import kernels_from_text, missing, read, write
from machine import launch

from llmctl.engine.step import SamplingBatch
from llmctl.targets.reference.philox import uniform
from llmctl.targets.reference.sampler import sample

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
TYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}


def _tokens(logits: torch.Tensor, batch: SamplingBatch) -> list[int]:
    tag = next(t for t, dtype in TYPES.items() if dtype == logits.dtype)
    tokens = np.full(len(logits), -1, np.int32)
    launch(
        f"sample_{tag}", logits=logits, allowed=batch.allowed_mask, temperature=batch.temperature, top_k=batch.top_k,
        top_p=batch.top_p, min_p=batch.min_p, seeds=batch.seeds, positions=batch.positions, tokens=tokens,
    )  # fmt: skip
    return tokens.tolist()


def _batch(rows: int, temperature: float = 1.0, **filters: object) -> SamplingBatch:
    rng = np.random.default_rng(rows)
    seeds = rng.integers(0, 1 << 64, rows, np.uint64)
    positions = rng.integers(0, 1 << 20, rows, np.int64)
    arrays = {
        name: np.full(rows, value, np.int32 if name == "top_k" else np.float32) for name, value in filters.items()
    }
    return SamplingBatch(np.full(rows, temperature, np.float32), seeds, positions, **arrays)


def _logits(rows: int, vocab: int, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab)) * spread


def test_philox_is_bit_for_bit_that_of_the_host():
    rng = np.random.default_rng(0)
    seeds = np.concatenate([rng.integers(0, 1 << 64, 50, np.uint64), np.array([0, 2**64 - 1], np.uint64)])
    positions = np.concatenate([rng.integers(0, 1 << 62, 50, np.int64), np.array([0, 2**63 - 1], np.int64)])
    bits = np.empty(52, np.uint64)
    source = """#include "philox.cuh"
    LLMCTL_KERNEL(52, 1) philox(const u64* seeds, const long long* positions, u64* bits, int n) {
        const int i = llmctl::block_index() * 32 + llmctl::thread_index();
        if (i < n) bits[i] = llmctl::philox_bits(seeds[i], static_cast<u64>(positions[i]));
    }"""
    arguments = [read(seeds), read(positions), write(bits), np.int32(52)]
    kernels_from_text(source, "philox.cu").launch("philox", 2, 32, arguments)
    assert np.array_equal((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53, uniform(seeds, positions))


@pytest.mark.parametrize("tag", TYPES)
def test_greedy_is_the_lowest_id_among_the_largest(tag):
    logits = _logits(3, 2500).to(TYPES[tag])
    logits[0, [1030, 7, 2499]] = 50
    logits[1] = 0
    logits[1, 4] = -0.0
    logits[2, 2499] = 60
    assert _tokens(logits, _batch(3, temperature=0)) == [7, 0, 2499]


@pytest.mark.parametrize("tag", TYPES)
@pytest.mark.parametrize("vocab", [1, 31, 3001])
@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.05},
        {"top_k": 40, "top_p": 0.9, "min_p": 0.01},
        {"top_k": 3001, "top_p": 0.999},
        {"top_p": 1e-6},
    ],
)
def test_draws_equal_the_reference_sampler(tag, vocab, filters):
    logits = _logits(4, vocab).to(TYPES[tag])
    batch = _batch(4, temperature=0.8, **filters)
    assert _tokens(logits, batch) == sample(logits.float(), batch)[0].tolist()


def test_rows_may_differ_in_everything_and_be_part_of_wider_rows():
    wide = _logits(6, 700)
    batch = SamplingBatch(
        np.array([0, 1, 0.3, 2, 1, 1], np.float32), np.arange(6, dtype=np.uint64), np.arange(6, dtype=np.int64) * 7,
        top_k=np.array([0, 3, 0, 0, 50, 699], np.int32), top_p=np.array([1, 1, 0.9, 0.5, 0.8, 0.2], np.float32),
        min_p=np.array([0, 0, 0, 0.1, 0, 0], np.float32),
    )  # fmt: skip
    assert _tokens(wide[:, :650], batch) == sample(wide[:, :650], batch)[0].tolist()


def test_ties_at_the_threshold_are_kept_together():
    logits = torch.zeros(24, 100)
    logits[:, [10, 20, 30, 40]] = 5.0
    batch = _batch(24, top_k=2)
    assert set(_tokens(logits, batch)) == {10, 20, 30, 40}
    assert _tokens(logits, batch) == sample(logits, batch)[0].tolist()


def test_forbidden_tokens_are_never_drawn():
    logits = _logits(6, 77)
    allowed = np.zeros((6, 3), np.uint32)
    allowed[:, 1] = 0b1010  # tokens 33 and 35
    allowed[5] = 0  # nothing: token 0
    for temperature in (0.0, 1.0):
        batch = _batch(6, temperature=temperature, top_p=0.95)
        batch = SamplingBatch(batch.temperature, batch.seeds, batch.positions, top_p=batch.top_p, allowed_mask=allowed)
        tokens = _tokens(logits, batch)
        assert tokens == sample(logits, batch)[0].tolist()
        assert set(tokens[:5]) <= {33, 35}
        assert tokens[5] == 0


def test_a_row_draws_the_same_token_in_any_batch():
    logits, batch = _logits(5, 333), _batch(5, top_p=0.9)
    together = _tokens(logits, batch)
    for i in range(5):
        alone = SamplingBatch(
            batch.temperature[i : i + 1], batch.seeds[i : i + 1], batch.positions[i : i + 1],
            top_p=batch.top_p[i : i + 1],
        )  # fmt: skip
        assert _tokens(logits[i : i + 1], alone) == [together[i]]


@pytest.mark.slow
@pytest.mark.parametrize("spread", [0.01, 1.0, 10.0])
@pytest.mark.parametrize("filters", [{}, {"top_k": 1000}, {"top_p": 0.95}, {"top_k": 20_000, "top_p": 0.99}])
def test_draws_over_a_real_vocabulary(spread, filters):
    logits = _logits(16, 32_003, spread)
    batch = _batch(16, **filters)
    assert _tokens(logits, batch) == sample(logits, batch)[0].tolist()
