"""The calibration pass: what each stage sees, when it ends, and that changed weights are used at once."""

from __future__ import annotations

import pytest
import torch
from random_models import CONFIGS, random_tensors, random_tokens

from llmctl.graph.families import build_graph
from llmctl.targets.reference.layerwise import LayerwisePass, Stage

SAMPLES, LENGTH, VOCAB = 3, 12, 97


class Source:
    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.asked: list[str] = []

    def weight(self, name: str) -> torch.Tensor:
        self.asked.append(name)
        return self.tensors[name]


@pytest.fixture
def source() -> Source:
    return Source(random_tensors(build_graph({**CONFIGS["llama"], "vocab_size": VOCAB})))


@pytest.fixture
def calibration(source: Source) -> LayerwisePass:
    graph = build_graph({**CONFIGS["llama"], "vocab_size": VOCAB})
    return LayerwisePass(graph, source, torch.tensor(random_tokens(SAMPLES, LENGTH, VOCAB)))


def linears(calibration: LayerwisePass, layer: int) -> list[str]:
    return [op.weights[0] for op in calibration.graph.layer_ops(layer) if op.kind == "linear"]


def test_stages_come_in_order_with_the_rows_of_all_tokens(calibration: LayerwisePass) -> None:
    hidden = calibration.enter()
    for layer in range(calibration.graph.num_layers + 1):
        stages = calibration.stages(layer, linears(calibration, layer))
        seen: list[tuple[Stage, torch.Size]] = []
        left = calibration.run(
            layer, hidden, stages, lambda stage, x, seen=seen: seen.append((stage, x.shape)), outputs=False
        )
        assert left == {}
        assert [stage for stage, _ in seen] == stages
        widths = [calibration.graph.buffers[stage.buffer].width for stage in stages]
        assert [shape for _, shape in seen] == [(SAMPLES * LENGTH, width) for width in widths]
        hidden = calibration.run(layer, hidden)
    assert hidden == {}


def test_a_run_without_outputs_ends_at_its_last_stage(calibration: LayerwisePass, source: Source) -> None:
    (first, *_) = calibration.stages(0, linears(calibration, 0))
    hidden = calibration.enter()

    def forget(_: Stage, __: torch.Tensor) -> None:
        for name in linears(calibration, 0):
            del calibration.weights[name]
        source.asked.clear()

    calibration.run(0, hidden, [first], forget, outputs=False)
    assert not source.asked
    calibration.run(0, hidden, [first], forget)
    asked = [name for name in source.asked if "norm" not in name]  # norms after the first stage are read when needed
    assert len(asked) == len(linears(calibration, 0))
    assert calibration.run(0, {**hidden, **calibration.run(0, hidden)}, [first], outputs=False) == {}


def test_a_weight_that_a_stage_changes_is_used_at_once(calibration: LayerwisePass) -> None:
    graph, hidden = calibration.graph, calibration.enter()
    stages = calibration.stages(0, linears(calibration, 0))
    inputs: dict[str, torch.Tensor] = {}

    def double(stage: Stage, x: torch.Tensor) -> None:
        inputs[stage.buffer] = x.clone()
        if stage is stages[0]:
            for op in stage.linears:
                calibration.weights[op.weights[0]] = calibration.weights[op.weights[0]] * 2

    changed = calibration.run(0, hidden, stages, double)
    again = calibration.run(0, hidden, stages, lambda stage, x: inputs.update({f"{stage.buffer} again": x.clone()}))
    after_attention = stages[1].buffer
    assert graph.producer(after_attention).kind == "attention"  # type: ignore[union-attr]
    assert torch.equal(inputs[after_attention], inputs[f"{after_attention} again"])
    assert all(torch.equal(changed[name], again[name]) for name in changed)


@pytest.mark.parametrize("family", ["llama", "phi", "gpt2"])
@pytest.mark.parametrize("tokens", [1, 2 * LENGTH])
def test_chunks_of_sequences_give_what_all_at_once_give(
    family: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = build_graph({**CONFIGS[family], "vocab_size": VOCAB})
    source, sequences = Source(random_tensors(graph)), random_tokens(SAMPLES, LENGTH, VOCAB)
    sequences[1] = sequences[1][:5]

    def run() -> list[torch.Tensor]:
        calibration = LayerwisePass(graph, source, sequences)
        hidden, seen = calibration.enter(), []

        def double(stage: Stage, x: torch.Tensor) -> None:
            seen.append(x.clone())
            for op in stage.linears:
                calibration.weights[op.weights[0]] = calibration.weights[op.weights[0]] * 2

        for layer in range(graph.num_layers):
            hidden = calibration.run(layer, hidden, calibration.stages(layer, linears(calibration, layer)), double)
            seen += [hidden[name] for name in sorted(hidden)]
        return [*seen, calibration.logits({name: value[::3] for name, value in hidden.items()})]

    whole = run()
    monkeypatch.setattr("llmctl.targets.reference.layerwise._CHUNK_TOKENS", tokens)
    for one, other in zip(run(), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
