"""The sampler against a naive per-row implementation in float64 numpy."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from llmctl.engine.request import Request
from llmctl.engine.sampling_batch import SamplingBatcher
from llmctl.engine.sampling_params import SamplingParams
from llmctl.engine.step import SamplingBatch
from llmctl.targets.reference import sampler
from llmctl.targets.reference.philox import uniform
from llmctl.targets.reference.sampler import sample

PER_ROW = ("temperature", "seeds", "positions", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
           "frequency_penalty", "allowed_mask", "num_logprobs")  # fmt: skip


def adjusted_row(logits: NDArray, batch: SamplingBatch, row: int) -> NDArray:
    """Bias, mask and penalties of one row, in float64."""
    x = logits[row].astype(np.float64)
    if batch.bias_rows is not None:
        for r, token, value in zip(batch.bias_rows, batch.bias_ids, batch.bias_values, strict=True):
            x[token] += value if r == row else 0
    if batch.allowed_mask is not None:
        for token in range(len(x)):
            if not int(batch.allowed_mask[row, token // 32]) >> (token % 32) & 1:
                x[token] = -np.inf
    output = [] if batch.output_ids is None else batch.output_ids[row].tolist()
    prompt = [] if batch.prompt_ids is None else batch.prompt_ids[row].tolist()
    if batch.repetition_penalty is not None:
        for token in set(output) | set(prompt):
            penalty = batch.repetition_penalty[row]
            x[token] = x[token] / penalty if x[token] > 0 else x[token] * penalty
    for token in set(output):
        x[token] -= output.count(token) * (0 if batch.frequency_penalty is None else batch.frequency_penalty[row])
        x[token] -= 0 if batch.presence_penalty is None else batch.presence_penalty[row]
    return x


def kept_mass(x: NDArray, batch: SamplingBatch, row: int) -> NDArray:
    """Unnormalised probability of every token after temperature and filters."""
    scaled = (x - x.max()) / batch.temperature[row]
    mass = np.exp(scaled)
    if batch.top_k is not None and batch.top_k[row] > 0:
        mass[mass < np.sort(mass)[::-1][min(batch.top_k[row], len(x)) - 1]] = 0
    if batch.top_p is not None and batch.top_p[row] < 1:
        more_likely = np.array([mass[mass > m].sum() for m in mass])
        mass = np.where(more_likely < batch.top_p[row] * mass.sum(), mass, 0)
    if batch.min_p is not None:
        mass[np.exp(scaled) < batch.min_p[row]] = 0
    return mass


def check_row(logits: NDArray, batch: SamplingBatch, row: int, token: int) -> None:
    """The token is the naive one; where float32 rounding may decide, it is one the rounding can explain."""
    x = adjusted_row(logits, batch, row)
    if not np.isfinite(x).any():
        assert token == 0
        return
    if batch.temperature[row] == 0:
        # The rows' values are small integers (see ``batches``), exact in float32: the lowest id among the largest.
        assert x[token] >= x.max() - 1e-5
        if token != int(np.argmax(x)):
            assert x[token] != x[int(np.argmax(x))]
        return
    mass = kept_mass(x, batch, row)
    assert mass[token] > 0 or _near_a_threshold(x, batch, row)
    cdf = np.cumsum(mass)
    target = uniform(batch.seeds[row : row + 1], batch.positions[row : row + 1])[0] * cdf[-1]
    naive = min(int(np.searchsorted(cdf, target, side="right")), int(np.searchsorted(cdf, cdf[-1])))
    if token != naive and not _near_a_threshold(x, batch, row):
        assert np.abs(cdf - target).min() < 1e-5 * cdf[-1]


def _near_a_threshold(x: NDArray, batch: SamplingBatch, row: int) -> bool:
    """Whether a filter's comparison is within float32 rounding for some token."""
    mass = np.exp((x - x.max()) / batch.temperature[row])
    near = False
    if batch.min_p is not None and batch.min_p[row] > 0:
        near |= bool(np.isclose(mass, batch.min_p[row], rtol=1e-5).any())
    if batch.top_p is not None and batch.top_p[row] < 1:
        left = mass.copy()
        if batch.top_k is not None and batch.top_k[row] > 0:
            left[left < np.sort(left)[::-1][min(batch.top_k[row], len(x)) - 1]] = 0
        before = np.array([left[left > m].sum() for m in left])
        near |= bool(np.isclose(before, batch.top_p[row] * left.sum(), rtol=1e-5).any())
        distinct = np.unique(x[np.isfinite(x)])
        near |= bool((np.diff(distinct) < 1e-5).any())
    return near


