"""The GEMM kernels on tensor cores under emulation, against the dequantised product."""

from __future__ import annotations

import pytest
import torch
from emulator import missing
from gemm_cases import any_format, expected, make_case, multiply
from tolerance import DTYPES, assert_as_good_as_torch

from llmctl.targets.cuda.gemm import plan_tile
from llmctl.targets.cuda.layout import CudaFormat

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
NAMES = {"f16": "float16", "bf16": "bfloat16"}


def _check(tag: str, m: int, fmt: CudaFormat, sms: int, bias: bool = False, residual: bool = False, epilogue: str = ""):
    case = make_case(fmt, seed=m)
    generator = torch.Generator().manual_seed(m)
    n, k = fmt.shape
    x = torch.randn(m, k, generator=generator).to(DTYPES[tag])
    b = torch.randn(n, generator=generator).to(x.dtype) if bias else None
    r = torch.randn(m, n // 2 if epilogue else n, generator=generator).to(x.dtype) if residual else None
    plan = plan_tile(fmt, NAMES[tag], m, sms=sms)
    y = multiply(plan, x, case.linear, b, r, epilogue)
    exact = expected(x, case.dense, b, r, epilogue, torch.float64)
    assert_as_good_as_torch(y, exact, expected(x, case.dense, b, r, epilogue, x.dtype))


@pytest.mark.parametrize("tag", ["f16", "bf16"])
@pytest.mark.parametrize(
    ("m", "bits", "shape", "group", "symmetric", "sms"),
    [
        (1, 4, (1, 136), 32, False, 1),
        (17, 4, (133, 1032), 64, False, 3),  # halves, split K over blocks, K and N off the tile
        (9, 4, (160, 384), 128, True, 1),
        (65, 4, (40, 200), -1, False, 1),
        (33, 4, (32, 512), 256, False, 4),
        (17, 8, (133, 1032), 32, False, 3),
        (40, 8, (33, 136), 64, True, 1),
        (9, 8, (64, 384), 128, False, 4),
        (70, 8, (31, 72), -1, False, 1),
    ],
)
def test_gemm_equals_the_dequantised_product(tag, m, bits, shape, group, symmetric, sms):
    _check(tag, m, CudaFormat(bits, shape, group=group, symmetric=symmetric), sms, bias=m % 2 == 1)


@pytest.mark.parametrize("tag", ["f16", "bf16"])
@pytest.mark.parametrize(
    ("m", "book", "shape", "group", "sms"),
    [
        (17, "nf4", (133, 1032), 64, 3),
        (33, "fp4", (32, 512), 256, 4),
        (65, "nf4", (40, 200), 32, 1),
        (17, "fp8_e4m3", (133, 1032), 128, 3),
        (40, "fp8_e4m3", (40, 200), -1, 1),
    ],
)
def test_codes_of_a_book(tag, m, book, shape, group, sms):
    _check(tag, m, any_format(book, shape, group, symmetric=True), sms, bias=m == 17)


@pytest.mark.parametrize("tag", ["f16", "bf16"])
@pytest.mark.parametrize(
    ("m", "codes", "shape", "group", "symmetric", "sms"),
    [
        (17, "k4", (133, 1032), 32, False, 3),
        (33, "k4", (32, 520), 16, False, 4),
        (65, "k4", (40, 200), 16, True, 1),
        (17, "k8", (133, 1032), 16, True, 3),
        (40, "k8", (40, 200), 32, False, 1),
    ],
)
def test_groups_of_16_and_minimums(tag, m, codes, shape, group, symmetric, sms):
    _check(tag, m, any_format(codes, shape, group, symmetric=symmetric), sms, bias=m == 17)


def test_minimums_with_gated_epilogue_and_split_k():
    fmt = any_format("k4", (96, 1024), 32, symmetric=False, gated=True)
    _check("bf16", 20, fmt, 8, residual=True, epilogue="silu_mul")


@pytest.mark.parametrize("epilogue", ["silu_mul", "gelu_mul", "gelu_tanh_mul", "relu_mul"])
def test_gated_epilogues(epilogue):
    _check("f16", 18, CudaFormat(4, (300, 256), True, 128), 1, bias=True, epilogue=epilogue)


@pytest.mark.parametrize("sms", [1, 8])
def test_gated_with_residual_and_split_k(sms):
    _check("bf16", 20, CudaFormat(4, (96, 1024), True, 128), sms, residual=True, epilogue="silu_mul")


def _check_int8(tag: str, m: int, fmt: CudaFormat, sms: int, bias: bool = False, epilogue: str = "") -> None:
    case = make_case(fmt, seed=m)
    generator = torch.Generator().manual_seed(m)
    n, k = fmt.shape
    x = torch.randint(-128, 128, (m, k), dtype=torch.int8, generator=generator)
    scales = torch.rand(m, generator=generator) * 0.02
    b = torch.randn(n, generator=generator).to(DTYPES[tag]) if bias else None
    plan = plan_tile(fmt, NAMES[tag], m, int8=True, sms=sms)
    y = multiply(plan, x, case.linear, b, None, epilogue, DTYPES[tag], scales)
    real = x.double() * scales.double()[:, None]
    exact = expected(real, case.dense, b, None, epilogue, torch.float64)
    assert_as_good_as_torch(y, exact, expected(real, case.dense, b, None, epilogue, DTYPES[tag]))


@pytest.mark.parametrize("tag", ["f16", "bf16"])
@pytest.mark.parametrize(
    ("m", "shape", "group", "sms"),
    [
        (1, (1, 144), 32, 1),
        (3, (40, 1040), 64, 3),
        (9, (133, 384), 128, 1),
        (17, (33, 208), -1, 1),
        (65, (64, 528), 256, 2),
    ],
)
def test_int8_gemm(tag, m, shape, group, sms):
    _check_int8(tag, m, CudaFormat(8, shape, group=group, symmetric=True), sms, bias=m % 2 == 1)


def test_int8_gated():
    _check_int8("bf16", 7, CudaFormat(8, (72, 256), True, symmetric=True), 2, epilogue="silu_mul")


@pytest.mark.slow
@pytest.mark.parametrize("tag", ["f16", "bf16"])
@pytest.mark.parametrize("bits", [4, 8, "nf4"])
@pytest.mark.parametrize("group", [32, 64, 128, 256, -1])
@pytest.mark.parametrize("shape", [(1, 8), (130, 576), (264, 1032)])
@pytest.mark.parametrize("m", [1, 3, 7, 8, 9, 17, 65])
def test_gemm_sweep(tag, bits, group, shape, m):
    _check(tag, m, any_format(bits, shape, group, symmetric=m == 3), sms=4, bias=m == 7, residual=m == 8)


@pytest.mark.slow
@pytest.mark.parametrize("tag", ["f16", "bf16"])
@pytest.mark.parametrize("group", [32, 64, 128, 256, -1])
@pytest.mark.parametrize("shape", [(1, 16), (130, 576), (264, 1040)])
@pytest.mark.parametrize("m", [1, 3, 7, 8, 9, 17, 65])
def test_int8_sweep(tag, group, shape, m):
    _check_int8(tag, m, CudaFormat(8, shape, group=group, symmetric=True), sms=4, bias=m == 7)
