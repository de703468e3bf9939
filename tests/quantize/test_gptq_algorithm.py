import itertools
import logging

import pytest
import torch
from torch import Tensor

from llmctl.errors import LlmctlError
from llmctl.graph.graph import QuantScheme
from llmctl.quantize.gptq import GptqOptions, inverse_factor, quantize_gptq
from llmctl.quantize.grid import fit_grid
from llmctl.quantize.rtn import quantize_rtn
from llmctl.quantize.stats import InputStats, output_errors


def correlated(tokens: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) * torch.logspace(0, -2, width)[:, None]
    return torch.randn(tokens, width, generator=generator) @ mix


def naive_gptq(weight: Tensor, gram: Tensor, scheme: QuantScheme, options: GptqOptions) -> Tensor:
    """Column by column over the whole remaining matrix, in f64: the textbook loop."""
    rows, width = weight.shape
    size = width if scheme.group_size == -1 else scheme.group_size
    order = list(range(width))
    if options.act_order:
        order.sort(key=lambda k: -gram[k, k].item())
    hessian = gram.double()[order][:, order]
    hessian += torch.eye(width) * options.damp_percent * hessian.diagonal().mean()
    inverse = torch.linalg.inv(hessian)
    work = weight.double()[:, order]
    result = torch.empty(rows, width)
    for i, k in enumerate(order):
        if options.static_groups:
            start = k // size * size
            grid = fit_grid(weight[:, start : start + size], scheme.bits, scheme.symmetric)
        elif i % size == 0:
            grid = fit_grid(work[:, i : i + size].float(), scheme.bits, scheme.symmetric)
        result[:, k] = grid.snap(work[:, i : i + 1].float()).squeeze(1)
        # Optimal brain surgeon: spread the error by the inverse Hessian of the columns left, then drop this column.
        error = (work[:, i] - result[:, k].double()) / inverse[i, i]
        work -= torch.outer(error, inverse[i])
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return result


# Every two values of any two options; all products are slow.
_COVERING = {
    *((8, False, False, False), (8, True, True, True), (96, True, False, True), (96, False, True, False)),
    *((192, False, False, True), (192, True, True, False), (-1, True, False, False), (-1, False, True, True)),
}


@pytest.mark.parametrize(
    ("group_size", "symmetric", "act_order", "static_groups"),
    [
        pytest.param(*case, marks=() if case in _COVERING else pytest.mark.slow)
        for case in itertools.product((8, 96, 192, -1), (False, True), (False, True), (False, True))
    ],
)
def test_blocked_equals_the_loop(group_size: int, symmetric: bool, act_order: bool, static_groups: bool) -> None:
    width = 192
    weight = torch.randn(7, width, generator=torch.Generator().manual_seed(1))
    gram = InputStats.of(correlated(600, width)).gram
    scheme = QuantScheme(4, group_size, symmetric)
    options = GptqOptions(0.01, act_order, static_groups, search=False, sweeps=0)
    found = quantize_gptq(weight, gram, scheme, options)
    expected = naive_gptq(weight, gram, scheme, options)
    # A column that falls on a tie may round either way (f32 against f64) and moves what follows it.
    rows_equal = torch.isclose(found.dequantize(), expected, atol=1e-4).all(dim=1)
    assert rows_equal.sum() >= 6
    assert found.scheme.act_order == (act_order and not static_groups and group_size in (8, 96))


def test_error_is_below_rounding_to_nearest() -> None:
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(2))
    gram = InputStats.of(correlated(2000, 128, seed=3)).gram
    for bits in (3, 4):
        scheme = QuantScheme(bits, 32, False)
        nearest = output_errors(quantize_rtn(weight, scheme).dequantize() - weight, gram.float()).sum()
        for options in (GptqOptions(), GptqOptions(act_order=False), GptqOptions(static_groups=False)):
            found = quantize_gptq(weight, gram, scheme, options).dequantize() - weight
            assert output_errors(found, gram.float()).sum() < 0.8 * nearest


@pytest.mark.parametrize("static_groups", [True, False])
def test_searched_grids_and_sweeps_each_lower_the_error(static_groups: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 128, generator=generator)
    weight[torch.rand(32, 128, generator=generator) < 0.02] *= 4
    gram = InputStats.of(correlated(2000, 128, seed=3)).gram
    cases = ((False, 0), (True, 0), (True, 2))
    options = [GptqOptions(static_groups=static_groups, search=search, sweeps=n) for search, n in cases]
    found = (quantize_gptq(weight, gram, QuantScheme(3, 32, True), o).dequantize() for o in options)
    plain, searched, refined = (output_errors(q - weight, gram.float()).sum() for q in found)
    assert searched < 0.9 * plain
    assert refined < 0.97 * searched


def test_white_inputs_give_rounding_to_nearest() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(4))
    scheme = QuantScheme(4, 16, False)
    found = quantize_gptq(weight, torch.eye(64), scheme, GptqOptions(act_order=False, search=False, sweeps=0))
    assert torch.equal(found.codes, quantize_rtn(weight, scheme).codes)


def test_stacked_rows_are_independent() -> None:
    gram = InputStats.of(correlated(500, 64)).gram
    weight = torch.randn(12, 64, generator=torch.Generator().manual_seed(5))
    scheme = QuantScheme(4, 16, False)
    whole = quantize_gptq(weight, gram, scheme)
    half = quantize_gptq(weight[:6], gram, scheme)
    assert torch.equal(whole.codes[:6], half.codes)


def test_dead_columns_are_rounded_to_nearest() -> None:
    inputs = correlated(500, 64)
    inputs[:, 10:20] = 0
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(6))
    scheme = QuantScheme(4, 16, False)
    found = quantize_gptq(weight, InputStats.of(inputs).gram, scheme, GptqOptions(search=False, sweeps=0))
    assert torch.equal(found.codes[:, 10:20], quantize_rtn(weight, scheme).codes[:, 10:20])


def test_singular_hessian_gets_more_damping_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    inputs = torch.ones(100, 1) * torch.linspace(-1, 1, 48)
    gram = InputStats.of(inputs).gram
    gram -= 1e-6 * torch.eye(48)
    with caplog.at_level(logging.WARNING):
        factor = inverse_factor(gram, 1e-8)
    assert torch.isfinite(factor).all()
    assert "not positive definite" in caplog.text


def test_hopeless_hessian_is_an_error() -> None:
    with pytest.raises(LlmctlError, match="cannot be factored"):
        inverse_factor(torch.full((4, 4), torch.nan), 0.01)


def test_gram_of_the_wrong_width_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        quantize_gptq(torch.zeros(2, 8), torch.eye(4), QuantScheme(4, 8, False))
