"""Codes stored by their bits in the native kernels: what the same codes in lines give, to the bit, on every build."""

from __future__ import annotations

import numpy as np
import pytest
from cpu_graphs import Floats, Sketch, each_variant, looked_up_rows, run
from tiny_models import LLAMA, tiny_graph

from llmctl.graph.graph import QuantScheme
from llmctl.targets.base import BuildOptions
from llmctl.targets.cpu.layout import FIELD_BITS, NestedPlane, PackedLinear, pack_int, scale_rows
from llmctl.targets.cpu.linear_format import LinearFormat
from llmctl.targets.cpu.toolchain import Variant, find_compiler
from llmctl.targets.table import parse_target

pytestmark = [
    pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler on this machine"),
    pytest.mark.xdist_group("cpu_kernels"),
]
ROWS = (1, 2, 7, 8, 16, 33, 120)
ZEROS = ("symmetric", "zeros", "minimums", "nested")


def both(bits: int, group: int, n: int, k: int, zeros: str, gated: bool = False) -> tuple[PackedLinear, PackedLinear]:
    """The same weight in lines of 4 or 8 bits and in fields; every code occurs."""
    rng = np.random.default_rng(bits * n + k)
    codes = rng.permutation(np.resize(np.arange(2**bits, dtype=np.uint8), n * k)).reshape(n, k)
    groups = k // group
    scales = rng.uniform(1e-3, 1e-1, (n, groups)).astype(np.float16)
    minimums = rng.normal(0, 0.1, (n, groups)).astype(np.float16) if zeros == "minimums" else None
    own = rng.integers(0, 2**bits, (n, groups), dtype=np.uint8) if zeros == "zeros" else None
    nested = NestedPlane(rng.integers(0, 256, (n, groups), dtype=np.uint8), scales[:, ::2].copy(), 128)
    of_scales = nested if zeros == "nested" else scales
    fields = pack_int(codes, of_scales, own, bits=bits, group=group, gated=gated, minimums=minimums)
    wide = 8 if bits > 4 else 4
    middle = own if own is not None else np.full((n, groups), 1 << (bits - 1), np.uint8)
    # Zeros of their own, so that the lines do not rely on what fields add to their codes.
    lines = pack_int(
        codes, of_scales, None if minimums is not None else middle, bits=wide, group=group, gated=gated,
        minimums=minimums,
    )  # fmt: skip
    assert (lines.code_bits, fields.code_bits, lines.dtype) == (0, bits, fields.dtype)
    assert fields.data.nbytes == lines.data.nbytes * bits // wide
    return lines, fields


def outputs(packed: PackedLinear, n: int, k: int, gated: bool, variant: Variant, threads: int) -> list[Floats]:
    x = np.random.default_rng(9).normal(size=(max(ROWS), k)).astype(np.float32)
    sketch = Sketch()
    out = sketch.linear(sketch.rows(x), packed, n, epilogue="silu_mul" if gated else "")[0]
    return run(sketch, out, variant, ROWS, threads=threads)


@each_variant
@pytest.mark.parametrize("bits", FIELD_BITS)
@pytest.mark.parametrize("zeros", ZEROS)
def test_linears_give_the_bits_of_codes_in_lines(variant: Variant, bits: int, zeros: str) -> None:
    # 83 rows: three tiles, one of them padded; gated: two of 40.
    for group, n, k, gated in ((16, 83, 160, False), (32, 80, 64, True)):
        lines, fields = both(bits, group, n, k, zeros, gated)
        for threads in (1, 2):
            expected, found = (outputs(packed, n, k, gated, variant, threads) for packed in (lines, fields))
            for rows, of_lines, of_fields in zip(ROWS, expected, found, strict=True):
                assert np.any(of_lines)
                assert of_fields.tobytes() == of_lines.tobytes(), rows


@each_variant
@pytest.mark.parametrize("bits", FIELD_BITS)
@pytest.mark.parametrize("zeros", ZEROS)
def test_rows_are_looked_up_with_the_bits_of_codes_in_lines(variant: Variant, bits: int, zeros: str) -> None:
    width = 64
    lines, fields = both(bits, 16, width, width, zeros)
    assert looked_up_rows(fields, width, variant).tobytes() == looked_up_rows(lines, width, variant).tobytes()


