"""What the tests of the GEMM kernels share: random packed weights, launches from plans, the exact result."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from emulator import kernels, read, update, write

from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.graph.code_books import CODE_BOOKS
from llmctl.graph.graph import QuantScheme
from llmctl.targets.cuda.call import Call, Pointer
from llmctl.targets.cuda.gemm import GemmPlan
from llmctl.targets.cuda.gemm_signatures import gemm_call
from llmctl.targets.cuda.layout import CudaFormat, CudaLinear, pack
from llmctl.targets.reference import kernels as reference


@dataclass(frozen=True)
class Case:
    """A weight, packed, and as the reference sees it: ``dense`` f32 [N, K] in packed column order."""

    linear: CudaLinear
    dense: torch.Tensor


def any_format(
    codes: int | str, shape: tuple[int, int], group: int, *, symmetric: bool, gated: bool = False
) -> CudaFormat:
    """A format of integers by their bits (``k4``, ``k8``: with minimums unless symmetric), or of a code book by its
    name."""
    if codes in ("k4", "k8"):
        return CudaFormat(int(codes[1:]), shape, gated, group, symmetric, minimum=not symmetric)
    if isinstance(codes, str):
        return CudaFormat(CODE_BOOKS[codes].bits, shape, gated, group, symmetric=True, book=codes)
    return CudaFormat(codes, shape, gated, group, symmetric)


def make_case(fmt: CudaFormat, seed: int = 0) -> Case:
    """Random codes, scales and zeros of a format, every code among them."""
    rng = np.random.default_rng(seed)
    rows, columns = fmt.shape
    group = columns if fmt.group == -1 else fmt.group
    groups = -(-columns // group)
    codes = rng.integers(0, 2**fmt.bits, (rows, columns), np.uint8)
    if fmt.kind == "fp8":
        codes[codes & 0x7F == 0x7F] = 0x0F  # NaN, which is refused, to a small one
    scales = (rng.random((rows, groups)) * 0.02 + 0.001).astype(np.float16)
    zeros = rng.integers(0, 2**fmt.bits, (rows, groups), np.uint8)
    if fmt.symmetric:
        zeros[:] = 0 if fmt.book else 2 ** (fmt.bits - 1)
    minimums = None
    if fmt.minimum:
        zeros[:] = 0
        middle = scales.astype(np.float32) * -(2 ** (fmt.bits - 1))  # about which a K type's minimums lie
        minimums = (middle * rng.uniform(0.5, 1.5, middle.shape)).astype(np.float16)
    scheme = QuantScheme(fmt.bits, fmt.group, fmt.symmetric, book=fmt.book, minimum=fmt.minimum)
    floats = None if minimums is None else torch.from_numpy(minimums)
    weight = QuantizedWeight(*map(torch.from_numpy, (codes, scales, zeros)), scheme, minimums=floats)
    return Case(pack(codes, scales, zeros, fmt, minimums=minimums), weight.dequantize())


def planes_of(linear: CudaLinear) -> dict[str, torch.Tensor]:
    """The planes as the engine holds them, by suffix."""
    return {k: torch.from_numpy(v).view(torch.float16 if v.dtype == np.uint16 else torch.from_numpy(v).dtype)
            for k, v in linear.planes().items()}  # fmt: skip


def run(call: Call) -> None:
    """Carry out a checked call under emulation."""
    wrap = {"read": read, "write": write, "update": update}
    arguments = [wrap[a.use](a.tensor) if isinstance(a, Pointer) else a for a in call.arguments]
    kernels(call.source).launch(call.entry, call.geometry.grid, call.geometry.threads, arguments, call.geometry.shared)


def multiply(
    plan: GemmPlan, x: torch.Tensor, linear: CudaLinear, bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None, epilogue: str = "", dtype: torch.dtype | None = None,
    token_scales: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Launch a GEMM kernel; y [m, N], or [m, N / 2] with a gated epilogue."""
    rows = linear.format.shape[0]
    y = torch.empty(len(x), rows // 2 if epilogue else rows, dtype=dtype or x.dtype)
    workspace, counters = torch.zeros(plan.workspace), torch.zeros(plan.counters, dtype=torch.int32)
    scales = {} if token_scales is None else {"token_scales": token_scales}
    run(
        gemm_call(plan, linear.format, planes_of(linear), epilogue=epilogue, workspace=workspace, counters=counters,
                  x=x, bias=bias, residual=residual, y=y, **scales)
    )  # fmt: skip
    assert not counters.any()
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
