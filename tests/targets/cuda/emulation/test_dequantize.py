"""dequantize.cu under emulation: the dense weight that the reference gives, rounded; act-order by permuted columns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from emulator import missing
from gemm_cases import any_format, make_case, multiply, planes_of, run
from tolerance import DTYPES, assert_as_good_as_torch

from llmctl.graph.code_books import CODE_BOOKS
from llmctl.targets.cuda.gemm import plan_stream
from llmctl.targets.cuda.gemm_signatures import dequantize_call
from llmctl.targets.cuda.layout import CudaFormat, pack
from llmctl.targets.cuda.signatures import prepare
from llmctl.targets.reference import kernels as reference

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.mark.parametrize("tag", ["f16", "bf16"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("shape", "group", "symmetric", "gated"),
    [
        ((1, 8), -1, False, False),
        ((45, 136), 32, False, False),
        ((64, 320), 64, True, False),
        ((44, 264), 128, False, True),
    ],
)
def test_dequantised_weights_equal_the_reference(tag, bits, shape, group, symmetric, gated):
    fmt = CudaFormat(bits, shape, gated, group, symmetric)
    case = make_case(fmt, seed=bits)
    w = torch.empty(shape, dtype=DTYPES[tag])
    run(dequantize_call(fmt, tag, planes_of(case.linear), w))
    assert torch.equal(w, case.dense.to(w.dtype))


@pytest.mark.parametrize("tag", ["f16", "bf16"])
@pytest.mark.parametrize(
    ("book", "shape", "group", "gated"),
    [("nf4", (45, 136), 64, False), ("fp4", (44, 264), 32, True), ("fp8_e4m3", (44, 264), 128, True)],
)
def test_values_of_a_book_are_rounded_once(tag, book, shape, group, gated):
    fmt = CudaFormat(CODE_BOOKS[book].bits, shape, gated, group, symmetric=True, book=book)
    case = make_case(fmt)
    w = torch.empty(shape, dtype=DTYPES[tag])
    run(dequantize_call(fmt, tag, planes_of(case.linear), w))
    assert torch.equal(w, case.dense.to(w.dtype))


@pytest.mark.parametrize("tag", ["f16", "bf16"])
@pytest.mark.parametrize("codes", ["k4", "k8"])
@pytest.mark.parametrize(
    ("shape", "group", "symmetric", "gated"),
    [((45, 136), 32, False, False), ((44, 264), 16, True, True), ((33, 72), 16, False, False)],
)
def test_minimums_are_added_before_the_rounding(tag, codes, shape, group, symmetric, gated):
    case = make_case(any_format(codes, shape, group, symmetric=symmetric, gated=gated), seed=group)
    w = torch.empty(shape, dtype=DTYPES[tag])
    run(dequantize_call(case.linear.format, tag, planes_of(case.linear), w))
    assert torch.equal(w, case.dense.to(w.dtype))


@pytest.mark.parametrize("tag", ["f16", "bf16"])
def test_act_order_is_a_permutation_of_columns(tag):
    rows, columns, group = 40, 256, 64
    rng = np.random.default_rng(1)
    g_idx = rng.permutation(np.arange(columns) // group).astype(np.int32)
    codes = rng.integers(0, 16, (rows, columns), np.uint8)
    scales = (rng.random((rows, columns // group)) * 0.02 + 0.001).astype(np.float16)
    zeros = rng.integers(0, 16, (rows, columns // group), np.uint8)
    fmt = CudaFormat(4, (rows, columns), group=group, permuted=True)
    linear = pack(codes, scales, zeros, fmt, g_idx)
    dense = reference.dequantize(*map(torch.from_numpy, (codes, scales, zeros)), torch.from_numpy(g_idx).long())
    x = torch.randn(3, columns).to(DTYPES[tag])
    sorted_x = torch.empty_like(x)
    permutation = torch.from_numpy(linear.permutation)
    run(prepare(f"permute_columns_{tag}", x=x, permutation=permutation, y=sorted_x))
    assert torch.equal(sorted_x, x[:, permutation.long()])
    names = {"f16": "float16", "bf16": "bfloat16"}
    y = multiply(plan_stream(fmt, names[tag], 3, 1), sorted_x, linear)
    assert_as_good_as_torch(y, x.double() @ dense.double().T, reference.linear(x, dense.to(x.dtype)))
