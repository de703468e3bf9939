"""``--device``: every tensor that quantizing makes is where the weights are, and a device that is not here is refused.

Tensors made without a word about where go to torch's default device. Here that is ``meta``, which holds no numbers: one
that was forgotten meets the others' and fails, or leaves nothing to compare.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from random_models import write_model

from llmctl.checkpoint.assemble import checkpoint_graph
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.config import QuantizeConfig
from llmctl.errors import UsageError
from llmctl.graph.experts import apart
from llmctl.quantize.driver import quantize_checkpoint
from llmctl.quantize.layers import quantize_layer, quantize_layer_without_data
from llmctl.quantize.plan import make_plan
from llmctl.quantize.sensitivity import Candidate, measure_sensitivity
from llmctl.quantize.workfolder import LayerResult
from llmctl.targets.reference.layerwise import LayerwisePass

TOKENS = torch.randint(0, 90, (6, 40), generator=torch.Generator().manual_seed(0), dtype=torch.int32)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {family: write_model(folder / family, family) for family in ("llama", "qwen3_moe")}


def first_layer(config: QuantizeConfig) -> LayerResult:
    checkpoint = open_checkpoint(Path(config.model))
    graph = apart(checkpoint_graph(checkpoint))
    plan = make_plan(config, checkpoint, graph)
    calibration = LayerwisePass(graph, checkpoint, TOKENS, "cpu")
    if not plan.calibrated:
        return quantize_layer_without_data(graph, plan, calibration, 0)
    return quantize_layer(graph, plan, calibration, 0, calibration.enter(), last=False)[0]


@pytest.mark.parametrize(
    ("family", "method", "changes"),
    [
        ("llama", "rtn", {}),
        ("llama", "awq", {}),
        ("llama", "gptq", {}),
        ("llama", "gptq", {"static_groups": False, "symmetric": False}),
        ("llama", "awq+gptq", {}),
        ("llama", "w8a8", {}),
        ("llama", "fp8", {}),
        ("llama", "nf4", {}),
        ("qwen3_moe", "awq+gptq", {}),
    ],
)
def test_nothing_is_made_on_the_default_device(
    family: str, method: str, changes: dict[str, object], models: dict[str, Path], tmp_path: Path
) -> None:
    config = QuantizeConfig(model=str(models[family]), output=str(tmp_path / "out"), method=method, calib="self")
    config = replace(config, group_size=None if method in ("w8a8", "fp8") else 32, calib_samples=6, calib_length=40)
    config = replace(config, **changes)  # type: ignore[arg-type]
    if family == "qwen3_moe":
        config = replace(config, group_size=16)
    expected = first_layer(config)
    torch.set_default_device("meta")
    try:
        found = first_layer(config)
    finally:
        torch.set_default_device(None)
    assert found.report["modules"] == expected.report["modules"]
    assert found.quantized.keys() == expected.quantized.keys()
    for name, weight in expected.quantized.items():
        assert torch.equal(found.quantized[name].codes, weight.codes)
        assert torch.equal(found.quantized[name].scales, weight.scales)
        assert torch.equal(found.quantized[name].zeros, weight.zeros)
    for name, value in expected.dense.items():
        assert torch.equal(found.dense[name], value)


def test_sensitivity_makes_nothing_there_either(models: dict[str, Path], tmp_path: Path) -> None:
    config = QuantizeConfig(model=str(models["llama"]), output=str(tmp_path / "out"), method="rtn", group_size=32)
    checkpoint = open_checkpoint(models["llama"])
    graph = checkpoint_graph(checkpoint)
    schemes = make_plan(config, checkpoint, graph).schemes
    name = next(iter(schemes))
    candidates = [Candidate(0, {name: schemes[name]})]
    expected = measure_sensitivity(LayerwisePass(graph, checkpoint, TOKENS), candidates)
    torch.set_default_device("meta")
    try:
        found = measure_sensitivity(LayerwisePass(graph, checkpoint, TOKENS, "cpu"), candidates)
    finally:
        torch.set_default_device(None)
    assert found == expected
    assert expected[0] > 0


@pytest.mark.parametrize(
    ("device", "said"),
    [
        *[("tpu", "expected cpu, cuda or cuda:N"), ("cpu:1", "expected cpu"), ("cuda", "torch finds no GPU")],
        *[(device, "expected cpu, cuda or cuda:N") for device in ("cpu:", "cuda:", "cuda:01")],
    ],
)
def test_a_device_that_is_not_here_is_refused(
    device: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match=f"--device {device}: {said}"):
        quantize_checkpoint(QuantizeConfig(model="nowhere", output=str(tmp_path / "out"), device=device))


def test_a_gpu_beyond_those_here_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match="--device cuda:1: torch finds 1, counted from 0"):
        quantize_checkpoint(QuantizeConfig(model="nowhere", output=str(tmp_path / "out"), device="cuda:1"))
