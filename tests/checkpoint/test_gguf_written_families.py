"""Models of every GGUF architecture as we write them: tensors where llama.cpp's converter has them, read back as they
were."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from checkpoint_samples import random_weight
from family_models import VOCAB, random_family_model
from gguf_family_files import CASES, SIZES, converted, made
from gguf_files import small_tokenizer, tokenizer_keys
from runtime_stepping import paged_logits

from llmctl.checkpoint.assemble import accounted_graph
from llmctl.checkpoint.convert import convert_checkpoint
from llmctl.checkpoint.gguf_families import ARCHITECTURES
from llmctl.checkpoint.gguf_metadata import check_same_model, model_metadata
from llmctl.checkpoint.gguf_tokenizer import synthesise_aux_files
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.checkpoint.output_format import AS_STORED, OutputFormat
from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.checkpoint.reader import Checkpoint
from llmctl.checkpoint.writer import write_quantized_checkpoint
from llmctl.config import ConvertConfig
from llmctl.errors import UsageError
from llmctl.graph.graph import QuantScheme
from llmctl.targets.reference.weights import checkpoint_runtime

# The other rows have every table of names, permuted rows and biases, norms + 1, keys of experts, windows and scales.
_COVERED = ("llama", "qwen2", "qwen3", "qwen3moe", "gemma2", "olmoe")
each_row = pytest.mark.parametrize(
    "row", [pytest.param(row, marks=[pytest.mark.slow] * (row in _COVERED)) for row in CASES]
)
FOUR = QuantScheme(4, 32, True)
Weights = dict[str, QuantizedWeight]


def with_tokenizer(checkpoint: Checkpoint) -> Checkpoint:
    for name, content in synthesise_aux_files(tokenizer_keys(small_tokenizer(VOCAB)), "a test").items():
        (checkpoint.path / name).write_bytes(content)
    return open_checkpoint(checkpoint.path)


def written(path: Path, source: Checkpoint, weights: Weights, *ignored: str) -> Checkpoint:
    settings = OutputFormat("gguf", FOUR, ignored=ignored, dtype=AS_STORED)
    return open_checkpoint(write_quantized_checkpoint(path, source, weights, {}, settings))


def quantized(source: Checkpoint) -> Weights:
    """Every linear that blocks of 32 columns divide, but for what chooses experts."""
    found = {}
    for seed, name in enumerate(source.names()):
        shape = source.describe(name).shape
        if "layers" in name and len(shape) == 2 and shape[1] % 32 == 0 and "gate." not in name and "router" not in name:
            found[name.removesuffix(".weight")] = random_weight(*shape, symmetric=True, seed=seed)
    return found


@each_row
def test_a_model_is_written_as_the_converter_does(row: str, tmp_path: Path) -> None:
    model = made(row)
    source = with_tokenizer(model.checkpoint)
    back = written(tmp_path / "m.gguf", source, {})
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    expected = converted(row, model)
    assert stored.keys() == expected.keys()
    for name, array in stored.items():
        assert np.array_equal(array.reshape(expected[name].shape), expected[name]), name
    tokens = np.random.default_rng(0).integers(0, VOCAB, 40).tolist()
    runtime = checkpoint_runtime(back, num_blocks=16, block_size=4)
    (found,) = paged_logits(runtime, [tokens], lambda _step, _sequence, left: left)
    assert float((model.logits(tokens) - found).abs().max()) < 1e-4


@each_row
def test_quantized_linears_are_read_back(row: str, tmp_path: Path) -> None:
    source = with_tokenizer(made(row).checkpoint)
    weights = quantized(source)
    assert len(weights) >= 4 * 4
    back = written(tmp_path / "m.gguf", source, weights)
    accounted_graph(back)
    assert set(back.names()) == set(source.names())
    one = float(ARCHITECTURES[row].norm_plus_one)
    for name in source.names():
        found, before = back.weight(name), weights.get(name.removesuffix(".weight"))
        if before is not None:
            assert isinstance(found, QuantizedWeight)
            assert torch.equal(found.codes, before.codes), name
            assert torch.equal(found.dequantize(), before.dequantize()), name
            continue
        plain = source.weight(name)
        assert isinstance(found, torch.Tensor)
        assert isinstance(plain, torch.Tensor)
        shift = one if name.endswith("norm.weight") else 0.0
        assert torch.equal(found.float() + shift, plain.float() + shift), name


def test_norms_are_compared_as_they_are_multiplied_by(tmp_path: Path) -> None:
    """1 + w - 1 is not w, and 1 + w is what is computed with."""
    source = with_tokenizer(made("gemma3").checkpoint)
    settings = OutputFormat("gptq", FOUR, dtype=AS_STORED)
    folder = write_quantized_checkpoint(tmp_path / "gptq", source, quantized(source), {}, settings)
    report = convert_checkpoint(ConvertConfig(str(folder), "gguf", str(tmp_path / "m.gguf")))
    assert report.compared == len(source.names())
    norm = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(open_checkpoint(tmp_path / "m.gguf").weight(norm), source.weight(norm))  # type: ignore[arg-type]


def test_experts_that_are_not_alike_are_refused(tmp_path: Path) -> None:
    source = with_tokenizer(made("qwen3moe").checkpoint)
    odd = "model.layers.1.mlp.experts.2.up_proj"
    weights = quantized(source)
    del weights[odd]
    with pytest.raises(ValueError, match=rf"are one tensor in GGUF: '.*experts.0.up_proj.*Q4_0.*'{odd}.weight' F32"):
        written(tmp_path / "m.gguf", source, weights, odd)
    assert not (tmp_path / "m.gguf").exists()


def test_a_gate_of_one_row_stays_dense(tmp_path: Path) -> None:
    source = with_tokenizer(made("qwen2moe").checkpoint)
    name = "model.layers.0.mlp.shared_expert_gate"
    with pytest.raises(ValueError, match=f"'{name}': GGUF has it as a vector of floats, found 4 bits"):
        written(tmp_path / "m.gguf", source, {name: random_weight(1, 64, symmetric=True)})


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "windows": ("Qwen3", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}, "sliding-window"),
    "no rope here and there": ("SmolLM3", {"no_rope_layer_interval": 3}, "this model's ropes: None would be read as"),
    "dense layers between": ("Qwen3Moe", {**EXPERTS, "decoder_sparse_step": 2}, "mixture: .*layers"),
    "shares of experts": ("Qwen3Moe", {**EXPERTS, "norm_topk_prob": False}, "mixture: .*renormalise"),
    "windows in no turn": (
        "Gemma3",
        {"layer_types": [*["full_attention", "sliding_attention"] * 1, *["sliding_attention"] * 2]},
        "this model's windows: ",
    ),
    "another query scale": ("Gemma2", {"query_pre_attn_scalar": 99}, "this model's attention scale"),
    "no caps": ("Gemma2", {"attn_logit_softcapping": None}, "this model's attention cap: 0.0 would be read as 50.0"),
    "biases": ("Olmo2", {"attention_bias": True}, "this model's bias qkv: True would be read as False"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_keys_do_not_say_is_refused(case: str) -> None:
    name, settings, said = REFUSED[case]
    checkpoint = random_family_model(name, {**SIZES, **settings}, seed=0).checkpoint
    shapes = {name: checkpoint.describe(name).shape for name in checkpoint.names()}
    with pytest.raises(UsageError, match=said):
        check_same_model(checkpoint.config, model_metadata(checkpoint.config), shapes, "a test")


@pytest.mark.slow
@pytest.mark.parametrize("row", ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "qwen2moe", "qwen3moe"])
def test_transformers_reads_what_we_write(row: str, tmp_path: Path) -> None:
    """Tensors; of the settings its reader leaves out some, as ``test_gguf_families`` says."""
    from transformers import AutoModelForCausalLM

    widths = {"qwen2moe": {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632}}
    widths |= {"qwen3moe": {"moe_intermediate_size": 768}, "qwen3": {"head_dim": 128}}
    name, settings, _ = CASES[row]
    model = random_family_model(name, {**SIZES, **settings, **widths.get(row, {})}, seed=1)
    source = with_tokenizer(model.checkpoint)
    written(tmp_path / "m.gguf", source, {})
    theirs = AutoModelForCausalLM.from_pretrained(str(tmp_path), gguf_file="m.gguf", dtype=torch.float32).eval()
    for name, tensor in theirs.state_dict().items():
        assert torch.allclose(tensor, model.model.state_dict()[name], atol=1e-6), name
