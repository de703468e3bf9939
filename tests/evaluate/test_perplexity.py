import math
from pathlib import Path

import pytest
import torch
from random_models import logits_of, write_model
from scored_texts import perplexity

from llmctl.checkpoint.assemble import checkpoint_graph
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.errors import UsageError
from llmctl.evaluate.perplexity import Protocol
from llmctl.targets.reference.weights import CheckpointWeights
from llmctl.text.tokenizer import Tokenizer

TEXT = "the quick brown fox reads a book and the answer is that every question has an answer of its own. " * 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "llama", "llama")


def logprobs(folder: Path, tokens: list[int]) -> torch.Tensor:
    checkpoint = open_checkpoint(folder)
    graph = checkpoint_graph(checkpoint)
    return logits_of(graph, CheckpointWeights(graph, checkpoint), [tokens]).double().log_softmax(dim=-1)


def ids_of(folder: Path, count: int) -> list[int]:
    return Tokenizer.from_folder(folder).encode(TEXT, add_special_tokens=False)[:count]


def test_windows_score_every_token_once() -> None:
    tokens = list(range(100))
    for context, stride in ((16, 16), (16, 8), (16, 1), (100, 100), (200, 50), (7, 3)):
        windows = Protocol(context, stride).windows(tokens)
        scored = [token for window, fresh in windows for token in window[-fresh:]]
        assert all(fresh < len(window) <= context for window, fresh in windows)
        starts = {0} if stride < context else set(range(0, 100, context))
        assert scored == [t for t in tokens if t not in starts]


@pytest.mark.parametrize("changes", [{"stride": 0}, {"stride": 20}, {"context": 1, "stride": 1}])
def test_windows_that_make_no_sense(changes: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        Protocol(**{"context": 16, "stride": 8, **changes}).windows([1, 2, 3])
    with pytest.raises(UsageError):
        Protocol(16, 8).windows([1])


def test_perplexity_is_what_the_logits_say(model: Path) -> None:
    tokens = ids_of(model, 90)
    found = perplexity(open_checkpoint(model), TEXT, Protocol(40, 20, 90))
    total, count = 0.0, 0
    for start, end, first in ((0, 40, 1), (20, 60, 40), (40, 80, 60), (60, 90, 80)):
        scores = logprobs(model, tokens[start:end])
        for i in range(first, end):
            total -= scores[i - start - 1, tokens[i]].item()
            count += 1
    assert count == 89
    assert found == pytest.approx(math.exp(total / count), rel=1e-4)


def test_a_context_beyond_the_models_is_refused(model: Path) -> None:
    with pytest.raises(UsageError, match="longest is 128"):
        perplexity(open_checkpoint(model), TEXT, Protocol(256, 256))
