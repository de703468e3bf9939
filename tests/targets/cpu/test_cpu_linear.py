"""The native CPU linears against integer arithmetic, on every build of the kernels that this machine runs.

Activations quantise exactly (each activation group holds codes times a power of two and one code of ±127) and weight
scales are powers of two, so the float32 result must be the integer one bit for bit as long as no partial sum needs more
than 24 bits, which each case checks.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import pytest
from cpu_graphs import Floats, Native, Sketch, each_variant, identity, quantization_is_right, run
from numpy.typing import NDArray

from llmctl.engine.step import SequenceSlice
from llmctl.graph.code_books import CODE_BOOKS
from llmctl.targets.cpu.layout import (
    INTEGER,
    PackedLinear,
    ScaleRangeError,
    pack_book,
    pack_dense,
    pack_int,
    padded_columns,
)
from llmctl.targets.cpu.toolchain import Variant, find_compiler

pytestmark = [
    pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler on this machine"),
    pytest.mark.xdist_group("cpu_kernels"),
]
ROWS = (1, 2, 3, 7, 8, 9, 17, 33, 65)
EXACT = 2**24
BOOKS = {"e4m3": "fp8_e4m3", "book4": "fp4"}
DTYPES = (*INTEGER, "bf16", "f32", *BOOKS)

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Case:
    """A linear of N outputs and K inputs; ``top`` is the largest activation code but for the one of 127 a group."""

    bits: int
    group: int
    n: int
    k: int
    symmetric: bool = False
    top: int = 8
    act_order: bool = False
    gated: bool = False
    minimum: bool = False

    def __str__(self) -> str:
        marks = [f"w{self.bits}", f"g{self.group}", f"{self.n}x{self.k}"]
        marks += [name for name in ("symmetric", "act_order", "gated", "minimum") if getattr(self, name)]
        return "-".join(marks)


@dataclass(frozen=True)
class IntLinear:
    """A case's numbers: activations [65, K] f32, the packed weight, and what must come out [65, N], exactly.

    ``weight`` [N, K] is what is packed.
    """

    x: Floats
    packed: PackedLinear
    expected: Ints
    weight: Ints


def integer_linear(case: Case) -> IntLinear:
    rng = np.random.default_rng(zlib.crc32(str(case).encode()))
    n, k, levels = case.n, case.k, 2**case.bits
    size = padded_columns(k, case.group)[1]
    groups = -(-k // size)
    codes = rng.integers(0, levels, (n, k))
    zeros = np.full((n, groups), levels // 2) if case.symmetric else rng.integers(0, levels, (n, groups))
    most = 1 if case.top == 127 else 3  # full-range codes leave no room for scales
    shifts = rng.integers(0, most, (n, groups))
    group_of = np.arange(k) // size
    if case.act_order:
        group_of = rng.permutation(group_of)
    packed = pack_int(
        codes.astype(np.uint8), (2.0**shifts).astype(np.float16), None if case.symmetric else zeros.astype(np.uint8),
        bits=case.bits, group=case.group, gated=case.gated,
        g_idx=group_of.astype(np.int32) if case.act_order else None,
        minimums=-zeros * 2.0**shifts if case.minimum else None,
    )  # fmt: skip
    stored = packed.permutation if packed.permutation is not None else np.arange(k)
    act_codes = rng.integers(-case.top, case.top + 1, (max(ROWS), k))
    act_shifts = np.zeros_like(act_codes)
    for begin in range(0, k, packed.act_group):
        columns = stored[begin : begin + packed.act_group]
        act_codes[:, columns[0]] = rng.choice([-127, 127], max(ROWS))
        act_shifts[:, columns] = rng.integers(0, most, (max(ROWS), 1))
    x = act_codes << act_shifts
    weight = (codes - zeros[:, group_of]) << shifts[:, group_of]
    # What any order of the sums may hold on the way: products of codes and of zeros apart.
    parts = np.abs(x) @ (codes << shifts[:, group_of]).T + np.abs(x) @ (zeros << shifts)[:, group_of].T
    assert parts.max() < EXACT
    return IntLinear(x.astype(np.float32), packed, x @ weight.T, weight)


CASES = [
    *(Case(4, g, n, k, s) for g, n, k in [(32, 33, 96), (64, 100, 192), (128, 31, 256)] for s in (False, True)),
    *(Case(8, g, n, k, s) for g, n, k in [(32, 31, 96), (64, 47, 128), (128, 65, 256)] for s in (False, True)),
    Case(4, -1, 70, 100),  # a K tail: padded to 128
    Case(4, -1, 5, 544, True),  # activation groups of 68
    Case(8, -1, 37, 68),
    Case(8, -1, 1, 33, True),
    Case(3, 32, 48, 64),
    Case(4, 36, 40, 108),
    Case(8, 20, 40, 60),
    Case(4, 32, 64, 64, top=127),  # full-range codes
    Case(8, 64, 33, 64, top=127),
    Case(4, 32, 50, 128, act_order=True),
    Case(8, 64, 20, 192, True, act_order=True),
    *(Case(bits, group, 45, 192, minimum=True) for bits in (4, 8) for group in (16, 64)),
    Case(2, 16, 33, 64, minimum=True),
]


@each_variant
@pytest.mark.parametrize("case", CASES, ids=str)
def test_integer_linear_is_exact(variant: Variant, case: Case) -> None:
    made = integer_linear(case)
    sketch = Sketch()
    out = sketch.linear(sketch.rows(made.x), made.packed, case.n)[0]
    for count, found in zip(ROWS, run(sketch, out, variant, ROWS), strict=True):
        assert np.array_equal(found, made.expected[:count])


@each_variant
@pytest.mark.parametrize("case", [CASES[0], CASES[6], CASES[-2]], ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_output_head_is_exact(variant: Variant, case: Case, threads: int) -> None:
    """The same on gathered rows, where the head works."""
    made = integer_linear(case)
    sketch = Sketch()
    out = sketch.linear(sketch.gather(sketch.rows(made.x)), made.packed, case.n)[0]
    for count, found in zip((1, 9, 65), run(sketch, out, variant, (1, 9, 65), threads=threads), strict=True):
        assert np.array_equal(found, made.expected[:count])


@each_variant
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [64, -1])
def test_extreme_codes_do_not_saturate(variant: Variant, bits: int, group: int) -> None:
    """All activations at ±127 against the largest codes, alternating signs and not: 16-bit sums would overflow."""
    n, k, top = 34, 64, 2**bits - 1
    x = np.full((56, k), 127)
    x[1] = -127
    x[2, ::2] = -127
    x[3, : k // 2] = -127
    x[4:] = np.random.default_rng(0).choice([-127, 127], (52, k))
    x[16:20] = x[48:52] = x[:4]
    codes = np.full((n, k), top)
    codes[1::3] = 0
    codes[2::3, ::2] = 0
    groups = 1 if group == -1 else k // group
    for zero in (0, top):
        packed = pack_int(
            codes.astype(np.uint8), np.ones((n, groups)), np.full((n, groups), zero, np.uint8),
            bits=bits, group=group, gated=False,
        )  # fmt: skip
        sketch = Sketch()
        out = sketch.linear(sketch.rows(x.astype(np.float32)), packed, n)[0]
        counts = (1, 8, 24, 56)  # the last two (of 8-bit weights the last) with their zero points taken off
        for count, found in zip(counts, run(sketch, out, variant, counts), strict=True):
            assert np.array_equal(found, (x @ (codes - zero).T)[:count])


@each_variant
@pytest.mark.parametrize("bits", [4, 8])
def test_zero_rows_and_zero_scales(variant: Variant, bits: int) -> None:
    """A row of zeros (scale 0) gives exactly zero, and so does a group whose scale is 0."""
    made = integer_linear(Case(bits, 32, 40, 96))
    x = made.x[:9].copy()
    x[[0, 5, 8]] = 0
    x[1, 32:64] = 0
    sketch = Sketch()
    out = sketch.linear(sketch.rows(x), made.packed, 40)[0]
    found = run(sketch, out, variant, (9,))[0]
    assert not found[[0, 5, 8]].any()
    assert np.array_equal(found[[2, 3, 4, 6, 7]], made.expected[[2, 3, 4, 6, 7]])
    assert np.isfinite(found).all()


@each_variant
@pytest.mark.parametrize(("bits", "group", "k"), [(4, 64, 256), (8, 32, 256), (8, -1, 300)])
def test_real_activations_lose_only_their_rounding(variant: Variant, bits: int, group: int, k: int) -> None:
    """Error against float64 within half a quantisation step a column, and its size that of unbiased rounding."""
    rng = np.random.default_rng(1)
    n, rows, levels = 96, 33, 2**bits
    size = padded_columns(k, group)[1]
    codes = rng.integers(0, levels, (n, k))
    scales = rng.uniform(0.001, 0.01, (n, -(-k // size))).astype(np.float16)
    zeros = rng.integers(0, levels, scales.shape)
    packed = pack_int(codes.astype(np.uint8), scales, zeros.astype(np.uint8), bits=bits, group=group, gated=False)
    x = (rng.normal(size=(rows, k)) * np.exp(rng.normal(size=(1, k)))).astype(np.float32)
    weight = (codes - np.repeat(zeros, size, 1)[:, :k]) * np.repeat(scales.astype(np.float64), size, 1)[:, :k]
    sketch = Sketch()
    found = run(sketch, sketch.linear(sketch.rows(x), packed, n)[0], variant, (rows,))[0]
    wide = np.zeros((rows, padded_columns(k, group)[0]))
    wide[:, :k] = np.abs(x)
    steps = np.repeat(wide.reshape(rows, -1, packed.act_group).max(2) / 127, packed.act_group, 1)[:, :k]
    error = np.abs(found - x.astype(np.float64) @ weight.T)
    assert (error <= 0.5001 * steps @ np.abs(weight).T).all()
    predicted = np.sqrt((steps**2 / 12) @ (weight**2).T)
    assert 0.8 < np.sqrt((error**2).mean() / (predicted**2).mean()) < 1.1


def dense_linear(dtype: str, n: int, k: int, gated: bool = False) -> tuple[Floats, PackedLinear, Ints]:
    """Integers of up to 8 bits, exact in bf16, or codes that stand for some, with scales; and their sums in float32."""
    rng = np.random.default_rng(n * k)
    if dtype in BOOKS:
        return book_linear(dtype, rng, n, k, gated)
    x, weight = rng.integers(-255, 256, (max(ROWS), k)), rng.integers(-127, 128, (n, k))
    assert (np.abs(x) @ np.abs(weight).T).max() < EXACT
    values = weight.astype(np.float32)
    if dtype == "bf16":
        return x.astype(np.float32), pack_dense((values.view(np.uint32) >> 16).astype(np.uint16), dtype, gated=gated), (
            x @ weight.T
        )  # fmt: skip
    return x.astype(np.float32), pack_dense(values, dtype, gated=gated), x @ weight.T


def book_linear(dtype: str, rng: np.random.Generator, n: int, k: int, gated: bool) -> tuple[Floats, PackedLinear, Ints]:
    """Groups of 48 columns, so that the last may be shorter; every code of a whole number occurs."""
    values = np.array(CODE_BOOKS[BOOKS[dtype]].values)
    whole = np.flatnonzero((values == np.rint(values)) & (np.abs(values) < 16))
    x, codes = rng.integers(-255, 256, (max(ROWS), k)), rng.choice(whole, (n, k)).astype(np.uint8)
    shifts = rng.integers(0, 3, (n, -(-k // 48)))
    weight = values[codes].astype(np.int64) << np.repeat(shifts, 48, 1)[:, :k]
    assert (np.abs(x) @ np.abs(weight).T).max() < EXACT
    packed = pack_book(codes, (2.0**shifts).astype(np.float32), book=BOOKS[dtype], group=48, gated=gated)
    return x.astype(np.float32), packed, x @ weight.T


@each_variant
@pytest.mark.parametrize("book", CODE_BOOKS)
def test_every_code_of_a_book_is_decoded(variant: Variant, book: str) -> None:
    """One column: each output is a code's value, denormals included, times a scale that is no power of two."""
    values = np.array(CODE_BOOKS[book].values, np.float32)
    codes = np.tile(np.flatnonzero(~np.isnan(values)).astype(np.uint8), 2)  # each of 4 bits in either half of a tile
    packed = pack_book(codes[:, None], np.full((len(codes), 1), 0.7, np.float32), book=book, group=-1, gated=False)
    sketch = Sketch()
    out = sketch.linear(sketch.rows(np.ones((1, 1), np.float32)), packed, len(codes))[0]
    assert np.array_equal(run(sketch, out, variant, (1,))[0][0], values[codes] * np.float32(0.7))


