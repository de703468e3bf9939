"""The CUDA weight layout: round trips, documented positions, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from llmctl.graph.code_books import CODE_BOOKS
from llmctl.targets.cuda.layout import STEP, TILE, CudaFormat, from_planes, pack, row_order, unpack


def planes_of(fmt: CudaFormat, seed: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    rng = np.random.default_rng(seed)
    rows, columns = fmt.shape
    groups = 1 if fmt.group == -1 else -(-columns // fmt.group)
    codes = rng.integers(0, 2**fmt.bits, fmt.shape, np.uint8)
    scales = rng.random((rows, groups)).astype(np.float16)
    zeros = rng.integers(0, 2**fmt.bits, (rows, groups), np.uint8)
    return codes, scales, zeros


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([4, 8]),
    rows=st.integers(1, 80),
    eights=st.integers(1, 40),
    group=st.sampled_from([-1, 16, 32, 64, 128, 256]),
    gated=st.booleans(),
    symmetric=st.booleans(),
    book=st.sampled_from(["", "nf4", "fp8_e4m3"]),
    minimum=st.booleans(),
    seed=st.integers(0, 99),
)
def test_unpack_inverts_pack(
    bits: int, rows: int, eights: int, group: int, gated: bool, symmetric: bool, book: str, minimum: bool, seed: int
) -> None:
    book = book if book and CODE_BOOKS[book].bits == bits and group != 16 else ""
    minimum = minimum and not book and group in (16, 32)
    symmetric = not minimum and (symmetric or bool(book) or group == 16)
    shape = rows * 2 if gated else rows, eights * 8
    fmt = CudaFormat(bits, shape, gated, group, symmetric, book=book, minimum=minimum)
    codes, scales, zeros = planes_of(fmt, seed)
    minimums = -scales[:, ::-1] if minimum else None
    packed = pack(codes, scales, None if symmetric or minimum else zeros, fmt, minimums=minimums)
    assert {name: (array.shape, array.dtype.itemsize) for name, array in packed.planes().items()} == {
        name: (shape, {"F32": 4, "F16": 2, "U8": 1}[dtype]) for name, (dtype, shape) in fmt.planes().items()
    }
    found_codes, found_scales, found_zeros, found_minimums = unpack(from_planes(fmt, packed.planes()))
    groups = scales.shape[1]
    assert np.array_equal(found_codes, codes)
    assert np.array_equal(found_scales[:, :groups], scales)
    assert not found_scales[:, groups:].any()
    middle = 0 if book or minimum else 2 ** (bits - 1)
    assert np.array_equal(found_zeros[:, :groups], np.full_like(zeros, middle) if symmetric or minimum else zeros)
    assert (found_minimums is None) is (minimums is None)
    if found_minimums is not None:
        assert np.array_equal(found_minimums[:, :groups], minimums)
        assert not found_minimums[:, groups:].any()


@pytest.mark.parametrize("bits", [4, 8])
def test_columns_by_halves_are_those_of_a_k_step(bits: int) -> None:
    by_halves = CudaFormat(bits, (64, 256), group=16, symmetric=True)
    codes, scales, _ = planes_of(by_halves, 3)
    in_order = CudaFormat(bits, (64, 256), symmetric=True)
    places = np.arange(256)
    chunk, place = places // 32 * 32, places % 32
    t, s, i = place // 8, place // 4 % 2, place % 4
    expected = pack(codes[:, chunk + 16 * s + 4 * t + i], scales[:, :1], None, in_order)
    assert np.array_equal(pack(codes, scales, None, by_halves).tiles, expected.tiles)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_lane_finds_its_codes_where_dequant_cuh_says(bits: int) -> None:
    fmt = CudaFormat(bits, (64, 256), group=64)
    codes, scales, zeros = planes_of(fmt, 3)
    packed = pack(codes, scales, zeros, fmt)
    vectors = packed.tiles.view("<u4").reshape(2, 8, bits // 4, 32, 4)  # tile, chunk, vector, lane, word
    for tile, chunk, lane, r, s in np.ndindex(2, 8, 32, 2, 2):
        g, t = divmod(lane, 4)
        for h, c in np.ndindex(2, 4):
            row, column = 32 * tile + 16 * r + g + 8 * h, 32 * chunk + 8 * t + 4 * s + c
            if bits == 4:
                nibble = h + 2 * (c // 2) + 4 * (c % 2)
                found = int(vectors[tile, chunk, 0, lane, 2 * r + s]) >> (4 * nibble) & 15
            else:
                found = int(vectors[tile, chunk, r, lane, 2 * s + h]) >> (8 * c) & 255
            assert found == codes[row, column]
    assert packed.zeros is not None
    for tile, group, g, j in np.ndindex(2, 4, 8, 4):
        assert packed.scales.view(np.float16)[tile, group, 4 * g + j] == scales[32 * tile + g + 8 * j, group]
        assert packed.zeros[tile, group, 4 * g + j] == zeros[32 * tile + g + 8 * j, group]


def test_gate_and_up_rows_alternate_by_eights() -> None:
    order = row_order(40, gated=True)
    assert len(order) % TILE == 0
    assert order[:16].tolist() == [*range(8), *range(20, 28)]
    assert order[32:48].tolist() == [*range(16, 20), -1, -1, -1, -1, *range(36, 40), -1, -1, -1, -1]


@pytest.mark.parametrize(("rows", "gated"), [(40, True), (33, False)])
def test_experts_lie_one_below_the_other_as_each_would_alone(rows: int, gated: bool) -> None:
    fmt = CudaFormat(4, (3 * rows, 256), gated, 64, experts=3)
    codes, scales, zeros = planes_of(fmt, 7)
    packed = pack(codes, scales, zeros, fmt)
    assert zeros is not None
    each = [
        pack(codes[part], scales[part], zeros[part], CudaFormat(4, (rows, 256), gated, 64))
        for part in (slice(e * rows, e * rows + rows) for e in range(3))
    ]
    for name, plane in packed.planes().items():
        assert np.array_equal(plane, np.concatenate([one.planes()[name] for one in each]))
    found = unpack(packed)
    assert np.array_equal(found[0], codes)
    assert np.array_equal(found[1], scales)


@pytest.mark.parametrize(("group", "symmetric"), [(64, False), (16, True)])
def test_act_order_sorts_columns_by_group(group: int, symmetric: bool) -> None:
    fmt = CudaFormat(4, (32, 256), group=group, symmetric=symmetric, permuted=True)
    codes, scales, zeros = planes_of(fmt, 5)
    g_idx = np.random.default_rng(0).permutation(np.arange(256) // group).astype(np.int32)
    packed = pack(codes, scales, zeros, fmt, g_idx)
    assert packed.permutation is not None
    assert np.array_equal(unpack(packed)[0], codes[:, packed.permutation])
    assert np.array_equal(g_idx[packed.permutation], np.arange(256) // group)
    g_idx[g_idx == 0] = 1
    with pytest.raises(ValueError, match=f"act-order groups are not of {group} columns"):
        pack(codes, scales, zeros, fmt, g_idx)


@pytest.mark.parametrize(
    ("bits", "shape", "gated", "group", "reason"),
    [
        (3, (32, 128), False, 64, "3-bit codes"),
        (4, (32, 100), False, -1, "100 columns"),
        (4, (32, 128), False, 48, "groups of 48"),
        (4, (32, 128), False, 0, "groups of 0"),
        (4, (32, 128), False, 16, "groups of 16 with zeros"),
        (4, (33, 128), True, 32, "33 rows"),
    ],
)
def test_refusals(bits: int, shape: tuple[int, int], gated: bool, group: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        CudaFormat(bits, shape, gated, group)


@pytest.mark.parametrize(
    ("bits", "symmetric", "book", "reason"),
    [
        (8, False, "fp8_e4m3", "zeros beside the code book fp8_e4m3"),
        (4, False, "nf4", "zeros beside the code book nf4"),
    ],
)
def test_books_that_are_refused(bits: int, symmetric: bool, book: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        CudaFormat(bits, (32, 128), symmetric=symmetric, book=book)


def test_scales_beyond_float16_are_refused() -> None:
    fmt = CudaFormat(4, (32, STEP))
    codes, _, zeros = planes_of(fmt, 0)
    with pytest.raises(ValueError, match="float16"):
        pack(codes, np.full((32, 1), 1e6, np.float32), zeros, fmt)


@pytest.mark.parametrize(
    ("group", "symmetric", "book", "reason"),
    [
        (64, False, "", "minimums in groups of 64"),
        (-1, False, "", "minimums in groups of -1"),
        (32, True, "", "a minimum beside a zero"),
        (32, True, "nf4", "a minimum beside a zero"),
    ],
)
def test_minimums_that_are_refused(group: int, symmetric: bool, book: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        CudaFormat(4, (32, 128), group=group, symmetric=symmetric, book=book, minimum=True)


def test_minimums_beyond_float16_are_refused() -> None:
    fmt = CudaFormat(4, (32, 128), group=32, minimum=True)
    codes, scales, _ = planes_of(fmt, 1)
    minimums = np.full(scales.shape, -7e4, np.float32)
    with pytest.raises(ValueError, match=r"expected minimums of at most 65504, .* found 70000"):
        pack(codes, scales, None, fmt, minimums=minimums)
