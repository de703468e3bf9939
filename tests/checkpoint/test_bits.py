"""Bit packing: hand-computed words, round trips, refusals."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmctl.checkpoint.bits import pack_words, unpack_words, values_per_period


def words(*values: int) -> list[int]:
    return [v - (1 << 32) if v >> 31 else v for v in values]


@pytest.mark.parametrize(
    ("bits", "values", "expected"),
    [
        (2, [1, 2, 3, 0] * 4, words(0x39393939)),
        (4, [0, 1, 2, 3, 4, 5, 6, 7], words(0x76543210)),
        (4, [8, 9, 10, 11, 12, 13, 14, 15], words(0xFEDCBA98)),
        (8, [1, 2, 3, 255], words(0xFF030201)),
    ],
)
def test_golden_words(bits: int, values: list[int], expected: list[int]) -> None:
    assert pack_words(torch.tensor(values, dtype=torch.uint8), bits).tolist() == expected


def test_three_bits_straddle_words() -> None:
    # Value 10 occupies bits 30-32, value 21 bits 63-65: 7 in those alone sets exactly these bits.
    values = torch.zeros(32, dtype=torch.uint8)
    values[10] = 7
    assert pack_words(values, 3).tolist() == words(0xC0000000, 0x1, 0)
    values[10], values[21] = 0, 7
    assert pack_words(values, 3).tolist() == words(0, 0x80000000, 0x3)
    values[21], values[11], values[22] = 0, 5, 6
    assert pack_words(values, 3).tolist() == words(0, 5 << 1, 6 << 2)


@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 3), st.integers(1, 4), st.randoms())
def test_round_trip_and_stream(bits: int, rows: int, periods: int, rng) -> None:
    count = periods * values_per_period(bits)
    table = [[rng.randrange(1 << bits) for _ in range(count)] for _ in range(rows)]
    packed = pack_words(torch.tensor(table, dtype=torch.uint8), bits)
    assert packed.shape == (rows, count * bits // 32)
    assert unpack_words(packed, bits).tolist() == table
    for row, line in zip(table, packed.tolist(), strict=True):
        stream = sum(value << (bits * j) for j, value in enumerate(row))
        assert sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(line)) == stream


@pytest.mark.parametrize(("bits", "count"), [(3, 8), (4, 7), (8, 2), (5, 32)])
def test_refuses_partial_words(bits: int, count: int) -> None:
    with pytest.raises(ValueError):
        pack_words(torch.zeros(count, dtype=torch.uint8), bits)


def test_refuses_values_too_wide() -> None:
    with pytest.raises(ValueError, match="does not fit in 3 bits"):
        pack_words(torch.full((32,), 8, dtype=torch.uint8), 3)


@pytest.mark.parametrize(("bits", "count"), [(2, 16), (3, 32), (4, 8), (8, 4)])
def test_words_of_one_period_may_lie_transposed(bits: int, count: int) -> None:
    """As GPTQ has a matrix with a single row of words."""
    codes = torch.arange(count * 5, dtype=torch.uint8).reshape(5, count) & ((1 << bits) - 1)
    words = torch.tensor(
        pack_words(codes, bits).T.tolist(), dtype=torch.int32
    )  # as it is read: [1, 5], one behind another
    assert words.stride() == (5, 1)
    assert torch.equal(unpack_words(words.T, bits), codes)