def test_fields_lie_as_the_kernels_header_says() -> None:
    rng = np.random.default_rng(3)
    n, k, bits = 64, 32, 6
    codes = rng.integers(0, 64, (n, k), dtype=np.uint8)
    packed = pack_int(codes, np.ones((n, 2), np.float16), None, bits=bits, group=16, gated=False)
    units = packed.data.reshape(n // 32, k // 16, bits, 64)
    for row in range(n):
        for column in range(k):
            unit, at = units[row // 32, column // 16], column % 16
            line, byte = at // 4 * 2 + row % 32 // 16, row % 16 * 4 + at % 4
            low = unit[line // 2, byte] >> (4 * (line % 2)) & 15
            high = unit[4 + line // 4, byte] >> (2 * (line % 4)) & 3
            assert low | high << 4 == codes[row, column]


@pytest.mark.parametrize(
    ("bits", "columns", "group", "stored"),
    [(6, 48, 16, 6), (6, 40, 8, 8), (6, 48, 8, 8), (6, 144, 144, 8), (3, 48, -1, 3), (3, 48, 8, 4), (4, 48, 16, 4)],
)
def test_groups_that_are_not_whole_units_take_4_or_8_bits(bits: int, columns: int, group: int, stored: int) -> None:
    """A group of 144 is met by activations in groups of 72."""
    rng = np.random.default_rng(bits)
    codes, groups = rng.integers(0, 2**bits, (32, columns), dtype=np.uint8), 1 if group == -1 else columns // group
    packed = pack_int(codes, np.ones((32, groups), np.float16), None, bits=bits, group=group, gated=False)
    assert packed.data.nbytes * 8 == 32 * packed.columns * stored
    fmt = LinearFormat(packed.dtype, (32, columns), False, group, one_zero=True, bits=bits)
    assert fmt.planes()["tiles"] == ("U8", (packed.data.nbytes,))
    assert fmt.code_bits == packed.code_bits == (stored if stored not in (4, 8) else 0)


@each_variant
def test_codes_of_6_bits_in_lines_have_their_zeros_at_128(variant: Variant) -> None:
    """Rows of 40 columns: what is stored dense in 8 bits is read with 128 as its zero, as all of 8 bits is."""
    rng = np.random.default_rng(1)
    codes, scales = rng.integers(0, 64, (32, 40), dtype=np.uint8), np.full((32, 5), 0.25, np.float16)
    made = [
        pack_int(codes, scales, None, bits=6, group=8, gated=False),
        pack_int(codes, scales, np.full((32, 5), 32, np.uint8), bits=8, group=8, gated=False),
    ]
    assert made[0].zeros is not None
    assert made[0].zeros.tolist() == [128] * 32
    found = [outputs(packed, 32, 40, False, variant, 1) for packed in made]
    assert [f.tobytes() for f in found[0]] == [f.tobytes() for f in found[1]]
    assert np.any(found[0][0])


@pytest.mark.parametrize(
    ("block_rows", "rows", "gated", "experts", "shared"),
    [(128, 576, False, 1, 16), (32, 40, False, 1, 16), (24, 48, False, 1, 1), (32, 64, True, 1, 16),
     (32, 48, True, 1, 1), (16, 96, False, 4, 1), (16, 128, True, 4, 16), (1, 64, False, 1, 1)],
)  # fmt: skip
def test_rows_of_half_a_tile_share_a_scale_where_no_block_ends_within(
    block_rows: int, rows: int, gated: bool, experts: int, shared: int
) -> None:
    assert scale_rows(block_rows, rows, gated, experts) == shared


@pytest.mark.parametrize(("dtype", "stored"), [("bfloat16", 3), ("float32", None)])
def test_what_codes_are_stored_as(dtype: str, stored: int | None) -> None:
    graph = tiny_graph(LLAMA, QuantScheme(3, 32, symmetric=True), ())
    options = BuildOptions(dtype, 64, 16, dtype, ())
    assert parse_target("cpu").code_bits("layers.0.q_proj.weight", graph, options) == stored
