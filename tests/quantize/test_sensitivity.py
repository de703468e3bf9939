from pathlib import Path

import pytest
import torch
from random_models import logits_of, random_tokens, write_model

from llmctl.checkpoint.assemble import accounted_graph
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.graph.graph import QuantScheme
from llmctl.quantize.rtn import quantize_rtn
from llmctl.quantize.sensitivity import Candidate, measure_sensitivity
from llmctl.targets.reference.layerwise import LayerWeights, LayerwisePass

THREE, EIGHT = QuantScheme(3, 32, True), QuantScheme(8, 32, True)
CANDIDATES = [
    Candidate(1, {"layers.1.down_proj.weight": THREE}),
    Candidate(0, {"layers.0.gate_proj.weight": THREE, "layers.0.up_proj.weight": THREE}),
    Candidate(0, {"layers.0.gate_proj.weight": EIGHT, "layers.0.up_proj.weight": EIGHT}),
    Candidate(2, {"lm_head.weight": THREE}),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "llama", "llama")


def test_it_is_the_kl_of_the_model_with_that_alone_rounded(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmctl.quantize.sensitivity._ROWS", 16)
    checkpoint = open_checkpoint(model)
    graph, _ = accounted_graph(checkpoint)
    tokens = random_tokens(3, 13, graph.vocab_size)
    seen: list[tuple[int, int]] = []
    calibration = LayerwisePass(graph, checkpoint, torch.tensor(tokens, dtype=torch.int32))
    found = measure_sensitivity(calibration, CANDIDATES, lambda *at: seen.append(at))
    assert seen == [(2, 5), (5, 5)]
    expected = logits_of(graph, LayerWeights(graph, checkpoint), tokens).double().log_softmax(dim=-1)
    for candidate, value in zip(CANDIDATES, found, strict=True):
        weights = LayerWeights(graph, checkpoint)
        for name, scheme in candidate.schemes.items():
            weights[name] = quantize_rtn(weights[name], scheme).dequantize()
        other = logits_of(graph, weights, tokens).double().log_softmax(dim=-1)
        assert value == pytest.approx(
            float((expected.exp() * (expected - other)).sum(dim=-1).mean()), rel=1e-3, abs=1e-7
        )
    assert found[1] > 50 * found[2] > 0
