"""Nested scales in the native kernels: the bits of the same scales multiplied out, on every build that runs here."""

from __future__ import annotations

import numpy as np
import pytest
from cpu_graphs import Floats, Native, Sketch, each_variant, run

from llmctl.engine.step import SequenceSlice
from llmctl.targets.cpu.layout import PackedLinear, ScaleRangeError, pack_int
from llmctl.targets.cpu.toolchain import Variant, find_compiler

pytestmark = [
    pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler on this machine"),
    pytest.mark.xdist_group("cpu_kernels"),
]
ROWS = (1, 2, 7, 8, 16, 33, 120)


def both(bits: int, group: int, shared: int, n: int, k: int, gated: bool = False) -> tuple[PackedLinear, PackedLinear]:
    """A weight whose scales and minimums are float16, and the same nested: every code, float16's denormals too."""
    rng = np.random.default_rng(bits * n + k)
    codes, groups = rng.integers(0, 2**bits, (n, k), dtype=np.uint8), k // group
    stored, floats = [], []
    for sign in (1, -1):
        scales = rng.permutation(np.resize(np.arange(256, dtype=np.uint8), n * groups)).reshape(n, groups)
        size = 10.0 ** rng.uniform(-7, -3, (n, groups // shared))
        supers = (sign * size * 1.37).astype(np.float16)
        stored.append((scales, supers))
        floats.append(np.repeat(supers.astype(np.float32), shared, 1) * scales.astype(np.float32))
    assert ((floats[0] > 0) & (floats[0] < 2.0**-14)).any()
    made = [
        pack_int(codes, floats[0], None, bits=bits, group=group, gated=gated, minimums=floats[1], nested=nested)
        for nested in (None, (stored[0], stored[1]))
    ]
    assert (made[0].nested, made[1].nested) == (0, shared)
    return made[0], made[1]


@each_variant
@pytest.mark.parametrize(
    ("bits", "group", "shared", "n", "k"),
    [(4, 32, 8, 83, 512), (8, 32, 8, 33, 256), (4, 16, 3, 70, 144), (8, 128, 1, 32, 256), (4, 256, 2, 40, 512)],
)
@pytest.mark.parametrize("output", ["plain", "gated"])
def test_linears_give_the_bits_of_scales_multiplied_out(
    variant: Variant, bits: int, group: int, shared: int, n: int, k: int, output: str
) -> None:
    gated = output == "gated"
    x = np.random.default_rng(9).normal(size=(max(ROWS), k)).astype(np.float32)

    def outputs(packed: PackedLinear, threads: int) -> list[Floats]:
        sketch = Sketch()
        out = sketch.linear(sketch.rows(x), packed, n * (1 + gated), epilogue="silu_mul" if gated else "")[0]
        return run(sketch, out, variant, ROWS, threads=threads)

    plain, nested = both(bits, group, shared, n * (1 + gated), k, gated)
    for threads in (1, 2):
        for expected, found in zip(outputs(plain, threads), outputs(nested, threads), strict=True):
            assert np.any(expected)
            assert found.tobytes() == expected.tobytes()


@each_variant
def test_rows_are_looked_up_with_the_bits_of_scales_multiplied_out(variant: Variant) -> None:
    width = 256

    def rows(packed: PackedLinear) -> Floats:
        sketch = Sketch()
        sketch.max_position = width
        native = Native(sketch, sketch.packed_embed(packed, width), variant, max_tokens=width)
        found = native.step(SequenceSlice("a", list(range(width)), 0, list(range(width // 16)), False))
        native.runtime.close()
        return found

    plain, nested = both(4, 32, 8, width, width)
    assert rows(nested).tobytes() == rows(plain).tobytes()


def test_nested_scales_beyond_float16_are_refused() -> None:
    codes, one = np.zeros((32, 64), np.uint8), np.ones((32, 2), np.uint8)
    supers = np.full((32, 1), 60000, np.float16)
    floats = supers.astype(np.float32) * 2 * one
    with pytest.raises(ScaleRangeError, match=r"expected scales of at most 65504, .* found 120000"):
        pack_int(
            codes, floats, None, bits=4, group=32, gated=False, minimums=floats,
            nested=((2 * one, supers), (2 * one, supers)),
        )  # fmt: skip
