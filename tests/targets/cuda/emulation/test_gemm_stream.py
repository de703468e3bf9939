"""The streaming kernels (*a16_stream.cu) under emulation, against the dequantised product."""

from __future__ import annotations

import pytest
import torch
from emulator import missing
from gemm_cases import Case, any_format, expected, make_case, multiply
from tolerance import DTYPES, assert_as_good_as_torch

from llmctl.targets.cuda.gemm import plan_stream
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
    y = multiply(plan_stream(fmt, NAMES[tag], m, sms), x, case.linear, b, r, epilogue)
    exact = expected(x, case.dense, b, r, epilogue, torch.float64)
    assert_as_good_as_torch(y, exact, expected(x, case.dense, b, r, epilogue, x.dtype))


@pytest.mark.parametrize("tag", ["f16", "bf16"])
@pytest.mark.parametrize(
    ("m", "bits", "shape", "group", "symmetric", "sms"),
    [
        (1, 4, (1, 136), 32, False, 1),
        (3, 4, (40, 1032), 64, False, 4),  # split K over blocks, K off the step
        (7, 4, (33, 384), 128, True, 1),
        (8, 4, (64, 200), -1, False, 1),
        (5, 4, (32, 512), 256, False, 1),
        (9, 4, (33, 264), 32, True, 1),
        (16, 4, (40, 1032), 64, False, 4),
        (13, 4, (64, 256), 128, False, 1),
        (1, 8, (40, 136), 32, False, 1),
        (3, 8, (33, 1032), 64, True, 4),
        (8, 8, (64, 384), 128, False, 1),
        (7, 8, (31, 72), -1, False, 1),
        (16, 8, (33, 1032), 32, False, 4),
        (11, 8, (33, 256), 128, True, 1),
    ],
)
def test_stream_equals_the_dequantised_product(tag, m, bits, shape, group, symmetric, sms):
    _check(tag, m, CudaFormat(bits, shape, group=group, symmetric=symmetric), sms, bias=m % 2 == 1)


@pytest.mark.parametrize("tag", ["f16", "bf16"])
@pytest.mark.parametrize(
    ("m", "book", "shape", "group", "sms"),
    [
        (1, "nf4", (40, 136), 64, 1),
        (3, "nf4", (33, 1032), 32, 4),
        (8, "fp4", (64, 384), 128, 1),
        (13, "nf4", (33, 264), -1, 1),
        (16, "fp4", (40, 1032), 64, 4),
        (1, "fp8_e4m3", (40, 136), 32, 1),
        (5, "fp8_e4m3", (33, 1032), 128, 4),
        (16, "fp8_e4m3", (31, 72), -1, 1),
    ],
)
def test_codes_of_a_book(tag, m, book, shape, group, sms):
    _check(tag, m, any_format(book, shape, group, symmetric=True), sms, bias=m % 2 == 1)


@pytest.mark.parametrize("tag", ["f16", "bf16"])
@pytest.mark.parametrize(
    ("m", "codes", "shape", "group", "symmetric", "sms"),
    [
        (1, "k4", (40, 136), 32, False, 1),
        (3, "k4", (33, 1032), 16, False, 4),
        (8, "k4", (64, 384), 16, True, 1),
        (13, "k4", (33, 264), 32, False, 1),
        (16, "k4", (40, 1032), 16, False, 4),
        (1, "k8", (40, 136), 16, True, 1),
        (5, "k8", (33, 1032), 32, False, 4),
        (7, "k8", (31, 72), 16, False, 1),
        (16, "k8", (33, 264), 16, True, 4),
    ],
)
def test_groups_of_16_and_minimums(tag, m, codes, shape, group, symmetric, sms):
    _check(tag, m, any_format(codes, shape, group, symmetric=symmetric), sms, bias=m % 2 == 1)


@pytest.mark.parametrize("epilogue", ["silu_mul", "gelu_mul", "gelu_tanh_mul", "relu_mul"])
def test_gated_epilogues(epilogue):
    _check("f16", 3, CudaFormat(4, (44, 256), True, 128), 1, bias=True, epilogue=epilogue)


@pytest.mark.parametrize("sms", [1, 8])
def test_gated_with_residual_and_split_k(sms):
    _check("bf16", 4, CudaFormat(4, (96, 1024), True, 128), sms, residual=True, epilogue="silu_mul")


@pytest.mark.parametrize("tag", ["f16", "bf16"])
def test_a_row_has_the_same_bits_in_any_batch(tag):
    fmt = CudaFormat(4, (40, 512), group=64)
    case, x = make_case(fmt), torch.randn(12, 512).to(DTYPES[tag])
    together = _run(case, x, tag)
    for i in (0, 3, 11):
        assert torch.equal(_run(case, x[i : i + 1].contiguous(), tag)[0], together[i])


def _run(case: Case, x: torch.Tensor, tag: str) -> torch.Tensor:
    return multiply(plan_stream(case.linear.format, NAMES[tag], len(x), 4), x, case.linear)


@pytest.mark.slow
@pytest.mark.parametrize("tag", ["f16", "bf16"])
@pytest.mark.parametrize("bits", [4, 8, "nf4"])
@pytest.mark.parametrize("group", [32, 64, 128, 256, -1])
@pytest.mark.parametrize("shape", [(1, 8), (17, 136), (130, 576), (64, 2056)])
@pytest.mark.parametrize("m", [1, 3, 7, 8, 9, 16])
def test_stream_sweep(tag, bits, group, shape, m):
    _check(tag, m, any_format(bits, shape, group, symmetric=m == 3), sms=8, bias=m == 7, residual=m == 8)
