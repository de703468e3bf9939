import hashlib
import importlib.util
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from random_models import logits_of, write_model

from llmctl.checkpoint.assemble import checkpoint_graph
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.errors import UsageError
from llmctl.evaluate.perplexity import Protocol, measure_perplexity
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
    result = measure_perplexity(open_checkpoint(model), TEXT, Protocol(40, 20, 90))
    total, count = 0.0, 0
    for start, end, first in ((0, 40, 1), (20, 60, 40), (40, 80, 60), (60, 90, 80)):
        scores = logprobs(model, tokens[start:end])
        for i in range(first, end):
            total -= scores[i - start - 1, tokens[i]].item()
            count += 1
    assert result.scored_tokens == count == 89
    assert result.perplexity == pytest.approx(math.exp(total / count), rel=1e-4)
    assert (result.context, result.stride, result.tokens) == (40, 20, 90)
    assert result.tokenizer_sha256 == hashlib.sha256((model / "tokenizer.json").read_bytes()).hexdigest()


def test_a_context_beyond_the_models_is_refused(model: Path) -> None:
    with pytest.raises(UsageError, match="longest is 128"):
        measure_perplexity(open_checkpoint(model), TEXT, Protocol(256, 256))


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "quantize_quality.py"
    spec = importlib.util.spec_from_file_location("quantize_quality", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_knows_the_right_order(script: ModuleType) -> None:
    good = {"fp": 10.0, "awq": 11.0, "gptq": 10.0, "rtn": 12.0}
    assert script.violations(good) == []
    assert script.violations({"fp": 10.0, "rtn": 9.0}) == []
    assert len(script.violations({**good, "awq": 12.0})) == 1
    assert len(script.violations({**good, "gptq": 9.9})) == 1


def test_the_script_runs(
    script: ModuleType,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    options = (
        f"--text {text} --model {model} --methods rtn --group-size 32 --context 64 --max-tokens 128 --kl-tokens 64"
    )
    monkeypatch.setattr("sys.argv", ["quantize_quality.py", *options.split()])
    assert script.main() == 0
    out = capsys.readouterr().out
    assert "context 64, stride 64" in out
    assert "rtn" in out
    monkeypatch.setattr("sys.argv", ["quantize_quality.py", *options.replace("rtn", "magic").split()])
    assert script.main() == 2
    monkeypatch.setattr("sys.argv", ["quantize_quality.py", *options.replace("text.txt", "none.txt").split()])
    assert script.main() == 2
    assert "none.txt" in capsys.readouterr().err
