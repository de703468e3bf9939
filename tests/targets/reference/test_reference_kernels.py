"""The reference kernels against their definitions, spelled out in float64 numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.targets.reference import kernels
from llmctl.targets.reference.kernels import AttentionGroup


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def torched(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(a) for a in arrays]


def rms(x: np.ndarray, w: np.ndarray, eps: float) -> np.ndarray:
    wide = x.astype(np.float64)
    return wide / np.sqrt((wide**2).mean(-1, keepdims=True) + eps) * w


@pytest.mark.parametrize("plus_one", [False, True])
def test_rms_norm(plus_one: bool) -> None:
    x, w = normal(7, 33), normal(33, seed=1)
    found = kernels.rms_norm(*torched(x, w), 1e-3, plus_one)
    np.testing.assert_allclose(found, rms(x, w + plus_one, 1e-3), atol=1e-5)


def test_head_rms_norm() -> None:
    x, w = normal(4, 15), normal(5, seed=1)
    found = kernels.head_rms_norm(*torched(x, w), 1e-6, 5)
    np.testing.assert_allclose(found, rms(x.reshape(4, 3, 5), w, 1e-6).reshape(4, 15), atol=1e-5)


def test_norms_of_16_bit_are_computed_in_float32() -> None:
    """Squares of 300 overflow float16; the norm of a constant row is its sign."""
    x = torch.full((2, 64), 300.0, dtype=torch.float16)
    ones, zeros = torch.ones(64), torch.zeros(64)
    torch.testing.assert_close(kernels.rms_norm(x, ones, 1e-6), torch.ones_like(x))
    torch.testing.assert_close(kernels.layer_norm(x, ones, zeros, 1e-6), torch.zeros_like(x))


def test_layer_norm_and_fused_adds() -> None:
    x, r, w, b = normal(5, 12), normal(5, 12, seed=1), normal(12, seed=2), normal(12, seed=3)
    total = (x + r).astype(np.float64)
    centred = total - total.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * w + b
    y, s = kernels.add_layer_norm(*torched(x, r, w, b), 1e-5)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_array_equal(s, x + r)
    np.testing.assert_allclose(kernels.layer_norm(*torched(x + r, w, b), 1e-5), expected, atol=1e-5)
    y, s = kernels.add_rms_norm(*torched(x, r, w), 1e-5)
    np.testing.assert_allclose(y, rms(x + r, w, 1e-5), atol=1e-5)
    np.testing.assert_array_equal(s, x + r)


def test_embeddings() -> None:
    w, p = normal(9, 4), normal(6, 4, seed=1)
    ids, positions = torch.tensor([3, 0, 3]), torch.tensor([1, 2, 0])
    x = kernels.embed(ids, torch.from_numpy(w), 2.0)
    np.testing.assert_array_equal(x, w[[3, 0, 3]] * 2)
    np.testing.assert_array_equal(kernels.pos_embed(x, positions, torch.from_numpy(p), 2), x.numpy() + p[[3, 4, 2]])


ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
}


@pytest.mark.parametrize("fn", ACTIVATIONS)
def test_activations_and_gated_epilogues(fn: str) -> None:
    x, w, b = normal(6, 5), normal(14, 5, seed=1), normal(14, seed=2)
    h = x.astype(np.float64) @ w.T + b
    np.testing.assert_allclose(kernels.act(torch.from_numpy(x), fn), ACTIVATIONS[fn](x.astype(np.float64)), atol=1e-6)
    gated = kernels.linear_gated(*torched(x, w, b), f"{fn}_mul")
    np.testing.assert_allclose(gated, ACTIVATIONS[fn](h[:, :7]) * h[:, 7:], atol=1e-5)


def test_linear_and_splits() -> None:
    x, w, b = normal(6, 5), normal(9, 5, seed=1), normal(9, seed=2)
    expected = x @ w.T + b
    np.testing.assert_allclose(kernels.linear(*torched(x, w, b)), expected, atol=1e-6)
    np.testing.assert_allclose(kernels.linear(*torched(x, w)), expected - b, atol=1e-6)
    parts = kernels.linear_splits(*torched(x, w, b), (4, 3, 2))
    assert [p.shape[1] for p in parts] == [4, 3, 2]
    np.testing.assert_allclose(torch.cat(parts, 1), expected, atol=1e-6)


@pytest.mark.parametrize("padded", [True, False])
def test_kv_write_drops_padding_and_touches_nothing_else(padded: bool) -> None:
    cache = torch.full((2, 3, 4, 2, 5), 7.0)
    k, v = torched(normal(4, 10), normal(4, 10, seed=1))
    slots = [11, -1, 0, 6] if padded else [11, 3, 0, 6]
    kernels.kv_write(cache, k, v, torch.tensor(slots), padded=padded)
    expected = np.full((2, 12, 10), 7.0, np.float32)
    for row, slot in enumerate(slots):
        if slot >= 0:
            expected[0, slot], expected[1, slot] = k[row], v[row]
    np.testing.assert_array_equal(cache.view(2, 12, 10), expected)


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, softcap: float) -> np.ndarray:
    """One query head vector over keys and values [n, dim]."""
    scores = k.astype(np.float64) @ q * scale
    scores = softcap * np.tanh(scores / softcap) if softcap else scores
    weights = np.exp(scores - scores.max())
    return weights @ v / weights.sum()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_paged_attention(data: st.DataObject) -> None:
    """Random groups: prefill with a prefix, and decodes padded to the longest; rows in no group are zero."""
    kv_heads, repeat = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    dim, block, blocks = data.draw(st.sampled_from([1, 5, 8])), data.draw(st.integers(1, 5)), 7
    heads, capacity = kv_heads * repeat, block * blocks
    softcap = data.draw(st.sampled_from([0.0, 0.0, 3.0]))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    cache = rng.normal(size=(2, blocks, block, kv_heads, dim)).astype(np.float32)
    flat = cache.reshape(2, capacity, kv_heads, dim)
    groups, expected, row = [], [], 0
    q = rng.normal(size=(24, heads * dim)).astype(np.float32)
    for _ in range(data.draw(st.integers(0, 3))):
        batch = data.draw(st.integers(1, 3))
        queries = data.draw(st.integers(1, 4)) if batch == 1 else 1
        lengths = [data.draw(st.integers(queries, max(queries, capacity))) for _ in range(batch)]
        if max(lengths) > capacity:
            continue
        longest = max(lengths)
        slots = np.zeros((batch, longest), np.int64)
        mask = np.zeros((batch, 1, queries, longest), np.float32)
        for i, length in enumerate(lengths):
            slots[i, :length] = rng.permutation(capacity)[:length]
            for j in range(queries):
                visible = length - queries + j + 1
                mask[i, 0, j, visible:] = -np.inf
                per_head = [
                    attend(q[row + i * queries + j].reshape(heads, dim)[h], *flat[:, slots[i, :visible], h // repeat],
                           dim**-0.5, softcap)
                    for h in range(heads)
                ]  # fmt: skip
                expected.append((row + i * queries + j, np.concatenate(per_head)))
        count = batch * queries
        rows = slice(row, row + count) if data.draw(st.booleans()) else torch.arange(row, row + count)
        groups.append(
            AttentionGroup(rows, torch.from_numpy(slots.reshape(-1)), torch.from_numpy(mask), batch, queries, longest)
        )
        row += count
    found = kernels.paged_attention(*torched(q, cache), groups, heads, dim**-0.5, softcap).numpy()
    for index, values in expected:
        np.testing.assert_allclose(found[index], values, atol=1e-5)
    np.testing.assert_array_equal(found[row:], 0)


def test_dequantize_and_gather() -> None:
    codes = np.array([[0, 5, 15], [7, 8, 9]], np.uint8)
    scales, zeros = np.array([[0.5, 2.0], [1.0, 0.25]], np.float32), np.array([[8, 5], [7, 9]], np.uint8)
    found = kernels.dequantize(*torched(codes, scales, zeros), torch.tensor([0, 1, 0]))
    np.testing.assert_array_equal(found, [[-4.0, 0.0, 3.5], [0.0, -0.25, 2.0]])
    x = normal(5, 2)
    np.testing.assert_array_equal(kernels.gather_rows(torch.from_numpy(x), torch.tensor([4, 0, 4])), x[[4, 0, 4]])
