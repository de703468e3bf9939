import pytest
import torch
from torch import Tensor

from llmctl.graph.graph import QuantScheme
from llmctl.quantize.awq import quantize_awq, search_scales
from llmctl.quantize.clip import search_clip
from llmctl.quantize.rtn import quantize_rtn
from llmctl.quantize.stats import InputStats, gram_blocks, group_errors, output_errors, relative_error


def outlier_inputs(tokens: int = 512, width: int = 64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, width, generator=generator)
    inputs[:, ::16] *= 25
    return inputs


def weights(rows: int = 48, width: int = 64, seed: int = 1) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 0.05


@pytest.mark.parametrize("chunk", [1, 7, 4096])
def test_stats_equal_the_definitions(chunk: int) -> None:
    inputs = outlier_inputs(50)
    stats = InputStats.of(inputs, chunk)
    assert torch.allclose(stats.gram.float(), inputs.T @ inputs / 50, rtol=1e-5, atol=1e-5)
    assert torch.allclose(stats.mean_abs, inputs.abs().mean(dim=0))
    scaled = stats.scaled(torch.linspace(1, 2, 64))
    direct = InputStats.of(inputs / torch.linspace(1, 2, 64))
    assert torch.allclose(scaled.gram, direct.gram, rtol=1e-5, atol=1e-4)
    assert torch.allclose(scaled.mean_abs, direct.mean_abs)


def test_errors_from_the_gram_equal_errors_from_the_inputs() -> None:
    inputs, delta = outlier_inputs(), weights()
    gram = InputStats.of(inputs).gram.float()
    assert torch.allclose(output_errors(delta, gram), (inputs @ delta.T).square().mean(dim=0), rtol=1e-4)
    blocks = gram_blocks(gram, 16)
    by_group = group_errors(delta.reshape(48, 4, 16).transpose(0, 1), blocks).T
    direct = torch.einsum("tgi,ngi->tng", inputs.reshape(-1, 4, 16), delta.reshape(48, 4, 16)).square().mean(dim=0)
    assert torch.allclose(by_group, direct, rtol=1e-4)
    assert relative_error(delta, torch.zeros_like(delta), gram) == pytest.approx(1.0)
    assert relative_error(delta, delta, None) == 0.0


def test_scale_search_finds_what_a_direct_search_finds() -> None:
    inputs, weight, scheme = outlier_inputs(), weights(), QuantScheme(3, 16, False)
    choice = search_scales([weight], InputStats.of(inputs), scheme)
    direct = (inputs / choice.scales) @ quantize_rtn(weight * choice.scales, scheme).dequantize().T
    error = (direct - inputs @ weight.T).square().mean(dim=0).sum().item()
    plain = (inputs @ (quantize_rtn(weight, scheme).dequantize() - weight).T).square().mean(dim=0).sum().item()
    assert choice.error == pytest.approx(error, rel=1e-3)
    assert choice.baseline == pytest.approx(plain, rel=1e-3)
    assert choice.error < 0.7 * choice.baseline
    assert choice.alpha is not None
    assert (choice.scales[::16] > choice.scales[1::16]).all()


def test_no_scaling_is_kept_where_it_is_best() -> None:
    codes = torch.randint(0, 16, (8, 64), generator=torch.Generator().manual_seed(0)).float()
    codes[:, ::16], codes[:, 1::16] = 0, 15
    choice = search_scales([(codes - 8) * 0.25], InputStats.of(outlier_inputs()), QuantScheme(4, 16, False))
    assert choice.alpha is None
    assert choice.error == 0
    assert (choice.scales == 1).all()


def test_tied_columns_get_one_scale() -> None:
    columns = torch.arange(32).reshape(2, 16).repeat_interleave(2, dim=0).reshape(-1)
    choice = search_scales([weights()], InputStats.of(outlier_inputs()), QuantScheme(3, 16, False), columns)
    scales = choice.scales.reshape(2, 2, 16)
    assert torch.equal(scales[:, 0], scales[:, 1])
    assert scales.unique().numel() > 1


@pytest.mark.parametrize("group_size", [8, 32, -1])
@pytest.mark.parametrize("symmetric", [False, True])
def test_clipping_never_raises_a_rows_error(group_size: int, symmetric: bool) -> None:
    mix = torch.randn(64, 64, generator=torch.Generator().manual_seed(3))
    weight = weights() * torch.rand(48, 64, generator=torch.Generator().manual_seed(7)) ** 4
    gram = InputStats.of(outlier_inputs() @ mix).gram.float()
    scheme = QuantScheme(3, group_size, symmetric)
    ratio = search_clip(weight, gram, scheme)
    clipped = output_errors(quantize_awq(weight, gram, scheme).dequantize() - weight, gram)
    plain = output_errors(quantize_rtn(weight, scheme).dequantize() - weight, gram)
    assert (clipped <= plain * (1 + 1e-5)).all()
    assert clipped.sum() < plain.sum()
    assert ratio.min() < 1
    assert ratio.min() >= 0.5


def test_clip_search_equals_brute_force_on_white_inputs() -> None:
    weight, scheme = weights(rows=4, width=16), QuantScheme(3, 16, False)
    ratio = search_clip(weight, torch.eye(16), scheme, steps=10)
    for n in range(4):
        errors = {
            r: (quantize_rtn(weight[n : n + 1], scheme, r).dequantize() - weight[n]).square().sum().item()
            for r in [1 - 0.05 * i for i in range(11)]
        }
        assert errors[min(errors, key=lambda r: abs(r - ratio[n, 0].item()))] == pytest.approx(min(errors.values()))
