"""More cases of gpu_check.py: the products of a mixture's experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from gpu_cases import BF16, Case, Prepared, copies_of, random, random_planes, step_tensors
from torch import Tensor

from llmctl.graph.graph import Op
from llmctl.targets.cuda.call import Machine
from llmctl.targets.cuda.gemm_signatures import dequantize_call
from llmctl.targets.cuda.layout import CudaFormat
from llmctl.targets.cuda.ops import EXECUTORS, Job, PackedWeight, Scratch
from llmctl.targets.reference import kernels as reference


def expert_cases() -> Iterator[Case]:
    """The two products of a layer of Qwen3-30B-A3B: 4-bit and dense; 8-bit and NF4 at two sizes of step."""
    experts, chosen, hidden, inner = 128, 8, 2048, 768
    for tokens in (1, 8, 32, 256, 2048):
        met = round(experts * (1 - (1 - chosen / experts) ** tokens))  # of routes at random
        for name, n, k, gated in (("gate_up", 2 * inner, hidden, True), ("down", hidden, inner, False)):
            for codes in (4, 16, *((8, "nf4") if tokens in (1, 32) else ())):
                fmt = _format(codes, (experts * n, k), gated, experts)
                bits, groups = (16, 0) if fmt is None else (fmt.bits, -(-k // fmt.group_size))
                nbytes = met * n * (k * bits // 8 + 2 * groups) + 2 * tokens * chosen * (n // (1 + gated) + k)
                label = f"Qwen3-30B-A3B {name} {n}x{k}, {chosen} of {experts}"
                make = grouped_maker((experts, n, k), tokens, chosen, codes, gated)
                yield Case(_kernel(fmt), label, tokens, nbytes, 2 * tokens * chosen * n * k, make)


def _format(codes: int | str, shape: tuple[int, int], gated: bool, experts: int) -> CudaFormat | None:
    if codes == 16:
        return None
    if isinstance(codes, str):
        return CudaFormat(4, shape, gated, group=64, symmetric=True, book=codes, experts=experts)
    return CudaFormat(codes, shape, gated, group=-1, symmetric=True, experts=experts)


def _kernel(fmt: CudaFormat | None) -> str:
    return "grouped_dense" if fmt is None else f"grouped_{fmt.kind}a16"


def grouped_maker(
    shape: tuple[int, int, int], tokens: int, chosen: int, codes: int | str, gated: bool
) -> Callable[[Machine, str], Prepared]:
    """``codes``: integers by their bits, a code book by its name; 16: dense. The gated product, a layer's first, sorts
    its slots each time; what goes down finds them sorted."""
    experts, n, k = shape

    def make(machine: Machine, device: str) -> Prepared:
        fmt = _format(codes, (experts * n, k), gated, experts)
        count = min(4, copies_of(experts * n * k * (16 if fmt is None else fmt.bits) // 8))
        weights: list[Tensor | PackedWeight] = [
            random(device, experts * n, k) * k**-0.5 if fmt is None else random_planes(fmt, device)
            for _ in range(count)
        ]
        own = not gated  # what goes down is a row for every choice
        x = random(device, tokens, k * (chosen if own else 1))
        picked = torch.rand(tokens, experts, device=device).topk(chosen, -1)[1].int()
        y = torch.empty(tokens, chosen * (n // 2 if gated else n), device=device, dtype=BF16)
        step = step_tensors(device, Scratch(device))
        attrs = {"count": experts, **({"epilogue": "silu_mul"} if gated else {})}
        op = Op("grouped_linear", "experts", ("x", "chosen"), ("y",), ("w",), attrs)

        def run(i: int) -> None:
            if gated:
                step.sorted_slots = None
            EXECUTORS[_kernel(fmt)](machine, Job(op, [x, picked], [y], [weights[i]], step))

        def expected(i: int) -> Tensor:
            weight = weights[i]
            each = weight.view(experts, n, k) if isinstance(weight, Tensor) else _dequantized(machine, weight)
            return reference.grouped_linear(x.float(), picked, list(each.float()), str(attrs.get("epilogue", "")))

        return Prepared(run, count, lambda: y, expected)

    return make


def _dequantized(machine: Machine, weight: PackedWeight) -> Tensor:
    """[experts, n, k], by the kernel for linears, which tests/gpu hold to the reference."""
    experts, (rows, k) = weight.format.experts, weight.format.shape
    one = replace(weight.format, shape=(rows // experts, k), experts=1)
    dense = torch.empty(experts, *one.shape, device=weight.planes["tiles"].device, dtype=BF16)
    for i in range(experts):
        planes = {
            name: plane if name == "tile_book" else plane.chunk(experts)[i] for name, plane in weight.planes.items()
        }
        machine.launch(dequantize_call(one, "bf16", planes, dense[i]))
    return dense
