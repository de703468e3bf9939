import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.checkpoint.quantized import stack_rows
from llmctl.errors import UsageError
from llmctl.graph.graph import QuantScheme
from llmctl.quantize.grid import check_scheme, fit_grid, group_sizes_for, split_groups
from llmctl.quantize.rtn import quantize_rtn


@st.composite
def groups(draw: st.DrawFn) -> torch.Tensor:
    seed = draw(st.integers(0, 2**31))
    size = draw(st.sampled_from([1, 8, 32, 96]))
    spread = 10.0 ** draw(st.integers(-9, 3))
    shift = draw(st.sampled_from([0.0, 1.0, -1.0, 30.0, -30.0]))
    generator = torch.Generator().manual_seed(seed)
    weights = (torch.randn(4, size, generator=generator) + shift) * spread
    return weights * torch.tensor(draw(st.sampled_from([1.0, 0.0])))


@settings(max_examples=150, deadline=None)
@given(groups(), st.sampled_from([3, 4, 8]), st.booleans())
def test_grid_promises(weights: torch.Tensor, bits: int, symmetric: bool) -> None:
    grid = fit_grid(weights, bits, symmetric)
    codes = grid.encode(weights)
    assert torch.equal(grid.scales.half().float(), grid.scales)
    assert (grid.scales > 0).all()
    assert torch.equal(codes, codes.round())
    assert codes.min() >= 0
    assert codes.max() <= 2**bits - 1
    if symmetric:
        assert (grid.zeros == 2 ** (bits - 1)).all()
    else:
        assert grid.zeros.min() >= 1
        assert grid.zeros.max() <= 2**bits - 1
    # Half a step, what float16 moved the end of the range by, and float32 rounding.
    peak = weights.abs().amax(dim=-1)
    bound = grid.scales / 2 + peak * 2.0**-10 + 2**bits * 2.0**-25
    assert ((grid.snap(weights) - weights).abs().amax(dim=-1) <= bound * (1 + 1e-5)).all()
    assert torch.equal(grid.decode(codes), grid.snap(weights))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([3, 4, 8]), st.booleans())
def test_snap_is_the_nearest_grid_point(seed: int, bits: int, symmetric: bool) -> None:
    weights = torch.randn(3, 16, generator=torch.Generator().manual_seed(seed))
    grid = fit_grid(weights, bits, symmetric, 0.8)
    points = (torch.arange(2**bits) - grid.zeros[:, None]) * grid.scales[:, None]
    nearest = (weights[:, :, None] - points[:, None, :]).abs().amin(dim=-1)
    assert torch.allclose((grid.snap(weights) - weights).abs(), nearest, atol=1e-6)


def test_grid_points_are_kept_exactly() -> None:
    scale = torch.tensor([0.125, 0.5])
    codes = torch.stack([torch.arange(16.0), torch.arange(16.0)])
    weights = (codes - torch.tensor([[3.0], [9.0]])) * scale[:, None]
    grid = fit_grid(weights, 4, False)
    assert torch.equal(grid.snap(weights), weights)
    assert torch.equal(grid.zeros, torch.tensor([3.0, 9.0]))


def test_rtn_equals_a_scalar_loop() -> None:
    weight = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    quantized = quantize_rtn(weight, QuantScheme(4, 8, False))
    for n in range(5):
        for g in range(3):
            part = weight[n, 8 * g : 8 * g + 8]
            low, high = min(part.min().item(), 0), max(part.max().item(), 0)
            scale = torch.tensor((high - low) / 15).half().item()
            zero = min(max(round(-low / scale), 1), 15)
            assert quantized.scales[n, g].item() == pytest.approx(scale, rel=1e-3)
            assert quantized.zeros[n, g].item() == zero
            expected = [min(max(round(w / scale) + zero, 0), 15) for w in part.tolist()]
            assert quantized.codes[n, 8 * g : 8 * g + 8].tolist() == expected


def test_rows_split_and_join() -> None:
    whole = quantize_rtn(torch.randn(6, 16), QuantScheme(4, 8, False))
    again = stack_rows([whole.take_rows(slice(0, 2)), whole.take_rows(torch.tensor([2, 3, 4, 5]))])
    assert torch.equal(again.codes, whole.codes)
    assert torch.equal(again.dequantize(), whole.dequantize())
    other = quantize_rtn(torch.randn(6, 16), QuantScheme(4, 16, False))
    with pytest.raises(ValueError):
        stack_rows([whole, other])


def test_split_groups_refuses_what_does_not_divide() -> None:
    with pytest.raises(ValueError, match="does not divide"):
        split_groups(torch.zeros(2, 576), 128)
    assert split_groups(torch.zeros(2, 576), -1).shape == (2, 1, 576)


def test_group_sizes_offered() -> None:
    offers = group_sizes_for({576, 1536})
    assert offers[:2] == [32, 64]
    assert {96, 192, -1} <= set(offers)
    assert all(576 % g == 0 and 1536 % g == 0 for g in offers if g != -1)
    assert group_sizes_for({48}) == [8, 16, 24, 48, -1]


def test_check_scheme_names_the_sizes_that_divide() -> None:
    widths = {"model.layers.0.self_attn.q_proj": 576, "model.layers.0.mlp.down_proj": 1536}
    check_scheme(QuantScheme(4, 64, False), widths)
    check_scheme(QuantScheme(3, -1, True), widths)
    with pytest.raises(UsageError, match="576") as caught:
        check_scheme(QuantScheme(4, 128, False), widths)
    assert "32, 64" in str(caught.value.fix)
    for scheme in (QuantScheme(5, 64, False), QuantScheme(4, 0, False), QuantScheme(4, -2, False)):
        with pytest.raises(UsageError):
            check_scheme(scheme, widths)