@each_variant
@pytest.mark.parametrize("offsets", ["zeros", "one_zero", "minimums"])
@pytest.mark.parametrize(("bits", "group", "width"), [(4, 32, 96), (8, 16, 80), (4, -1, 60)])
def test_embeddings_are_looked_up_in_tiles(variant: Variant, bits: int, group: int, width: int, offsets: str) -> None:
    """Of a table that is packed as an output head is; columns of padding are not written."""
    made = integer_linear(
        Case(bits, group, width, width, symmetric=offsets == "one_zero", minimum=offsets == "minimums")
    )
    assert made.packed.one_zero == (offsets == "one_zero")
    sketch = Sketch()
    sketch.max_position = width
    native = Native(sketch, sketch.packed_embed(made.packed, width, scale=0.5), variant)
    found = native.step(SequenceSlice("a", list(range(width)), 0, list(range(8)), False))
    native.runtime.close()
    assert np.array_equal(found, made.weight / 2)


@each_variant
@pytest.mark.parametrize("dtype", ["bf16", "f32", *BOOKS])
@pytest.mark.parametrize(("n", "k"), [(32, 64), (33, 60), (1, 1), (100, 129), (47, 300), (256, 17)])
def test_dense_linear_is_exact(variant: Variant, dtype: str, n: int, k: int) -> None:
    x, packed, expected = dense_linear(dtype, n, k)
    sketch = Sketch()
    out = sketch.linear(sketch.rows(x), packed, n)[0]
    for count, found in zip(ROWS, run(sketch, out, variant, ROWS), strict=True):
        assert np.array_equal(found, expected[:count])


