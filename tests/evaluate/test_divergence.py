import math
from pathlib import Path

import pytest
import torch
from random_models import logits_of, write_model
from scored_texts import compare, perplexity

from llmctl.checkpoint.assemble import checkpoint_graph
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.config import QuantizeConfig
from llmctl.errors import LlmctlError, UsageError
from llmctl.evaluate.divergence import divergence, spread_windows
from llmctl.evaluate.perplexity import Protocol
from llmctl.quantize.driver import quantize_checkpoint
from llmctl.targets.reference.weights import CheckpointWeights
from llmctl.text.tokenizer import Tokenizer

TEXT = "the quick brown fox reads a book and the answer is that every question has an answer of its own. " * 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "llama", "llama")


@pytest.fixture(scope="module")
def quantized(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("quantized") / "rtn"
    quantize_checkpoint(QuantizeConfig(model=str(model), output=str(output), method="rtn", bits=3, group_size=32))
    return output


def logprobs(folder: Path, tokens: list[int]) -> torch.Tensor:
    checkpoint = open_checkpoint(folder)
    graph = checkpoint_graph(checkpoint)
    return logits_of(graph, CheckpointWeights(graph, checkpoint), [tokens]).double().log_softmax(dim=-1)


def test_a_window_is_what_the_logits_say(model: Path, quantized: Path) -> None:
    tokens = Tokenizer.from_folder(model).encode(TEXT, add_special_tokens=False)[:48]
    p, q = (logprobs(folder, tokens)[:-1] for folder in (model, quantized))
    targets = torch.tensor(tokens[1:])[:, None]
    found = compare(open_checkpoint(model), open_checkpoint(quantized), TEXT, Protocol(48, 48, 48))
    assert found.kl == pytest.approx((p.exp() * (p - q)).sum(dim=-1).mean().item(), rel=1e-3)
    assert found.delta_nll == pytest.approx((p.gather(1, targets) - q.gather(1, targets)).mean().item(), rel=1e-3)
    assert found.top1 == pytest.approx((p.argmax(dim=-1) == q.argmax(dim=-1)).double().mean().item())
    assert found.tokens == 47
    assert math.isnan(found.kl_error)


def test_a_model_does_not_differ_from_itself(model: Path) -> None:
    found = compare(open_checkpoint(model), open_checkpoint(model), TEXT, Protocol(24, 12, 60))
    assert (found.kl, found.kl_error, found.delta_nll, found.delta_nll_error, found.top1) == (0, 0, 0, 0, 1)


def test_the_difference_of_two_perplexities(model: Path, quantized: Path) -> None:
    protocol = Protocol(40, 20, 90)
    before, after = (perplexity(open_checkpoint(f), TEXT, protocol) for f in (model, quantized))
    found = compare(open_checkpoint(model), open_checkpoint(quantized), TEXT, protocol)
    assert found.delta_nll == pytest.approx(math.log(after / before), rel=1e-3)


def test_errors_are_those_of_a_mean_over_windows() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (list(torch.randn(6, 9, 5, generator=generator).log_softmax(dim=-1)) for _ in range(2))
    windows = [([0, 1, 2, 3, 4, 0, 1, 2, 3, 4], 9)] * 6
    each = torch.tensor([divergence([a], [b], [w]).kl for a, b, w in zip(p, q, windows, strict=True)])
    found = divergence(p, q, windows)
    assert found.kl == pytest.approx(each.mean().item(), rel=1e-6)
    assert found.kl_error == pytest.approx(each.std().item() / math.sqrt(6), rel=1e-5)
    with pytest.raises(ValueError, match="zip"):
        divergence(p[:5], q, windows)


def test_windows_are_spread_from_the_first_token_to_the_last() -> None:
    windows = spread_windows(range(1000), 100, 4)
    ends = [(window[0], window[-1], fresh) for window, fresh in windows]
    assert ends == [(0, 99, 99), (300, 399, 99), (600, 699, 99), (900, 999, 99)]
    assert spread_windows(range(10), 10, 1) == [(list(range(10)), 9)]
    for arguments in ((10, 101), (1, 10), (10, 0)):
        with pytest.raises(UsageError):
            spread_windows(range(1000), *arguments)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_no_divergence(value: float) -> None:
    windows = [([0, 1, 2], 2)]
    sound, broken = torch.randn(2, 5).log_softmax(dim=-1), torch.full((2, 5), value)
    with pytest.raises(LlmctlError, match="the original gives"):
        divergence([broken], [sound], windows)
    with pytest.raises(LlmctlError, match="the model gives"):
        divergence([sound], [broken], windows)


def test_a_token_that_neither_model_ever_gives_is_no_divergence() -> None:
    p, q = (torch.tensor([[share, 1 - share, 0.0]]).log() for share in (0.5, 0.25))
    found = divergence([p], [q], [([0, 1], 1)])
    assert found.kl == pytest.approx(0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75))


def test_vocabularies_that_differ_do_not_compare() -> None:
    with pytest.raises(UsageError, match="vocabularies of 5 and 6"):
        divergence([torch.zeros(1, 5)], [torch.zeros(1, 6)], [([0, 1], 1)])
