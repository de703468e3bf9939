import pytest
import torch

from llmctl.graph.graph import QuantScheme
from llmctl.quantize import grid_search
from llmctl.quantize.grid import Grid, fit_grid, split_groups
from llmctl.quantize.grid_search import search_grid
from llmctl.quantize.rtn import quantize_rtn, quantize_searched


def weights(rows: int = 40, width: int = 96, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(rows, width, generator=generator) * 0.05
    found[torch.rand(rows, width, generator=generator) < 0.02] *= 4
    found[0] = 0
    found[1] = found[1].abs()
    found[2] = -found[2].abs()
    return found


def errors(grid: Grid, weight: torch.Tensor, size: int, importance: torch.Tensor) -> torch.Tensor:
    groups = split_groups(weight, size)
    return ((grid.snap(groups) - groups).square() * split_groups(importance[None], size)).sum(dim=-1)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [32, -1])
def test_no_group_is_worse_and_all_together_are_better(bits: int, symmetric: bool, group_size: int) -> None:
    weight, scheme = weights(), QuantScheme(bits, group_size, symmetric)
    for importance in (torch.ones(96), torch.logspace(-3, 3, 96)):
        found = search_grid(weight, scheme, importance)
        plain = fit_grid(split_groups(weight, group_size), bits, symmetric)
        after, before = (errors(g, weight, group_size, importance) for g in (found, plain))
        assert (after <= before * (1 + 1e-3) + 1e-12).all()
        assert after.sum() < (0.96 if bits < 8 else 1.0) * before.sum()


@pytest.mark.parametrize("symmetric", [False, True])
def test_grids_keep_what_formats_rely_on(symmetric: bool) -> None:
    found = search_grid(weights(), QuantScheme(4, 32, symmetric), torch.logspace(-3, 3, 96))
    assert torch.equal(found.scales, found.scales.half().float())
    assert (found.scales > 0).all()
    assert torch.equal(found.zeros, found.zeros.round())
    if symmetric:
        assert (found.zeros == 8).all()
    else:
        assert found.zeros.min() >= 1
        assert found.zeros.max() <= 15


def test_near_the_best_of_all_grids() -> None:
    """Against every zero point and a fine comb of scales."""
    weight, scheme = weights(rows=12, width=32), QuantScheme(3, 32, False)
    ones = torch.ones(32)
    found = errors(search_grid(weight, scheme, ones), weight, 32, ones)
    least = torch.full((12, 1), torch.inf)
    widest = fit_grid(weight[:, None], 3, False).scales
    for zero in range(1, 8):
        for share in torch.linspace(0.3, 1.3, 100):
            least = torch.minimum(least, errors(Grid(widest * share, torch.full((12, 1), zero), 3), weight, 32, ones))
    assert found.sum() <= 1.1 * least.sum()


def test_parts_are_searched_as_the_whole_is(monkeypatch: pytest.MonkeyPatch) -> None:
    scheme, importance = QuantScheme(4, 32, False), torch.logspace(-1, 1, 96)
    whole = search_grid(weights(), scheme, importance)
    monkeypatch.setattr(grid_search, "_CHUNK", 300)
    parts = search_grid(weights(), scheme, importance)
    assert torch.allclose(whole.scales, parts.scales, rtol=1e-3)  # sums of another order may fall beside a tie
    assert torch.equal(whole.zeros, parts.zeros)


@pytest.mark.parametrize("symmetric", [False, True])
def test_rounding_on_searched_grids_spares_large_weights(symmetric: bool) -> None:
    weight, scheme = weights(), QuantScheme(3, 32, symmetric)
    plain, found, equal = (
        quantize_rtn(weight, scheme).dequantize(),
        quantize_searched(weight, scheme).dequantize(),
        search_grid(weight, scheme, torch.ones(96)).snap(split_groups(weight, 32)).reshape(weight.shape),
    )
    large = weight.abs() > 2 * weight.square().mean().sqrt()
    weighted = [((q - weight).square() * weight.pow(4)).sum() for q in (found, plain)]
    assert weighted[0] < 0.9 * weighted[1]
    assert (found - weight)[large].square().sum() < 0.7 * (equal - weight)[large].square().sum()


def test_eight_bits_are_not_searched() -> None:
    scheme = QuantScheme(8, 32, True)
    assert torch.equal(quantize_searched(weights(), scheme).codes, quantize_rtn(weights(), scheme).codes)
    assert torch.equal(quantize_searched(weights(), scheme).scales, quantize_rtn(weights(), scheme).scales)
