"""Nested scales in the native kernels: the bits of the same scales multiplied out, on every build that runs here."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cpu_graphs import Floats, Sketch, each_variant, looked_up_rows, run

from llmctl.checkpoint.nested import of_tensor, usual_values
from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.graph.graph import QuantScheme
from llmctl.targets.cpu.layout import NestedPlane, PackedLinear, ScaleRangeError, pack_int
from llmctl.targets.cpu.linear_format import LinearFormat, to_planes
from llmctl.targets.cpu.packing import pack_linear
from llmctl.targets.cpu.toolchain import Variant, find_compiler

pytestmark = [
    pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler on this machine"),
    pytest.mark.xdist_group("cpu_kernels"),
]
ROWS = (1, 2, 7, 8, 16, 33, 120)


def both(
    bits: int, group: int, shared: int, n: int, k: int, *, minimum: bool, gated: bool = False, of: int = 8
) -> tuple[PackedLinear, PackedLinear]:
    """A weight whose scales (and minimums) are float16, and the same nested: every code, float16's denormals too.

    ``of``: bits of the scales' codes.
    """
    rng = np.random.default_rng(bits * n + k)
    codes, groups = rng.integers(0, 2**bits, (n, k), dtype=np.uint8), k // group
    zero = 0 if minimum else 1 << (of - 1)
    nested, floats = [], []
    for sign in (1, -1)[: 1 + minimum]:
        scales = np.resize(rng.permutation(1 << of).astype(np.uint8), (n, groups))
        size = 10.0 ** rng.uniform(-7, -3, (n, groups // shared))
        supers = (sign * size * 1.37).astype(np.float16)
        nested.append(NestedPlane(scales, supers, zero, of))
        floats.append(np.repeat(supers.astype(np.float32), shared, 1) * (scales.astype(np.float32) - zero))
    assert ((floats[0] != 0) & (np.abs(floats[0]) < 2.0**-14)).any()
    made = [
        pack_int(codes, planes[0], None, bits=bits, group=group, gated=gated, minimums=planes[1] if minimum else None)
        for planes in (floats, nested)
    ]
    assert (made[0].nested, made[1].nested) == (0, shared)
    by_bits = of if of < 8 and groups * (1 + minimum) % 16 == 0 else 0
    assert made[1].nested_bits == by_bits
    assert made[1].scale_codes is not None
    assert made[1].scale_codes.nbytes * 8 == made[1].rows * groups * (1 + minimum) * (by_bits or 8)
    return made[0], made[1]


def both_mapped(group: int, shared: int, n: int, k: int, gated: bool) -> tuple[PackedLinear, PackedLinear]:
    """The same of NF4, with supers of two files' tensors, read through an engine's planes."""
    generator = torch.Generator().manual_seed(n + k)
    groups, nf4 = k // group, QuantScheme(4, group, True, book="nf4", nested=shared)
    count = -(-n * groups // shared)
    codes = torch.randperm(n * groups, generator=generator).reshape(n, groups).to(torch.uint8)
    supers = torch.rand(count, generator=generator) * torch.logspace(-4, 0, count)
    mapped = of_tensor(codes, supers, torch.rand(count, generator=generator), shared, usual_values())
    values = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator)
    nested = QuantizedWeight(values, mapped.floats(), torch.zeros_like(codes), nf4, nested=(mapped,))
    nested = nested.take_rows(torch.randperm(n, generator=generator))
    plain = QuantizedWeight(nested.codes, nested.scales, nested.zeros, QuantScheme(4, group, True, book="nf4"))
    made = []
    for weight in (plain, nested):
        fmt = LinearFormat("book4", (n, k), gated, group, book="nf4", nested=weight.scheme.nested, parts=2)
        planes = to_planes(pack_linear(weight, fmt))
        assert {name: plane.shape for name, plane in planes.items()} == {n: s for n, (_, s) in fmt.planes().items()}
        made.append(fmt.from_planes(planes))
    assert made[1].nested == shared
    return made[0], made[1]


def outputs(packed: PackedLinear, n: int, k: int, gated: bool, variant: Variant, threads: int) -> list[Floats]:
    x = np.random.default_rng(9).normal(size=(max(ROWS), k)).astype(np.float32)
    sketch = Sketch()
    out = sketch.linear(sketch.rows(x), packed, n * (1 + gated), epilogue="silu_mul" if gated else "")[0]
    return run(sketch, out, variant, ROWS, threads=threads)


def assert_same(made: tuple[PackedLinear, PackedLinear], n: int, k: int, gated: bool, variant: Variant) -> None:
    for threads in (1, 2):
        plain, nested = (outputs(packed, n, k, gated, variant, threads) for packed in made)
        for expected, found in zip(plain, nested, strict=True):
            assert np.any(expected)
            assert found.tobytes() == expected.tobytes()


@each_variant
@pytest.mark.parametrize(
    ("bits", "group", "shared", "n", "k", "of"),
    [
        (4, 32, 8, 83, 512, 6), (8, 32, 8, 33, 256, 6), (4, 16, 3, 70, 144, 4), (2, 16, 16, 83, 256, 4),
        (3, 16, 16, 33, 512, 6), (8, 128, 1, 32, 256, 8), (4, 256, 2, 40, 512, 8), (6, 16, 16, 40, 256, 8),
    ],
)  # fmt: skip
@pytest.mark.parametrize("minimum", [True, False], ids=["minimums", "signed"])
@pytest.mark.parametrize("output", ["plain", "gated"])
def test_linears_give_the_bits_of_scales_multiplied_out(
    variant: Variant, bits: int, group: int, shared: int, n: int, k: int, of: int, minimum: bool, output: str
) -> None:
    gated = output == "gated"
    made = both(bits, group, shared, n * (1 + gated), k, minimum=minimum, gated=gated, of=of)
    assert_same(made, n, k, gated, variant)


@each_variant
@pytest.mark.parametrize(
    ("group", "shared", "n", "k"),
    [(64, 256, 83, 576), (64, 256, 40, 1024), (32, 16, 33, 672), (64, 7, 70, 832)],
)
@pytest.mark.parametrize("output", ["plain", "gated"])
def test_doubly_quantized_code_books_give_the_bits_of_scales_multiplied_out(
    variant: Variant, group: int, shared: int, n: int, k: int, output: str
) -> None:
    gated = output == "gated"
    assert_same(both_mapped(group, shared, n * (1 + gated), k, gated), n, k, gated, variant)


@each_variant
@pytest.mark.parametrize("minimum", [True, False], ids=["minimums", "signed"])
@pytest.mark.parametrize("of", [4, 6, 8])
def test_rows_are_looked_up_with_the_bits_of_scales_multiplied_out(variant: Variant, minimum: bool, of: int) -> None:
    width = 256
    plain, nested = both(4, 16, 8, width, width, minimum=minimum, of=of)
    assert looked_up_rows(nested, width, variant).tobytes() == looked_up_rows(plain, width, variant).tobytes()


@pytest.mark.parametrize("sign", [1, -1])
def test_nested_scales_beyond_float16_are_refused(sign: int) -> None:
    codes, two = np.zeros((32, 64), np.uint8), np.full((32, 2), 128 + 2 * sign, np.uint8)
    with pytest.raises(ScaleRangeError, match=r"expected scales of at most 65504, .* found 120000"):
        pack_int(codes, NestedPlane(two, np.full((32, 1), 60000, np.float16), 128), None, bits=4, group=32, gated=False)
