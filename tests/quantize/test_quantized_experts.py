"""Every expert is a linear of its own to the quantizers; what they write is read as one weight a projection again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from random_models import CALIBRATION_TEXT, CONFIGS, logits_of, random_tensors, random_tokens, write_model

from llmctl.checkpoint.assemble import assemble, checkpoint_graph
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.config import QuantizeConfig
from llmctl.errors import UsageError
from llmctl.graph.experts import apart, expert_layer
from llmctl.graph.families import build_graph
from llmctl.graph.graph import Graph
from llmctl.quantize.driver import Silent, quantize_checkpoint
from llmctl.quantize.folding import find_fold, fold_scales
from llmctl.quantize.report import QuantizeReport
from llmctl.quantize.rtn import quantize_searched
from llmctl.targets.reference.layerwise import LayerwisePass

EXPERTS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "qwen3_moe", "qwen3_moe")


@pytest.fixture
def config(model: Path, tmp_path: Path) -> QuantizeConfig:
    text = tmp_path / "calib.txt"
    text.write_text(CALIBRATION_TEXT)
    return QuantizeConfig(
        model=str(model), output=str(tmp_path / "out"), group_size=16, calib=str(text), calib_samples=8,
        calib_length=48,
    )  # fmt: skip


class Source:
    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.weight = tensors.__getitem__


def a_graph() -> tuple[Graph, Source]:
    plain = build_graph({**CONFIGS["qwen3_moe"], "vocab_size": 97})
    return apart(plain), Source(random_tensors(plain))


def test_each_expert_has_scales_of_its_own() -> None:
    graph, source = a_graph()
    weights = {name: assemble(weight, source) for name, weight in graph.weights.items()}
    tokens = random_tokens(2, 24, 97)
    before, folded = logits_of(graph, weights, tokens), dict(weights)
    points = [find_fold(graph, "layers.0.mlp_norm")]
    points += [find_fold(expert_layer(graph, 0, e), "layers.0.experts.gate_mul") for e in range(EXPERTS)]
    assert find_fold(graph, "layers.0.experts.gate_mul") is None
    for point in points:
        assert point is not None
        width = folded[point.linears[0].weights[0]].shape[1]
        changed = fold_scales(point, torch.exp(torch.randn(width)), folded)
    assert changed == {"layers.0.experts.up_proj.5.weight", "layers.0.experts.down_proj.5.weight"}
    assert [len(point.linears) for point in points if point] == [1 + 2 * EXPERTS] + [1] * EXPERTS  # the router, too
    assert torch.allclose(logits_of(graph, folded, tokens), before, atol=1e-4 * before.abs().max())


def test_an_expert_is_calibrated_on_the_rows_that_choose_it() -> None:
    graph, source = a_graph()
    run = LayerwisePass(graph, source, torch.tensor(random_tokens(3, 900, 97)))  # in two chunks
    chosen = [name for name in graph.weights if ".experts." in name]
    stages = run.stages(0, chosen)
    assert len(stages) == 2 * EXPERTS
    seen: dict[str, torch.Tensor] = {}
    run.run(0, run.enter(), stages, lambda stage, x: seen.setdefault(stage.name, x.clone()), outputs=False)
    gate, up = (f"layers.0.experts.{role}_proj" for role in ("gate", "up"))
    for expert in range(EXPERTS):
        x, h = seen[f"layers.0.mlp_norm[{expert}]"], seen[f"layers.0.experts.gate_mul[{expert}]"]
        made = torch.nn.functional.silu(x @ run.weights[f"{gate}.{expert}.weight"].T)
        made = made * (x @ run.weights[f"{up}.{expert}.weight"].T)
        torch.testing.assert_close(h, made, atol=1e-5, rtol=1e-4)
    assert sum(len(x) for name, x in seen.items() if "mlp_norm" in name) == 2 * 3 * 900


def quantized(config: QuantizeConfig) -> tuple[QuantizeReport, list[str]]:
    notes: list[str] = []

    class Noted(Silent):
        def note(self, text: str) -> None:
            notes.append(text)

    return quantize_checkpoint(config, Noted()), notes


@pytest.mark.parametrize(
    ("method", "format"),
    [
        ("awq", "awq"),
        pytest.param("gptq", "gptq", marks=pytest.mark.slow),
        pytest.param("rtn", "compressed-tensors", marks=pytest.mark.slow),
        pytest.param("fp8", "auto", marks=pytest.mark.slow),
    ],
)
def test_what_is_written_is_read_as_one_weight_a_projection(method: str, format: str, config: QuantizeConfig) -> None:
    size = None if method == "fp8" else config.group_size
    report, _ = quantized(replace(config, method=method, format=format, group_size=size))
    assert report.quantized_modules == 2 * (4 + 3 * EXPERTS)
    assert "model.layers.1.mlp.experts.5.down_proj" in report.linears
    assert set(report.dense_modules) == {"lm_head", *(f"model.layers.{i}.mlp.gate" for i in range(2))}
    made = open_checkpoint(Path(config.output))
    graph = checkpoint_graph(made)
    assert graph.weights["layers.0.router.weight"].quant is None
    for role, shape in (("gate", (48, 64)), ("up", (48, 64)), ("down", (64, 48))):
        weight = graph.weights[f"layers.1.experts.{role}_proj.weight"]
        assert weight.quant is not None
        found = assemble(weight, made)
        assert isinstance(found, QuantizedWeight)
        assert found.shape == (EXPERTS * shape[0], shape[1])
        one = made.weight(f"model.layers.1.mlp.experts.3.{role}_proj.weight")
        assert torch.equal(found.dequantize()[3 * shape[0] : 4 * shape[0]], one.dequantize())


def test_experts_that_calibration_hardly_reached_are_rounded_and_named(config: QuantizeConfig, model: Path) -> None:
    report, notes = quantized(replace(config, method="gptq", calib_samples=1, calib_length=48))
    few = report.layers[0].few_tokens
    assert few
    assert max(few.values()) < 32
    name = min(few, key=lambda linear: (few[linear], linear))
    _, role, expert = name.rsplit(".", 2)
    tensor = f"model.layers.0.mlp.experts.{expert}.{role}.weight"
    source, made = open_checkpoint(model), open_checkpoint(Path(config.output))
    found = made.weight(tensor)
    assert isinstance(found, QuantizedWeight)
    expected = quantize_searched(source.weight(tensor), replace(found.scheme, act_order=False))
    assert torch.equal(found.dequantize(), expected.dequantize())
    words = f"layer 0: {len(few)} of {len(report.layers[0].modules)} linears are of experts that saw too few tokens"
    assert any(note.startswith(words) and f"(fewest: {min(few.values())}, " in note for note in notes)


@pytest.mark.parametrize(
    "changes",
    [
        {"override": ("experts.3.up_proj:bits=8",)},
        {"override": ("layers.1.mlp.experts.0:bits=16",)},
        {"ignore": ("lm_head", "experts.2")},
    ],
    ids=str,
)
def test_experts_that_would_differ_are_refused(changes: dict[str, tuple[str, ...]], config: QuantizeConfig) -> None:
    with pytest.raises(UsageError, match="the experts of a layer are read where they are alike"):
        quantized(replace(config, method="rtn", **changes))


def test_experts_with_act_order_groups_which_nothing_reads_are_refused(config: QuantizeConfig) -> None:
    with pytest.raises(UsageError, match="would have act-order groups, which are not read") as caught:
        quantized(replace(config, method="gptq", act_order=True, static_groups=False))
    assert caught.value.fix == "add --static-groups or --no-act-order"
    assert not Path(config.output).exists()


@pytest.mark.slow
def test_bits_of_experts_are_chosen_together(config: QuantizeConfig) -> None:
    report, _ = quantized(replace(config, method="rtn", target_bpw=7.0))
    found = {
        (name.partition(".mlp.")[0], name.rpartition(".")[2], linear.bits)
        for name, linear in report.linears.items()
        if ".experts." in name
    }
    assert len(found) == 2 * 3
    checkpoint_graph(open_checkpoint(Path(config.output)))