@st.composite
def batches(draw: st.DrawFn) -> tuple[NDArray[np.float32], SamplingBatch]:
    """Logits on a grid of eighths, so that ties happen and sums are exact; any subset of the parameters."""
    rows, vocab = draw(st.integers(1, 5)), draw(st.integers(2, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = (rng.integers(-40, 40, (rows, vocab)) / 8).astype(np.float32)

    def maybe(make: Any) -> Any:
        return make() if draw(st.booleans()) else None

    def floats(*choices: float) -> Any:
        return lambda: rng.choice(np.array(choices, np.float32), rows)

    def ids(most: int) -> tuple[NDArray[np.int32], ...]:
        return tuple(rng.integers(0, vocab, rng.integers(0, most)).astype(np.int32) for _ in range(rows))

    mask = rng.integers(0, 2**32, (rows, -(-vocab // 32)), dtype=np.uint64).astype(np.uint32)
    batch = SamplingBatch(
        temperature=rng.choice(np.array([0, 0.25, 1, 1.5], np.float32), rows),
        seeds=rng.integers(0, 2**63, rows).astype(np.uint64),
        positions=rng.integers(0, 10000, rows),
        top_k=maybe(lambda: rng.integers(0, vocab + 2, rows).astype(np.int32)),
        top_p=maybe(floats(0.05, 0.5, 0.9, 1)),
        min_p=maybe(floats(0, 0.05, 0.3, 1)),
        repetition_penalty=maybe(floats(1, 2, 0.5)),
        presence_penalty=maybe(floats(0, 0.5, -1)),
        frequency_penalty=maybe(floats(0, 0.25, -0.5)),
        prompt_ids=ids(9),
        output_ids=ids(9),
        allowed_mask=maybe(lambda: mask),
    )
    if draw(st.booleans()):
        count = draw(st.integers(0, 6))
        batch = replace(
            batch,
            bias_rows=rng.integers(0, rows, count).astype(np.int32),
            bias_ids=rng.integers(0, vocab, count).astype(np.int32),
            bias_values=rng.choice(np.array([-np.inf, -2, 1.5, 100], np.float32), count),
        )
    return logits, batch


@settings(max_examples=300, deadline=None)
@given(batches())
def test_against_the_naive_sampler(case: tuple[NDArray[np.float32], SamplingBatch]) -> None:
    logits, batch = case
    before = logits.copy()
    tokens, logprobs = sample(torch.from_numpy(logits), batch)
    assert tokens.dtype == np.int32
    assert logprobs is None
    np.testing.assert_array_equal(logits, before)
    for row, token in enumerate(tokens.tolist()):
        check_row(logits, batch, row, token)


def one_row(batch: SamplingBatch, row: int) -> SamplingBatch:
    """The batch with nothing but one of its rows."""
    changes: dict[str, Any] = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if value is not None and field.name in PER_ROW:
            changes[field.name] = value[row : row + 1]
    if batch.bias_rows is not None and batch.bias_ids is not None and batch.bias_values is not None:
        mine = batch.bias_rows == row
        changes |= {"bias_rows": batch.bias_rows[mine] * 0, "bias_ids": batch.bias_ids[mine]}
        changes["bias_values"] = batch.bias_values[mine]
    if batch.prompt_ids is not None and batch.output_ids is not None:
        changes |= {"prompt_ids": (batch.prompt_ids[row],), "output_ids": (batch.output_ids[row],)}
    return replace(batch, **changes)


@settings(max_examples=150, deadline=None)
@given(batches())
def test_a_row_does_not_see_the_others(case: tuple[NDArray[np.float32], SamplingBatch]) -> None:
    logits, batch = case
    together, _ = sample(torch.from_numpy(logits), batch)
    for row in range(len(logits)):
        alone, _ = sample(torch.from_numpy(logits[row : row + 1]), one_row(batch, row))
        assert alone[0] == together[row]


def plain(rows: int, temperature: float = 1.0, **changes: Any) -> SamplingBatch:
    batch = SamplingBatch(
        np.full(rows, temperature, np.float32), np.full(rows, 5, np.uint64), np.arange(rows, dtype=np.int64)
    )
    return replace(batch, **changes)


def test_draws_follow_the_distribution() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.125], np.float32))
    tokens, _ = sample(torch.from_numpy(np.tile(logits, (8000, 1))), plain(8000))
    shares = np.bincount(tokens, minlength=4) / 8000
    np.testing.assert_allclose(shares, np.exp(logits), atol=0.02)


@pytest.mark.parametrize("size", [70, 5000])
def test_top_p_looks_as_deep_as_it_must(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without the shortcut for peaked rows the same tokens are drawn, from flat rows and from peaked ones."""
    rng = np.random.default_rng(0)
    flat, peaked = rng.normal(size=(6, size)) * 0.01, rng.normal(size=(6, size)) * 6
    logits = torch.from_numpy(np.concatenate([flat, peaked]).astype(np.float32))
    batch = plain(12, top_p=np.full(12, 0.9, np.float32))
    expected, _ = sample(logits, batch)
    for count in (1, 16, size):
        monkeypatch.setattr(sampler, "_NUCLEUS", count)
        np.testing.assert_array_equal(sample(logits, batch)[0], expected)
    mass = np.exp(logits.numpy().astype(np.float64))
    for row, token in enumerate(expected):
        assert mass[row][mass[row] > mass[row, token]].sum() < 0.9 * mass[row].sum()


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({}, {0, 1, 2, 3, 4}),
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 3}, {0, 1, 2, 3}),  # tokens 2 and 3 tie
        ({"top_k": 0}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.49}, {0}),
        ({"top_p": 0.51}, {0, 1}),
        ({"top_p": 0.76}, {0, 1, 2, 3}),
        ({"top_p": 1e-9}, {0}),
        ({"top_p": 0.6, "top_k": 2}, {0}),  # top-k leaves 2/3 and 1/3
        ({"top_p": 0.7, "top_k": 2}, {0, 1}),
        ({"min_p": 0.5}, {0, 1}),
        ({"min_p": 0.26}, {0, 1}),
        ({"min_p": 1.0}, {0}),
        ({"min_p": 0.1, "top_p": 0.99}, {0, 1, 2, 3}),
    ],
)
def test_what_the_filters_keep(filters: dict[str, float], kept: set[int]) -> None:
    mass = [0.5, 0.25, 0.1171875, 0.1171875, 0.015625]
    logits = torch.tensor(mass).log().expand(2000, 5).contiguous()
    dtypes = {"top_k": np.int32, "top_p": np.float32, "min_p": np.float32}
    batch = plain(2000, **{k: np.full(2000, v, dtypes[k]) for k, v in filters.items()})
    assert set(sample(logits, batch)[0].tolist()) == kept


@pytest.mark.parametrize(("draw", "token"), [(0.0, 2), (0.4999, 2), (0.5, 5), (1 - 2**-53, 5)])
def test_the_ends_of_the_draw(draw: float, token: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token without mass is never drawn, not even by u = 0 or the largest u below 1."""
    monkeypatch.setattr(sampler, "uniform", lambda seeds, _: np.full(len(seeds), draw))
    logits = torch.full((1, 8), -torch.inf)
    logits[0, [2, 5]] = 3.0
    assert sample(logits, plain(1))[0].tolist() == [token]


def test_extreme_temperatures_and_logits() -> None:
    logits = torch.tensor([[1e4, -1e4, 9.9e3], [0.0, -torch.inf, -torch.inf], [-torch.inf] * 3])
    for temperature in (1e-30, 1e-3, 1.0, 100.0):
        tokens, _ = sample(logits, plain(3, temperature))
        assert tokens.tolist() in ([0, 0, 0], [2, 0, 0])
    assert sample(logits, plain(3, 0.0))[0].tolist() == [0, 0, 0]


def test_greedy_takes_the_lowest_id_of_a_tie() -> None:
    logits = torch.zeros(3, 4099)
    logits[0, [4098, 17, 2000]] = 1.0
    logits[1, [4098, 4097]] = 1.0
    assert sample(logits, plain(3, 0.0))[0].tolist() == [17, 4097, 0]


def test_logprobs_are_of_the_raw_distribution() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4, 50)).astype(np.float32)
    bias = {"bias_rows": np.array([0, 2, 3], np.int32), "bias_ids": np.array([7, 7, 7], np.int32)}
    batch = plain(4, 0.0, num_logprobs=np.array([0, -1, 5, 50], np.int32), **bias)
    batch = replace(batch, bias_values=np.full(3, 100, np.float32))
    tokens, logprobs = sample(torch.from_numpy(logits), batch)
    assert logprobs is not None
    assert tokens[[0, 2, 3]].tolist() == [7, 7, 7]
    assert logprobs[1] is None
    raw = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    for row, count in ((0, 0), (2, 5), (3, 50)):
        entry, order = logprobs[row], np.argsort(-raw[row])
        assert entry is not None
        assert entry.logprob == pytest.approx(raw[row, 7], abs=1e-5)
        assert entry.rank == order.tolist().index(7) + 1
        assert list(entry.top_ids) == order[:count].tolist()
        np.testing.assert_allclose(entry.top_logprobs, raw[row, order[:count]], atol=1e-5)


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "repetition_penalty"])
@pytest.mark.parametrize("value", [5e-324, 1e-39, 1e39, 1.7976931348623157e308])
def test_parameters_beyond_float32_sample_an_allowed_token(name: str, value: float) -> None:
    """A forbidden token's logit is -inf: times 0, or over infinity, it is not a number."""
    if value > 1 and name in ("top_p", "min_p"):
        value = 1.0
    params = SamplingParams(**{name: value}, allowed_token_ids=[2, 5], logprobs=2)
    requests = tuple(Request(str(i), list(range(8)), params) for i in range(16))
    logits = torch.from_numpy(np.random.default_rng(0).normal(0, 3, (16, 8)).astype(np.float32))
    tokens, logprobs = sample(logits, SamplingBatcher(8).batch(requests, [8] * 16))
    assert set(tokens.tolist()) <= {2, 5}
    assert logprobs is not None
    assert all(row is not None and np.isfinite(row.logprob) for row in logprobs)