@each_variant
@pytest.mark.parametrize(("dtype", "bound"), [("bf16", 2.0**-8), ("f32", 2.0**-21)])
def test_dense_linear_on_real_numbers(variant: Variant, dtype: str, bound: float) -> None:
    """Relative to the sum of magnitudes: half an ulp of bf16 for each factor, or of float32 for each partial sum."""
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(9, 256)).astype(np.float32), rng.normal(size=(70, 256)).astype(np.float32)
    stored = (weight.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bf16" else weight
    meant = (stored.astype(np.uint32) << 16).view(np.float32) if dtype == "bf16" else weight
    sketch = Sketch()
    found = run(sketch, sketch.linear(sketch.rows(x), pack_dense(stored, dtype, gated=False), 70)[0], variant, (9,))[0]
    exact = x.astype(np.float64) @ meant.astype(np.float64).T
    assert (np.abs(found - exact) <= bound * (np.abs(x) @ np.abs(meant).T)).all()


@each_variant
@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_and_splits_are_exact(variant: Variant, dtype: str) -> None:
    """A merged linear: outputs that begin off the tile, each with its part of the bias."""
    splits, k = (40, 17, 23), 64
    if dtype in INTEGER:
        made = integer_linear(Case(int(dtype[1]), 32, sum(splits), k, minimum=dtype.endswith("_min")))
        x, packed, expected = made.x, made.packed, made.expected
    else:
        x, packed, expected = dense_linear(dtype, sum(splits), k)
    bias = np.random.default_rng(2).integers(-1000, 1000, sum(splits))
    begin = 0
    for i, width in enumerate(splits):
        sketch = Sketch()
        parts = sketch.linear(sketch.rows(x), packed, sum(splits), bias=bias, splits=splits)
        found = run(sketch, parts[i], variant, (17,))[0]
        assert np.array_equal(found, (expected + bias)[:17, begin : begin + width])
        begin += width


@each_variant
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 33, 84])
def test_gated_relu_is_exact(variant: Variant, dtype: str, width: int) -> None:
    """relu(gate) * up: a product of exact integers, rounded once."""
    k, rows = 64, (1, 3, 8, 17)
    if dtype in INTEGER:
        made = integer_linear(Case(int(dtype[1]), 32, 2 * width, k, top=3, gated=True, minimum=dtype.endswith("_min")))
        x, packed, expected = made.x, made.packed, made.expected
    else:
        x, packed, expected = dense_linear(dtype, 2 * width, k, gated=True)
    bias = np.random.default_rng(3).integers(-1000, 1000, 2 * width)
    sketch = Sketch()
    out = sketch.linear(sketch.rows(x), packed, 2 * width, bias=bias, epilogue="relu_mul")[0]
    gate, up = np.split(expected + bias, 2, axis=1)
    product = np.maximum(gate, 0).astype(np.float32) * up.astype(np.float32)
    for count, found in zip(rows, run(sketch, out, variant, rows), strict=True):
        assert np.array_equal(found, product[:count])


