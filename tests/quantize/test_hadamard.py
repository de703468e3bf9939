import pytest
import torch

from llmctl.quantize.hadamard import Turn, hadamard, hadamard_orders

WIDTHS = (2, 16, 64, 96, 128, 576, 640, 896, 960, 1536, 2304, 2880, 3584, 4096, 5376, 6656, 14336)


@pytest.mark.parametrize("width", WIDTHS)
def test_factors_are_hadamard_matrices_of_that_product(width: int) -> None:
    orders = hadamard_orders(width)
    assert torch.tensor(orders).prod() == width
    for order in orders:
        matrix = hadamard(order)
        assert torch.equal(matrix.abs(), torch.ones(order, order))
        assert torch.equal(matrix @ matrix.T, order * torch.eye(order))


def test_an_order_without_a_known_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match="no Hadamard matrix of order 70 "):
        hadamard_orders(70)


@pytest.mark.parametrize("width", [12, 96, 144, 576])
def test_a_turn_is_its_orthogonal_matrix(width: int) -> None:
    turn = Turn.random(width, torch.Generator().manual_seed(0))
    product = torch.ones(1, 1)
    for factor in turn.factors:
        product = torch.kron(product, factor)
    matrix = turn.signs.diag() @ product / width**0.5
    assert torch.allclose(matrix @ matrix.T, torch.eye(width), atol=1e-5)
    values = torch.randn(5, 2 * width, generator=torch.Generator().manual_seed(1))
    blocks = torch.block_diag(matrix, matrix)
    assert torch.allclose(turn.rows(values), values @ blocks, atol=1e-4)
    assert torch.allclose(turn.columns(values.T), blocks.T @ values.T, atol=1e-4)
    assert torch.allclose(turn.rows(values[0]), values[0] @ blocks, atol=1e-4)


def test_an_outlier_is_spread_over_all_channels() -> None:
    spike = torch.zeros(576)
    spike[100] = 24
    turned = Turn.random(576, torch.Generator().manual_seed(0)).rows(spike)
    assert torch.allclose(turned.abs(), torch.ones(576), atol=1e-5)
