"""Names in the full causal model's spelling, and the text model inside a multimodal one, against transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import logits_of
from safetensors.torch import load_file, save_file

from llmctl.checkpoint.accounting import account
from llmctl.checkpoint.assemble import checkpoint_graph
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.checkpoint.tensor_names import full_names
from llmctl.errors import CheckpointError, UnsupportedModelError
from llmctl.targets.reference.weights import CheckpointWeights

SIZES = {
    **{"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128},
}
TOKENS = [5, 60, 90, 33, 7, 12]


@pytest.mark.parametrize(
    ("stored", "base", "multimodal", "expected"),
    [
        (["model.norm.weight", "lm_head.weight"], "model", False, ["model.norm.weight", "lm_head.weight"]),
        (["norm.weight", "lm_head.weight"], "model", False, ["model.norm.weight", "lm_head.weight"]),
        (["h.0.ln_1.weight"], "transformer", False, ["transformer.h.0.ln_1.weight"]),
        (
            ["language_model.model.norm.weight", "language_model.lm_head.weight", "vision_tower.x"],
            *("model", True),
            ["model.norm.weight", "lm_head.weight", "vision_tower.x"],
        ),
        (
            ["model.language_model.norm.weight", "lm_head.weight", "model.visual.x"],
            *("model", True),
            ["model.norm.weight", "lm_head.weight", "model.visual.x"],
        ),
        (["language_model.norm.weight", "x.norm"], "model", True, ["model.norm.weight", "x.norm"]),
        (["model.text_model.norm.weight"], "model", True, ["model.norm.weight"]),
        (["model.norm.weight"], "model", True, ["model.norm.weight"]),
        (["language_model.norm.weight"], "model", False, ["model.language_model.norm.weight"]),
    ],
)
def test_names(stored: list[str], base: str, multimodal: bool, expected: list[str]) -> None:
    names = full_names(stored, base, multimodal=multimodal)
    assert names.stored == dict(zip(expected, stored, strict=True))
    assert names.outside == {n for n in expected if n.startswith(("vision_tower.", "model.visual.", "x."))}


def test_two_tensors_of_one_name() -> None:
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight'"):
        full_names(["language_model.model.norm.weight", "model.norm.weight"], "model", multimodal=True)


def llava(folder: Path, *, tied: bool = False) -> Any:
    """A tiny Llava (CLIP and Llama) saved by transformers; the model."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(3)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = LlamaConfig(**SIZES, tie_word_embeddings=tied)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=95, tie_word_embeddings=tied)
    model = LlavaForConditionalGeneration(config).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("spelling", ["stored", "language_model.model.", "model.language_model."])
def test_the_text_model_of_a_multimodal_checkpoint(tmp_path: Path, spelling: str, tied: bool) -> None:
    model = llava(tmp_path, tied=tied)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    if spelling != "stored":
        inner = model.model.language_model.state_dict()
        rest = {n: t for n, t in tensors.items() if "language_model" not in n and not n.startswith("lm_head")}
        head = "language_model.lm_head.weight" if spelling.startswith("language") else "lm_head.weight"
        tensors = {**rest, **{spelling + name: tensor for name, tensor in inner.items()}}
        tensors |= {} if tied else {head: model.lm_head.weight.detach()}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config["model_type"] == "llama"
    assert checkpoint.config["architectures"] == ["LlamaForCausalLM"]
    graph = checkpoint_graph(checkpoint)
    found = logits_of(graph, CheckpointWeights(graph, checkpoint), [TOKENS])
    with torch.no_grad():
        expected = model(torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    (unused,) = account(checkpoint, graph)
    assert unused.notable
    assert len(unused.names) == len([n for n in tensors if "language_model" not in n and n != "lm_head.weight"])
    assert all("vision_tower" in name or "multi_modal_projector" in name for name in unused.names)


@pytest.mark.parametrize(
    ("changes", "error", "reason"),
    [
        ({"text_config": 3}, CheckpointError, "text_config: expected an object with a model_type"),
        ({"text_config": {"hidden_size": 3}}, CheckpointError, "text_config: expected an object with a model_type"),
        ({"architectures": ["LlavaForRetrieval"]}, UnsupportedModelError, "'LlavaForRetrieval' does not generate text"),
        ({"architectures": "Llava"}, CheckpointError, "architectures must be a list"),
    ],
)
def test_configs_that_hold_no_text_model(tmp_path: Path, changes: dict, error: type, reason: str) -> None:
    config = {"model_type": "llava", "text_config": {"model_type": "llama"}, **changes}
    save_file({"language_model.model.norm.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=reason):
        open_checkpoint(tmp_path)