@each_variant
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("group", [32, 128])
def test_linear_that_quantizes(variant: Variant, dtype: str, gated: bool, group: int) -> None:
    """A linear may write the next one's int8 operand itself: the codes of its float output, at any number of rows."""
    width, k = 256, 64
    n = width * (1 + gated)
    if dtype in INTEGER:
        made = integer_linear(Case(int(dtype[1]), 32, n, k, top=3, gated=gated, minimum=dtype.endswith("_min")))
        x, packed = made.x, made.packed
    else:
        x, packed, _ = dense_linear(dtype, n, k, gated)
    outputs = []
    for chained in (False, True):
        sketch = Sketch()
        out = sketch.linear(sketch.rows(x / 64), packed, n, epilogue="silu_mul" if gated else "")[0]
        out = sketch.linear(out, identity(width, 8, group), width)[0] if chained else out
        outputs.append(run(sketch, out, variant, ROWS))
    for exact, found in zip(*outputs, strict=True):
        assert quantization_is_right(found, exact, group)


@each_variant
@pytest.mark.parametrize(("threads", "rows"), [(1, 600), (9, 9 * 256 + 8)])  # nine shares: one patch each would not do
def test_rows_of_long_steps_are_those_of_short_ones(variant: Variant, threads: int, rows: int) -> None:
    """However a long step is cut into patches; through int8 outputs, whose scratch holds one patch."""
    rng = np.random.default_rng(7)
    x = rng.standard_normal((rows, 32)).astype(np.float32)
    packed = integer_linear(Case(4, 32, 128, 32, top=3)).packed

    def outputs(counts: tuple[int, ...], threads: int) -> list[Floats]:
        sketch = Sketch()
        out = sketch.linear(sketch.rows(x), packed, 128)[0]
        out = sketch.linear(out, identity(128, 8, 128), 128)[0]
        return run(sketch, out, variant, counts, threads=threads, num_blocks=-(-rows // 16))

    whole, start = outputs((rows, 24), threads)
    assert np.array_equal(whole[:24], start)
    assert np.array_equal(whole, outputs((rows,), 2)[0])


@pytest.mark.parametrize("what", ["scales", "minimums"])
def test_what_float16_cannot_hold_is_named(what: str) -> None:
    planes = {"scales": np.ones((32, 1), np.float32), "minimums": np.ones((32, 1), np.float32)}
    planes[what][0] = 1e6
    codes, zeros = np.zeros((32, 32), np.uint8), np.zeros((32, 1), np.uint8)
    with pytest.raises(ScaleRangeError, match=f"expected {what} of at most 65504, .* found 1e\\+06"):
        pack_int(codes, planes["scales"], zeros, bits=4, group=-1, gated=False, minimums=planes["minimums"])
