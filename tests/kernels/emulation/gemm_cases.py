"""What the tests of the GEMM kernels share: random packed weights, launches from plans, the exact result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from emulator import Buffer, kernels, read, update, write

from llmctl.kernels import reference
from llmctl.kernels.cuda_gemm import ACTIVATION, GemmPlan
from llmctl.kernels.cuda_layout import CudaFormat, CudaLinear, pack


@dataclass(frozen=True)
class Case:
    """A weight, packed, and as the reference sees it: ``dense`` f32 [N, K] in packed column order."""

    linear: CudaLinear
    dense: torch.Tensor


def make_case(fmt: CudaFormat, seed: int = 0) -> Case:
    """Random codes, scales and zeros of a format."""
    rng = np.random.default_rng(seed)
    rows, columns = fmt.shape
    group = columns if fmt.group == -1 else fmt.group
    groups = -(-columns // group)
    codes = rng.integers(0, 2**fmt.bits, (rows, columns), np.uint8)
    scales = (rng.random((rows, groups)) * 0.02 + 0.001).astype(np.float16)
    zeros = rng.integers(0, 2**fmt.bits, (rows, groups), np.uint8)
    if fmt.symmetric:
        zeros[:] = 2 ** (fmt.bits - 1)
    dense = reference.dequantize(*map(torch.from_numpy, (codes, scales, zeros)), torch.arange(columns) // group)
    return Case(pack(codes, scales, zeros, fmt), dense)


def scratch(plan: GemmPlan) -> tuple[Buffer | None, Buffer | None, np.ndarray]:
    """Workspace, counters, and the array behind the counters, which must be zero again after a launch."""
    counters = np.zeros(max(plan.counters, 1), np.uint32)
    if not plan.counters:
        return None, None, counters
    return update(np.zeros(plan.workspace, np.float32)), update(counters), counters


def weight_arguments(linear: CudaLinear) -> list[Any]:
    """Codes, scales, zeros."""
    return [read(linear.tiles), read(linear.scales), None if linear.zeros is None else read(linear.zeros)]


def multiply(
    source: str, plan: GemmPlan, x: torch.Tensor, linear: CudaLinear, bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None, epilogue: str = "", dtype: torch.dtype | None = None,
    token_scales: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Launch a GEMM kernel; y [m, N], or [m, N / 2] with a gated epilogue."""
    n, k = linear.format.shape
    y = torch.empty(len(x), n // 2 if epilogue else n, dtype=dtype or x.dtype)
    workspace, counters, count = scratch(plan)
    int8 = token_scales is not None
    kernels(source).launch(
        plan.entry, plan.grid, plan.threads,
        [read(x), *([read(token_scales)] if int8 else []), *weight_arguments(linear)[: 2 if int8 else 3],
         None if bias is None else read(bias), None if residual is None else read(residual), write(y), workspace,
         counters, np.int32(len(x)), np.int32(n), np.int32(k), np.int32(linear.format.group_size),
         np.int32(ACTIVATION[epilogue])],
        shared=plan.shared,
    )  # fmt: skip
    assert not count.any()
    return y


def expected(
    x: torch.Tensor, dense: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None, epilogue: str,
    dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """The linear with its epilogue, computed in ``dtype`` by the reference."""
    x, w = x.to(dtype), dense.to(dtype)
    b = None if bias is None else bias.to(dtype)
    y = reference.linear_gated(x, w, b, epilogue) if epilogue else reference.linear(x, w, b)
    return y if residual is None else y + residual.to(dtype)
