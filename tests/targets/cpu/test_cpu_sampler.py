"""The native sampler on logits that are known exactly, on every build of the kernels that this machine runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from cpu_graphs import Floats, Native, Sketch, each_variant, greedy
from scored_tokens import check_scores

from llmctl.engine.request import Request
from llmctl.engine.sampling_batch import SamplingBatcher
from llmctl.engine.sampling_params import SamplingParams
from llmctl.engine.step import SamplingBatch, StepResult
from llmctl.targets.cpu.toolchain import Variant, find_compiler
from llmctl.targets.reference.philox import uniform
from llmctl.targets.reference.sampler import sample

pytestmark = [
    pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler on this machine"),
    pytest.mark.xdist_group("cpu_kernels"),
]


def native_sample(logits: Floats, batch: SamplingBatch, variant: Variant) -> StepResult:
    sketch = Sketch()
    native = Native(sketch, sketch.rows(logits), variant, max_tokens=len(logits))
    result = native.sample(len(logits), batch)
    native.runtime.close()
    return result


@each_variant
@pytest.mark.parametrize("vocab", [1, 2, 15, 16, 17, 131, 1000])
def test_argmax_takes_the_lowest_id_of_a_tie(variant: Variant, vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    logits = rng.integers(-3, 3, (24, vocab)).astype(np.float32)
    logits[1] = -np.inf
    logits[2, :-1] = -np.inf
    logits[3] = -1e30
    logits[4] = logits[4, 0]
    found = native_sample(logits, greedy(24), variant).token_ids
    assert found.tolist() == logits.argmax(1).tolist()


def random_batch(rows: int, rng: np.random.Generator, **asked: Any) -> SamplingBatch:
    return SamplingBatch(
        rng.uniform(0.3, 2, rows).astype(np.float32),
        rng.integers(0, 2**63, rows).astype(np.uint64) * np.uint64(2) + np.uint64(1),
        rng.integers(0, 2**40, rows),
        **asked,
    )


def kept(scaled: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """Which tokens the filters leave of one row of log-weights f64 [V] (largest 0): top-k, then top-p, min-p."""
    least = -np.inf
    if 0 < top_k < len(scaled):
        least = np.sort(scaled)[-top_k]
    mass = np.where(scaled >= least, np.exp(scaled), 0)
    if top_p < 1:
        order = np.argsort(-scaled, kind="stable")
        before = np.cumsum(mass[order]) - mass[order]
        count = max(1, int((before < top_p * mass.sum()).sum()))
        least = max(least, scaled[order[count - 1]])
    if min_p > 0:
        least = max(least, np.log(min_p))
    return scaled >= least - 1e-6


FILTERS = [(0, 1.0, 0.0), (5, 1.0, 0.0), (0, 0.7, 0.0), (0, 1.0, 0.1), (40, 0.9, 0.02), (1, 1.0, 0.0), (0, 1e-6, 0.0)]


@each_variant
@pytest.mark.parametrize(("top_k", "top_p", "min_p"), FILTERS)
@pytest.mark.parametrize("vocab", [17, 131, 1000])
def test_draws_invert_the_distribution(variant: Variant, vocab: int, top_k: int, top_p: float, min_p: float) -> None:
    """The drawn token is where float64's running sum of the kept mass passes the row's uniform number."""
    rng = np.random.default_rng(vocab + top_k)
    rows = 32
    logits = (rng.permuted(np.tile(np.arange(vocab), (rows, 1)), axis=1) * (16 / vocab)).astype(np.float32)
    batch = random_batch(
        rows, rng,
        top_k=np.full(rows, top_k, np.int32), top_p=np.full(rows, top_p, np.float32),
        min_p=np.full(rows, min_p, np.float32),
    )  # fmt: skip
    found = native_sample(logits, batch, variant).token_ids
    draws = uniform(batch.seeds, batch.positions)
    for row, token in enumerate(found.tolist()):
        scaled = (logits[row].astype(np.float64) - logits[row].max()) / float(batch.temperature[row])
        mass = np.where(kept(scaled, top_k, top_p, min_p), np.exp(scaled), 0)
        high = np.cumsum(mass)[token] / mass.sum()
        assert mass[token] > 0
        assert high - mass[token] / mass.sum() - 1e-6 <= draws[row] <= high + 1e-6


@each_variant
@pytest.mark.parametrize("vocab", [17, 131, 1000])
def test_everything_together_equals_the_reference_sampler(variant: Variant, vocab: int) -> None:
    """Bias, mask, penalties, filters and log-probabilities in one batch of rows that ask for different things."""
    rng = np.random.default_rng(vocab)
    rows = 24
    logits = (rng.normal(size=(rows, vocab)) * 3).astype(np.float32)
    mask = rng.integers(0, 2**32, (rows, -(-vocab // 32)), dtype=np.uint32) | np.uint32(1 << 9)
    temperature = np.where(rng.random(rows) < 0.3, 0, rng.uniform(0.5, 1.5, rows)).astype(np.float32)
    batch = replace(
        random_batch(rows, rng),
        temperature=temperature,
        top_k=rng.choice([0, 3, 50], rows).astype(np.int32),
        top_p=rng.choice([1.0, 0.8], rows).astype(np.float32),
        repetition_penalty=rng.choice([1.0, 1.3, 0.8], rows).astype(np.float32),
        presence_penalty=rng.choice([0.0, 0.5, -0.5], rows).astype(np.float32),
        frequency_penalty=rng.choice([0.0, 0.2], rows).astype(np.float32),
        prompt_ids=tuple(rng.integers(0, vocab, 9).astype(np.int32) for _ in range(rows)),
        output_ids=tuple(rng.integers(0, vocab, int(n)).astype(np.int32) for n in rng.integers(0, 40, rows)),
        bias_rows=np.array([3, 0, 0, 7], np.int32),
        bias_ids=np.array([5, 7, 9, 9], np.int32),
        bias_values=np.array([3.0, -np.inf, 50.0, -100.0], np.float32),
        allowed_mask=mask,
        num_logprobs=rng.choice([-1, 0, 3, 20], rows).astype(np.int32),
    )
    mine = native_sample(logits, batch, variant)
    tokens, logprobs = sample(torch.from_numpy(logits), batch)
    assert mine.token_ids.tolist() == tokens.tolist()
    assert mine.logprobs is not None
    assert logprobs is not None
    for m, t in zip(mine.logprobs, logprobs, strict=True):
        if m is None or t is None:
            assert m is t
            continue
        assert (m.rank, m.top_ids) == (t.rank, t.top_ids)
        assert np.allclose((m.logprob, *m.top_logprobs), (t.logprob, *t.top_logprobs), rtol=0, atol=2e-5)


@each_variant
def test_log_probabilities_of_extreme_logits(variant: Variant) -> None:
    """No overflow and no cancellation, far from zero and with forbidden tokens."""
    logits = np.array([[1e4, 1e4 - 1, -np.inf, 1e4], [-1e4, -1e4 - 3, -1e4, -2e4], [0, -80, 80, 0]], np.float32)
    batch = replace(greedy(3), num_logprobs=np.full(3, 4, np.int32))
    result = native_sample(logits, batch, variant)
    assert result.logprobs is not None
    expected = torch.log_softmax(torch.from_numpy(logits).double(), -1).numpy()
    for row, entry in enumerate(result.logprobs):
        assert entry is not None
        assert np.allclose(entry.top_logprobs, expected[row][list(entry.top_ids)], rtol=1e-6, atol=1e-6)


@each_variant
def test_parameters_beyond_float32_sample_as_the_reference_does(variant: Variant) -> None:
    logits = np.random.default_rng(1).normal(0, 3, (1, 40)).astype(np.float32)
    for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
        for value in (5e-324, 1e-39, 1e39, 1.7976931348623157e308):
            if value > 1 and name in ("top_p", "min_p"):
                continue
            params = SamplingParams(**{name: value}, allowed_token_ids=[2, 5, 17, 31], seed=3)
            batch = SamplingBatcher(40).batch((Request("0", list(range(40)), params),), [40])
            expected, _ = sample(torch.from_numpy(logits), batch)
            found = native_sample(logits, batch, variant).token_ids.tolist()
            assert found == expected.tolist(), (name, value)


@each_variant
@pytest.mark.parametrize("vocab", [1, 17, 131, 1000])
@pytest.mark.parametrize("top", [0, 1, 20, 2000])
def test_scores_are_of_the_targets_and_of_equals_the_lowest_id_first(variant: Variant, vocab: int, top: int) -> None:
    rng = np.random.default_rng(vocab + top)
    logits = rng.integers(-4, 4, (24, vocab)).astype(np.float32)
    targets = rng.integers(0, vocab, 24)
    sketch = Sketch()
    native = Native(sketch, sketch.rows(logits), variant, max_tokens=24)
    found = native.score(targets.tolist(), top)
    native.runtime.close()
    check_scores(found, torch.log_softmax(torch.from_numpy(logits).double(), -1).numpy(), targets.tolist(), top, 1e-5)
    assert found.top_ids.tolist() == np.argsort(-logits, axis=1, kind="stable")[:, :top].tolist()
    assert found.ranks.tolist() == [1 + int((row > row[t]).sum()) for row, t in zip(logits, targets, strict=True)]
