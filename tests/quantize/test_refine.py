import itertools

import pytest
import torch

from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.graph.graph import QuantScheme
from llmctl.quantize.gptq import GptqOptions, damped, quantize_gptq
from llmctl.quantize.refine import _fit_scales, refine
from llmctl.quantize.rtn import quantize_rtn
from llmctl.quantize.stats import InputStats, output_errors


def problem(rows: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) * torch.logspace(0, -2, width)[:, None]
    inputs = torch.randn(8 * width, width, generator=generator) @ mix
    return torch.randn(rows, width, generator=generator), damped(InputStats.of(inputs).gram, 0.01)


def errors(weight: torch.Tensor, found: QuantizedWeight, hessian: torch.Tensor) -> torch.Tensor:
    return output_errors(found.dequantize() - weight, hessian.float())


@pytest.mark.parametrize("group_size", [16, -1])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
def test_no_rows_error_rises_sweep_by_sweep(group_size: int, symmetric: bool, act_order: bool) -> None:
    weight, hessian = problem(24, 160)
    scheme = QuantScheme(3, group_size, symmetric)
    if act_order:  # columns belong to groups out of order
        found = quantize_gptq(weight, hessian, scheme, GptqOptions(static_groups=False, search=False, sweeps=0))
        assert (found.g_idx is not None) == (group_size != -1)
    else:
        found = quantize_rtn(weight, scheme)
    before = errors(weight, found, hessian)
    for _ in range(3):
        found = refine(weight, found, hessian, 1)
        after = errors(weight, found, hessian)
        assert (after <= before * (1 + 1e-4)).all()
        assert after.sum() < before.sum()
        before = after
    assert found.codes.max() <= 7
    assert torch.equal(found.scales, found.scales.float().half())


def test_no_single_code_can_be_changed_for_the_better() -> None:
    weight, hessian = problem(2, 8)
    found = refine(weight, quantize_rtn(weight, QuantScheme(3, 8, False)), hessian, 20)
    least = errors(weight, found, hessian)
    for k, code in itertools.product(range(8), range(8)):
        codes = found.codes.clone()
        codes[:, k] = code
        changed = QuantizedWeight(codes, found.scales, found.zeros, found.scheme)
        assert (errors(weight, changed, hessian) >= least * (1 - 1e-4)).all()


def test_scales_are_those_of_least_squares() -> None:
    """From codes that are right, but scales that are not, one sweep finds the scales."""
    generator = torch.Generator().manual_seed(1)
    scheme = QuantScheme(4, 16, False)
    shape = (6, 4)
    codes = torch.randint(0, 16, (6, 64), generator=generator, dtype=torch.uint8)
    zeros = torch.full(shape, 7, dtype=torch.uint8)
    scales = torch.rand(shape, generator=generator).add(0.5).half()
    weight = QuantizedWeight(codes, scales, zeros, scheme).dequantize()
    _, hessian = problem(1, 64)
    off = (scales.float() * (1 + 0.02 * torch.randn(shape, generator=generator))).half()
    found = refine(weight, QuantizedWeight(codes, off, zeros, scheme), hessian, 1)
    assert torch.equal(found.codes, codes)
    assert torch.allclose(found.scales.float(), scales.float(), rtol=2e-3)


def test_groups_of_zeros_keep_their_scale() -> None:
    weight, hessian = problem(4, 32)
    weight[:, :16] = 0
    start = quantize_rtn(weight, QuantScheme(4, 16, True))
    found = refine(weight, start, hessian, 1)
    assert found.scales.isfinite().all()
    assert not torch.equal(found.scales[:, 1], start.scales[:, 1])  # the other group's are fitted
    assert (errors(weight, found, hessian) <= errors(weight, start, hessian) * (1 + 1e-4)).all()


def test_scales_that_float16_rounds_coarsely_are_not_made_worse() -> None:
    weight, hessian = problem(64, 64)
    weight *= 1e-6  # scales are a few of the least steps
    start = quantize_rtn(weight, QuantScheme(4, 8, False))
    found = _fit_scales(weight, start, hessian.float())
    assert not torch.equal(found.scales, start.scales)
    assert (errors(weight, found, hessian) <= errors(weight, start, hessian)).all()
