"""Rotations: the model computes what it did, and its channels are others."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from random_models import CALIBRATION_TEXT, logits_of, random_tokens, write_model

from llmctl.checkpoint.assemble import checkpoint_graph
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.checkpoint.reader import Checkpoint
from llmctl.checkpoint.safetensors_io import tensor_spec, write_safetensors
from llmctl.config import QuantizeConfig
from llmctl.errors import UnsupportedModelError
from llmctl.quantize.driver import Silent, quantize_checkpoint
from llmctl.quantize.methods import unused_options
from llmctl.quantize.rotation import rotate
from llmctl.targets.reference.weights import CheckpointWeights


class Notes(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def logits(checkpoint: Checkpoint) -> torch.Tensor:
    graph = checkpoint_graph(checkpoint)
    return logits_of(graph, CheckpointWeights(graph, checkpoint), random_tokens(2, 24, graph.vocab_size))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16}),
        ("qwen2", {}),  # tied, with biases
        ("llama", {"model_type": "gemma", "architectures": ["GemmaForCausalLM"], "head_dim": 16}),  # norms are 1 + w
        pytest.param("qwen3", {}, marks=pytest.mark.slow),
        pytest.param("phi3", {}, marks=pytest.mark.slow),  # q, k and v are one tensor
        pytest.param("granite", {}, marks=pytest.mark.slow),
        pytest.param("llama", {"tie_word_embeddings": True, "attention_bias": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_model_computes_what_it_did(family: str, changes: dict[str, object], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_model(tmp_path / family, family, **changes))
    before = logits(checkpoint)
    turned = rotate(checkpoint, seed=3)
    assert torch.allclose(logits(turned), before, atol=1e-5 * float(before.abs().max()))
    for name in turned.names():
        weight = turned.weight(name)
        assert isinstance(weight, torch.Tensor)
        if "norm" in name:
            gone = torch.full_like(weight, 0.0 if changes.get("model_type") == "gemma" else 1.0)
            assert torch.equal(weight, gone) or "q_norm" in name or "k_norm" in name
        elif not any(part in name for part in ("q_proj.bias", "k_proj.bias")):
            before_it = checkpoint.weight(name if checkpoint.has(name) else "model.embed_tokens.weight")
            assert not torch.allclose(weight, before_it, rtol=0.05)


def test_seeds_and_heads(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_model(tmp_path / "model", "llama"))
    name = "model.layers.0.self_attn.o_proj.weight"
    one, same, other = (rotate(checkpoint, seed).weight(name) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)
    # The stream's turn leaves the norm of each column, the heads' that of all columns of a head.
    before, after = (weight.square().sum(dim=0).view(-1, 16) for weight in (checkpoint.weight(name), one))
    assert not torch.allclose(after, before, rtol=0.05)
    torch.testing.assert_close(after.sum(dim=1), before.sum(dim=1))


def test_the_dtype_stays_where_only_the_tensors_say_it(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "llama", dtype=None)
    source = open_checkpoint(folder)
    tensors = {name: source.weight(name).bfloat16() for name in source.names()}
    write_safetensors(folder / "model.safetensors", {name: tensor_spec(value) for name, value in tensors.items()})
    checkpoint = open_checkpoint(folder)
    assert rotate(checkpoint, seed=0).dtype == checkpoint.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("gpt2", {}, r"'pos_embed' \(pos_embed\) reads the residual stream"),
        ("phi", {}, r"'layers.0.attn_norm' \(layer_norm\) reads the residual stream"),
        ("gemma2", {}, r"'layers.0.attn_out_norm' \(rms_norm\) writes the residual stream"),
        ("qwen3_moe", {}, r"'layers.0.experts.gate_proj' \(grouped_linear\) reads a norm of the residual stream"),
        ("llama", {"hidden_size": 56, "head_dim": 14}, "no Hadamard matrix of order 14 "),
    ],
    ids=str,
)
def test_what_a_rotation_does_not_pass_is_named(
    family: str, changes: dict[str, object], said: str, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(write_model(tmp_path / family, family, **changes))
    with pytest.raises(UnsupportedModelError, match=said):
        rotate(checkpoint, seed=0)


@pytest.mark.parametrize(
    ("family", "format"),
    [("qwen2", "gptq"), pytest.param("llama", "gptq", marks=pytest.mark.slow), ("llama", "gguf")],
)
def test_a_rotated_model_is_written(family: str, format: str, tmp_path: Path) -> None:
    model, text = write_model(tmp_path / "model", family), tmp_path / "text.txt"
    text.write_text(CALIBRATION_TEXT)
    output = tmp_path / ("out.gguf" if format == "gguf" else "out")
    config = QuantizeConfig(model=str(model), output=str(output), calib=str(text), calib_samples=8, format=format)
    config = replace(config, calib_length=48, method="gptq", bits=8, group_size=32, rotate=True)
    said = Notes()
    report = quantize_checkpoint(config, said)
    assert "rotated: the residual stream (64) and the values of heads (16)" in said.lines
    assert any("no longer shares the embeddings: 0.0 MiB more" in line for line in said.lines) == (family == "qwen2")
    made = open_checkpoint(output)
    assert made.config["tie_word_embeddings"] is False
    assert made.has("lm_head.weight")
    p, q = (logits(checkpoint).log_softmax(dim=-1) for checkpoint in (open_checkpoint(model), made))
    assert float((p.exp() * (p - q)).sum(dim=-1).mean()) < 2e-3
    assert report.rotated
    sizes = {part: size.size_16bit for part, size in report.parts.items()}
    assert sum(sizes.values()) == report.size_16bit
    assert (sizes["head"] == 0) == (family == "qwen2")
    norm = made.weight("model.layers.0.input_layernorm.weight")
    assert isinstance(norm, torch.Tensor)
    assert torch.equal(norm, torch.ones_like(norm))
    assert report.size_16bit == 2 * sum(
        torch.tensor(w.shape).prod() for w in checkpoint_graph(open_checkpoint(model)).weights.values()
    )


def test_a_seed_is_of_use_to_a_rotation() -> None:
    config = QuantizeConfig(method="rtn")
    assert "seed" in unused_options(config)
    assert "seed" not in unused_options(replace(config, rotate=True))
