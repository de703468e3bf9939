"""W8A8: scales that make activations easy to round, and what is written of them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import CALIBRATION_TEXT, logits_of, random_tokens, write_model
from test_driver import with_value

from llmctl.checkpoint.assemble import checkpoint_graph
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.config import QuantizeConfig
from llmctl.errors import LlmctlError, UsageError
from llmctl.graph.graph import QuantScheme
from llmctl.graph.passes import apply_passes
from llmctl.quantize import driver, layers, smooth
from llmctl.quantize.driver import quantize_checkpoint
from llmctl.quantize.folding import find_fold, fold_scales
from llmctl.quantize.rtn import quantize_rtn
from llmctl.quantize.smooth import search_smoothing, w8a8_error, w8a8_rounding
from llmctl.quantize.stats import InputStats
from llmctl.targets.options import INT8_PASS
from llmctl.targets.reference.kernels import dequantize_rows, quantize_rows
from llmctl.targets.reference.weights import CheckpointWeights

SCHEME = QuantScheme(8, -1, True)


def problem(tokens: int = 200, width: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and inputs with channels that are far larger than others."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(tokens, width, generator=generator)
    inputs[:, ::16] *= 60
    return torch.randn(48, width, generator=generator) * 0.05, inputs


def direct(weight: torch.Tensor, inputs: torch.Tensor, scales: torch.Tensor) -> float:
    rounded = dequantize_rows(*quantize_rows(inputs / scales))
    found = rounded @ quantize_rtn(weight * scales, SCHEME).dequantize().T
    return float((found - inputs @ weight.T).square().sum(dim=1).mean())


def test_the_error_is_that_of_rounded_weights_and_activations() -> None:
    weight, inputs = problem()
    choice = search_smoothing([weight[:20], weight[20:]], inputs, SCHEME)
    assert choice.baseline == pytest.approx(direct(weight, inputs, torch.ones(64)), rel=1e-4)
    assert choice.error == pytest.approx(direct(weight, inputs, choice.scales), rel=1e-4)
    assert choice.error < 0.3 * choice.baseline
    assert choice.alpha is not None
    plain = quantize_rtn(weight, SCHEME).dequantize()
    expected = choice.baseline * len(inputs) / float((inputs @ weight.T).square().sum())
    assert w8a8_error(weight, plain, inputs) == pytest.approx(expected, rel=1e-4)


def related(tokens: int, width: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight with a large value in every row, and inputs that depend on one another."""
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(width // 4, width, generator=generator)
    inputs = torch.randn(tokens, width // 4, generator=generator) @ mixed
    weight = torch.randn(48, width, generator=generator)
    weight[:, 5] *= 20
    return weight, inputs + 0.3 * torch.randn(tokens, width, generator=generator)


def test_weights_make_up_for_one_another_where_tokens_are_many() -> None:
    weight, inputs = related(1200)
    seen, unseen = inputs[:600], inputs[600:]
    nearest = w8a8_error(weight, quantize_rtn(weight, SCHEME).dequantize(), unseen)
    assert w8a8_error(weight, w8a8_rounding(seen)(weight, SCHEME).dequantize(), unseen) < 0.7 * nearest


@pytest.mark.parametrize("tokens", [3, 96])
def test_few_tokens_are_rounded_to_nearest(tokens: int) -> None:
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(tokens, 256, generator=generator)  # unrelated: what GPTQ learns of them is noise
    weight = torch.randn(32, 256, generator=generator)
    nearest = quantize_rtn(weight, SCHEME)
    found = w8a8_rounding(inputs)(weight, SCHEME)
    assert torch.equal(found.codes, nearest.codes)
    assert torch.equal(found.scales, nearest.scales)


def test_the_inputs_are_rounded_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no second whole matrix of them."""
    weight, inputs = related(5000)
    whole = InputStats.of(dequantize_rows(*quantize_rows(inputs))).gram
    counts = []

    def counted(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        counts.append(len(x))
        return quantize_rows(x)

    monkeypatch.setattr(smooth, "quantize_rows", counted)
    assert torch.equal(InputStats.of(inputs, as_read=smooth._as_int8).gram, whole)
    w8a8_rounding(inputs)(weight, SCHEME)
    assert max(counts) <= 2048


def test_even_inputs_are_left_as_they_are() -> None:
    weight, _ = problem()
    inputs = torch.ones(64, 64) - 2 * torch.eye(64)  # of one size: any other scale wastes steps
    choice = search_smoothing([weight.sign()], inputs, SCHEME)
    assert choice.alpha is None
    assert torch.equal(choice.scales, torch.ones(64))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_folding_leaves_the_logits(family: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_model(tmp_path / family, family))
    graph = checkpoint_graph(checkpoint)
    weights = {name: value.double().float() for name, value in CheckpointWeights(graph, checkpoint).items()}
    tokens = random_tokens(2, 24, graph.vocab_size)
    before = logits_of(graph, weights, tokens)
    for buffer in dict.fromkeys(op.inputs[0] for op in graph.linears() if op.layer == 0):
        point = find_fold(graph, buffer)
        assert point is not None
        _, inputs = problem(width=graph.buffers[buffer].width)
        read = [weights[op.weights[0]] for op in point.linears]
        choice = search_smoothing(read, inputs, SCHEME, point.column_index())
        assert choice.alpha is not None
        fold_scales(point, choice.scales, weights)
    assert torch.allclose(logits_of(graph, weights, tokens), before, atol=1e-5 * float(before.abs().max()))


@pytest.fixture
def config(tmp_path: Path) -> QuantizeConfig:
    text = tmp_path / "text.txt"
    text.write_text(CALIBRATION_TEXT)
    model = write_model(tmp_path / "model", "llama")
    settings = QuantizeConfig(model=str(model), output=str(tmp_path / "out"), method="w8a8", calib=str(text))
    return replace(settings, calib_samples=8, calib_length=48)


def logits(folder: Path, passes: tuple[str, ...] = ()) -> torch.Tensor:
    checkpoint = open_checkpoint(folder)
    graph = apply_passes(checkpoint_graph(checkpoint), passes)
    weights = CheckpointWeights(graph, checkpoint)
    return logits_of(graph, weights, random_tokens(2, 32, graph.vocab_size)).log_softmax(dim=-1)


def test_what_is_written_is_read_as_w8a8(config: QuantizeConfig) -> None:
    report = quantize_checkpoint(config)
    assert report.format == "compressed-tensors-w8a8"
    made = open_checkpoint(Path(config.output))
    assert made.quantization is not None
    weight = made.weight("model.layers.1.mlp.down_proj.weight")
    assert isinstance(weight, QuantizedWeight)
    assert weight.scheme == SCHEME
    assert all(0 < error < 1e-3 for layer in report.layers for error in layer.modules.values())
    assert any(alpha is not None for layer in report.layers for alpha in layer.scales.values())
    rounded = quantize_checkpoint(
        replace(config, method="rtn", bits=8, group_size=-1, format=report.format, output=config.output + "-rtn")
    )
    original = logits(Path(config.model))
    smooth, plain = (logits(Path(r.output), (INT8_PASS,)) for r in (report, rounded))
    kls = [float((original.exp() * (original - found)).sum(dim=-1).mean()) for found in (smooth, plain)]
    assert kls[0] < 0.8 * kls[1]


@pytest.mark.parametrize(
    "changes", [{"bits": 4}, {"group_size": 64}, {"symmetric": False}, {"format": "gptq"}], ids=str
)
def test_what_it_has_no_choice_of_is_refused(changes: dict[str, object], config: QuantizeConfig) -> None:
    with pytest.raises(UsageError, match="--method w8a8"):
        quantize_checkpoint(replace(config, **changes))  # type: ignore[arg-type]


def test_no_gram_matrix_of_unrounded_inputs(config: QuantizeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(layers.InputStats, "of")
    monkeypatch.setattr(layers, "w8a8_rounding", lambda _: quantize_rtn)
    quantize_checkpoint(config)


@pytest.mark.parametrize("value", [1e37, 1e22])  # infinite inputs, and those whose squares are
def test_inputs_that_overflow_are_named(value: float, config: QuantizeConfig, tmp_path: Path) -> None:
    folder = with_value(Path(config.model), tmp_path / "bad", "model.layers.1.mlp.up_proj.weight", value)
    with pytest.raises(LlmctlError, match=r"layer 1: the inputs of layers\.1\.down_proj are not finite"):
        quantize_checkpoint(replace(config, model=str(folder), ignore=("up_proj",)))


def test_resume_gives_the_same_bytes(config: QuantizeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = quantize_checkpoint(replace(config, output=config.output + "-whole"))
    step = driver._Job._step

    def fail_at_one(job: driver._Job, calibration: Any, layer: int, *rest: Any, **named: Any) -> Any:
        if layer == 1:
            raise KeyboardInterrupt
        return step(job, calibration, layer, *rest, **named)

    monkeypatch.setattr(driver._Job, "_step", fail_at_one)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(config)
    monkeypatch.undo()
    quantize_checkpoint(replace(config, resume=True))
    for path in Path(whole.output).iterdir():
        assert (Path(config.output) / path.name).read_bytes() == path.read_bytes()
