"""Gemma 3 from GGUF: config and tensors of tiny models, and the real one, against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_files import logits_of, model_of, write_gguf
from spm_vocabulary import spm_vocabulary

from llmctl.checkpoint.gguf_header import GgufFile
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.checkpoint.resolve import resolve_model
from llmctl.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError
from llmctl.text.tokenizer import Tokenizer

NAME = "demo:gemma3-270m"


def tiny_gemma(**changes: Any) -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "vocab_size": len(spm_vocabulary()["list"]),
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 128}
    config = Gemma3TextConfig(**{**sizes, **heads, "query_pre_attn_scalar": 32, "sliding_window": 8, **changes})
    model = Gemma3ForCausalLM(config).float().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def written(path: Path, model: Any, **fields: Any) -> Path:
    return write_gguf(path, model, tokenizer=spm_vocabulary(), sliding_window=8, **fields)


PATTERNS = [[True, True, False], [False, True, True], [True] * 3]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_logits_are_transformers(tmp_path: Path, pattern: list[bool]) -> None:
    kinds = ["sliding_attention" if slides else "full_attention" for slides in pattern]
    model = tiny_gemma(layer_types=kinds, final_logit_softcapping=3.0)
    fields = {"sliding_window_pattern": pattern, "final_logit_softcapping": 3.0}
    checkpoint = open_checkpoint(written(tmp_path / "m.gguf", model, **fields))
    assert checkpoint.config["architectures"] == ["Gemma3ForCausalLM"]
    assert checkpoint.config["layer_types"] == kinds
    ids = torch.arange(24)[None]
    with torch.no_grad():
        assert torch.allclose(logits_of(checkpoint, ids), model(ids).logits, atol=1e-5)


def test_what_the_file_leaves_out(tmp_path: Path) -> None:
    model = tiny_gemma(num_hidden_layers=7)
    config = open_checkpoint(written(tmp_path / "m.gguf", model)).config
    assert config["layer_types"] == model.config.layer_types
    assert config["layer_types"].index("full_attention") == 5
    assert (config["query_pre_attn_scalar"], config["rope_local_base_freq"]) == (32, 10000.0)
    assert config["final_logit_softcapping"] is None
    full = open_checkpoint(write_gguf(tmp_path / "f.gguf", model, tokenizer=spm_vocabulary())).config
    assert (full["sliding_window"], set(full["layer_types"])) == (None, {"full_attention"})


def test_a_pattern_of_other_layers(tmp_path: Path) -> None:
    path = written(tmp_path / "m.gguf", tiny_gemma(), sliding_window_pattern=[True])
    with pytest.raises(CheckpointError, match="one value for each of 3 layers, found 1"):
        open_checkpoint(path)


def test_a_tensor_of_another_architecture(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 72}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4))
    model.model.layers[0].register_parameter("post_feedforward_layernorm", torch.nn.Parameter(torch.ones(64)))
    state = {f"{k}.weight" if k.endswith("feedforward_layernorm") else k: v for k, v in model.state_dict().items()}
    model.state_dict = lambda: state  # type: ignore[method-assign,assignment,return-value]
    with pytest.raises(UnsupportedModelError, match=r"tensor '.*' is none of architecture llama"):
        open_checkpoint(write_gguf(tmp_path / "m.gguf", model))


@pytest.fixture(scope="module")
def real() -> Path:
    try:
        return resolve_model(NAME)
    except ModelNotFoundError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_the_real_tensors_are_what_the_gguf_package_reads(real: Path) -> None:
    checkpoint = open_checkpoint(real, widen=True)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(real).tensors}
    stored = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    layer = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
        **{f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"},
        "self_attn.o_proj": "attn_output",
        **{f"self_attn.{part}_norm": f"attn_{part}_norm" for part in "qk"},
        **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
    }
    stored |= {
        f"model.layers.{i}.{theirs}.weight": f"blk.{i}.{ours}.weight"
        for i in range(18)
        for theirs, ours in layer.items()
    }
    assert sorted(stored) == sorted(checkpoint.names())
    assert sorted(stored.values()) == sorted(tensors)
    for name, other in stored.items():
        exact = gguf.quants.dequantize(tensors[other].data, tensors[other].tensor_type)
        exact = exact - np.float32(1) if name.endswith("norm.weight") else exact
        assert np.array_equal(checkpoint.weight(name).numpy(), exact), name


@pytest.mark.slow
def test_the_real_model_goes_on_with_a_sentence(real: Path) -> None:
    checkpoint = open_checkpoint(real, widen=True)
    tokenizer = Tokenizer.from_files(checkpoint.aux_files())
    ids = tokenizer.encode("The capital of France is")
    assert [tokenizer.id_to_token(i) for i in ids] == ["<bos>", "The", "▁capital", "▁of", "▁France", "▁is"]
    model = model_of(checkpoint)
    with torch.no_grad():
        for _ in range(8):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert tokenizer.decode(ids) == "The capital of France is the capital of the country of France."


@pytest.mark.slow
def test_the_real_tokenizer(real: Path) -> None:
    """As llama.cpp has it, compared with it on 6 500 texts."""
    tokenizer = Tokenizer.from_files(open_checkpoint(real).aux_files())
    ids = tokenizer.encode("Hello  world\n\n<start_of_turn>user é😀")
    assert ids == [2, 9259, 138, 12392, 108, 105, 2364, 1559, 242398]
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<bos>Hello  world\n\n<start_of_turn>user é😀"
    spelt = tokenizer.encode("\U0001f9a0\u0aaf\U00016ef7", add_special_tokens=False)
    assert "".join(tokenizer.id_to_token(i) or "" for i in spelt).endswith("<0xF0><0x96><0xBB><0xB7>")
    assert tokenizer.eos_token_ids == {1, tokenizer.token_to_id("<end_of_turn>")}
    assert "tokenizer.chat_template" not in GgufFile(real).metadata  # of the model before instructions
