import pytest
import torch
from torch import Tensor

from llmctl.graph.graph import QuantScheme
from llmctl.quantize.gptq import Factored, GptqOptions, quantize_gptq
from llmctl.quantize.original_targets import cross_gram, original_target
from llmctl.quantize.stats import InputStats


def streams(tokens: int = 700, width: int = 48) -> tuple[Tensor, Tensor]:
    """Inputs in the original, and with an error that depends on them."""
    generator = torch.Generator().manual_seed(0)
    original = torch.randn(tokens, width, generator=generator) * torch.logspace(0, -1, width)
    wrong = torch.eye(width) + 0.05 * torch.randn(width, width, generator=generator)
    return original, original @ wrong + 0.01 * torch.randn(tokens, width, generator=generator)


def weights(width: int = 48) -> Tensor:
    return torch.randn(10, width, generator=torch.Generator().manual_seed(1))


def aimed(share: float, damp: float = 1e-6) -> Tensor:
    original, inputs = streams()
    factored = Factored.of(InputStats.of(inputs).gram, GptqOptions(damp))
    return original_target(weights(), factored, cross_gram(original, inputs), share)


def test_the_target_is_the_least_squares_solution() -> None:
    original, inputs = streams()
    direct = torch.linalg.lstsq(inputs.double(), (original @ weights().T).double()).solution.T
    assert torch.allclose(aimed(1.0), direct.float(), atol=1e-3)


def test_a_share_is_that_much_of_the_way() -> None:
    assert torch.equal(aimed(0.0), weights())
    assert torch.allclose(aimed(0.25) - weights(), (aimed(1.0) - weights()) / 4, atol=1e-6)
    assert not torch.allclose(aimed(1.0), weights(), atol=1e-2)


def test_inputs_that_are_the_originals_leave_the_weight() -> None:
    original, _ = streams()
    assert torch.equal(cross_gram(original, original), torch.zeros(48, 48))


def test_scales_folded_into_one_stream_are_put_on_the_other() -> None:
    original, inputs = streams(tokens=5000)  # more than one chunk
    scales = torch.logspace(-1, 1, 48)
    found = cross_gram(original, inputs / scales, scales)
    expected = cross_gram(original, inputs) / torch.outer(scales, scales)
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("bits", [3, 4])
def test_outputs_are_nearer_to_the_originals(bits: int) -> None:
    original, inputs = streams()
    gram, scheme = InputStats.of(inputs).gram, QuantScheme(bits, 16, False)
    wanted = original @ weights().T
    errors = [
        (inputs @ quantize_gptq(aimed(share, 0.01), gram, scheme).dequantize().T - wanted).square().mean()
        for share in (0.0, 0.5, 1.0)
    ]
    assert errors[2] < errors[1] < errors[0]
