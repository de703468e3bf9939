"""GGUF files of every architecture, tensors named by gguf-py's map, against transformers' models."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from family_models import VOCAB, FamilyModel, random_family_model
from gguf_family_files import CASES, SIZES, made, write
from runtime_stepping import paged_logits

from llmctl.checkpoint.gguf_families import ARCHITECTURES
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.errors import CheckpointError, UnsupportedModelError
from llmctl.targets.reference.weights import checkpoint_runtime


def test_every_row_has_a_case() -> None:
    assert set(CASES) == set(ARCHITECTURES)


def largest_difference(path: Path, model: FamilyModel) -> float:
    tokens = np.random.default_rng(0).integers(0, VOCAB, 40).tolist()
    runtime = checkpoint_runtime(open_checkpoint(path), num_blocks=16, block_size=4)
    (found,) = paged_logits(runtime, [tokens], lambda _step, _sequence, left: left)
    expected = model.logits(tokens)
    assert float(expected.abs().max()) > 1
    return float((expected - found).abs().max())


@pytest.mark.parametrize("row", CASES)
def test_logits_equal_transformers(row: str, tmp_path: Path) -> None:
    model = made(row)
    assert largest_difference(write(tmp_path / "m.gguf", row, model), model) < 1e-4


@pytest.mark.parametrize("row", ["qwen3moe", pytest.param("llama+experts", marks=pytest.mark.slow)])
def test_experts_of_blocks(row: str, tmp_path: Path) -> None:
    """An expert's blocks are those of its own tensor, quantized alone."""
    model, kind = made(row), gguf.GGMLQuantizationType.Q8_0
    checkpoint = open_checkpoint(write(tmp_path / "m.gguf", row, model, qtype=kind))
    experts = [name for name in checkpoint.names() if ".experts." in name]
    assert len(experts) == 4 * 4 * 3
    for name in experts:
        stored, original = checkpoint.weight(name), model.checkpoint.weight(name)
        assert isinstance(stored, QuantizedWeight)
        assert not isinstance(original, QuantizedWeight)
        alone = gguf.quants.dequantize(gguf.quants.quantize(original.float().numpy(), kind), kind)
        assert torch.equal(stored.dequantize().float(), torch.from_numpy(alone)), name


_ORIGINAL = "rope__scaling__original_context_length"
REFUSED: Mapping[str, tuple[str, dict[str, Any], type[Exception], str]] = {
    "no experts": ("qwen3moe", {"expert_count": None}, CheckpointError, r"qwen3moe\.expert_count: expected a positive"),
    "experts of a dense one": ("olmo2", {"expert_count": 4}, UnsupportedModelError, "experts of architecture olmo2"),
    "windows": (
        "olmo2",
        {"attention__sliding_window": 7},
        UnsupportedModelError,
        "sliding-window .* of architecture olmo2",
    ),
    "partial": ("granite", {"rope__dimension_count": 8}, UnsupportedModelError, "partial rotary"),
    "no original context": ("phi3", {_ORIGINAL: 1}, CheckpointError, "expected 2 or more, found 1"),
    "half of the factors": (
        "phi3",
        {"rope__dimension_count": 12},
        CheckpointError,
        "rope_factors_long.weight: expected 6",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    row, changes, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        open_checkpoint(write(tmp_path / "m.gguf", row, made(row), **changes))


def test_another_factor_of_attention_is_kept(tmp_path: Path) -> None:
    model = made("phi3")
    file = write(tmp_path / "m.gguf", "phi3", model, rope__scaling__attn_factor=1.5)
    assert open_checkpoint(file).config["rope_scaling"]["attention_factor"] == 1.5
    assert largest_difference(file, model) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("row", ["gemma2", "phi3", "qwen2moe", "qwen3moe"])
def test_transformers_reads_the_same_tensors(row: str, tmp_path: Path) -> None:
    """Of the settings its reader leaves out some: caps, windows, longrope, experts' widths."""
    from transformers import AutoModelForCausalLM

    widths = {"qwen2moe": {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632}}
    widths["qwen3moe"] = {"moe_intermediate_size": 768}
    name, settings, _ = CASES[row]
    model = random_family_model(name, {**SIZES, **settings, **widths.get(row, {})}, seed=1)
    file = write(tmp_path / "m.gguf", row, model)
    theirs = AutoModelForCausalLM.from_pretrained(str(tmp_path), gguf_file=file.name, dtype=torch.float32).eval()
    for name, tensor in theirs.state_dict().items():
        assert torch.allclose(tensor, model.model.state_dict()[name], atol=1e-6), name
