"""vdpbf16ps, or the software in its place on a CPU without it, against its description in exact arithmetic."""

from __future__ import annotations

import ctypes
import math
import subprocess
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from cpu_graphs import VARIANTS

from llmctl.targets.cpu.toolchain import FLAGS, SOURCE_DIR, Variant, find_compiler

HARNESS = """
#include "simd.h"
extern "C" void dot(float* acc, const uint16_t* w, const uint16_t* x) {
  static_assert(LLMCTL_AVX512_BF16);
  llmctl::store(acc, llmctl::dot2_bf16(llmctl::load<llmctl::f32x16>(acc), w, x));
}
extern "C" float product(const float* x) { return x[0] * x[1]; }
"""
TINIEST = Fraction(2) ** -126
bf16_variant = pytest.mark.parametrize("variant", [v for v in VARIANTS if "avx512bf16" in v.name], ids=lambda v: v.name)


def open_harness(variant: Variant, folder: Path) -> ctypes.CDLL:
    compiler = find_compiler()
    assert compiler
    source, library = folder / "harness.cpp", folder / "harness.so"
    source.write_text(HARNESS)
    flags = (*FLAGS, *variant.flags, f"-I{SOURCE_DIR}")
    subprocess.run([*compiler, *flags, str(source), "-o", str(library)], check=True)
    opened = ctypes.CDLL(str(library))
    opened.product.restype = ctypes.c_float
    return opened


def flushed(x: float) -> Fraction:
    """A float32 with denormals taken as zero."""
    return Fraction(x) if abs(x) >= TINIEST else Fraction(0)


def fused(acc: float, a: float, b: float) -> float:
    """acc + a * b for finite a and b, rounded once to the nearest even float32, denormals as zero on both sides."""
    if math.isinf(acc):
        return acc
    exact = flushed(acc) + flushed(a) * flushed(b)
    if not exact:
        return 0.0
    scale = Fraction(2) ** (math.frexp(float(exact))[1] - 24)
    rounded = round(exact / scale) * scale
    if abs(rounded) < TINIEST:
        return 0.0
    return float(rounded) if abs(rounded) < 2**128 else math.copysign(math.inf, rounded)


def bf16_bits(rng: np.random.Generator, count: int, exponents: tuple[int, int]) -> np.ndarray:
    """Random signs and mantissas; biased exponents from a range, 0 for denormals."""
    sign, mantissa = rng.integers(0, 2, count) << 15, rng.integers(0, 128, count)
    return (sign | rng.integers(*exponents, count) << 7 | mantissa).astype(np.uint16)


def as_floats(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


@bf16_variant
def test_pairs_are_multiplied_as_the_manual_says(variant: Variant, tmp_path: Path) -> None:
    harness = open_harness(variant, tmp_path)
    rng = np.random.default_rng(0)
    harness.dot.argtypes = [ctypes.c_void_p] * 3
    orders = rounding = flushes = 0
    # Ordinary numbers, those whose products are denormal, denormal inputs, overflow.
    for weights, others, sums in [
        ((120, 134), (120, 134), (110, 145)),
        ((60, 70), (58, 66), (0, 6)),
        ((0, 3), (100, 254), (0, 140)),
        ((180, 254), (180, 254), (200, 254)),
    ]:
        for _ in range(50):
            w, x = bf16_bits(rng, 32, weights), bf16_bits(rng, 2, others)
            acc = (bf16_bits(rng, 16, sums).astype(np.uint32) << 16 | rng.integers(0, 2**16, 16)).astype(np.uint32)
            acc = acc.view(np.float32)
            found = acc.copy()
            harness.dot(found.ctypes.data, w.ctypes.data, x.ctypes.data)
            pairs, (even, odd) = as_floats(w).reshape(16, 2).tolist(), as_floats(x).tolist()
            for lane, (begin, (low, high)) in enumerate(zip(acc.tolist(), pairs, strict=True)):
                expected = fused(fused(begin, high, odd), low, even)
                assert found[lane] == expected
                orders += expected != fused(fused(begin, low, even), high, odd)
                one = flushed(begin) + flushed(high) * flushed(odd) + flushed(low) * flushed(even)
                rounding += math.isfinite(expected) and one != Fraction(expected)
                flushes += one != 0 and expected == 0
    assert min(orders, rounding, flushes) > 50, "the numbers must tell the descriptions apart"


@bf16_variant
def test_the_caller_keeps_its_denormals(variant: Variant, tmp_path: Path) -> None:
    harness = open_harness(variant, tmp_path)
    acc, w, x = np.zeros(16, np.float32), np.zeros(32, np.uint16), np.zeros(2, np.uint16)
    harness.dot(*(ctypes.c_void_p(array.ctypes.data) for array in (acc, w, x)))
    factors = np.array([2.0**-100, 2.0**-40], np.float32)
    assert harness.product(ctypes.c_void_p(factors.ctypes.data)) == 2.0**-140
