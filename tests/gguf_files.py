"""GGUF files of small models, written with gguf.GGUFWriter as llama.cpp's converter does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from llmctl.checkpoint.reader import Checkpoint

HF_TO_GGUF = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attn_output",
}

GEMMA_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_name(name: str, arch: str = "llama") -> str:
    names = HF_TO_GGUF | (GEMMA_NORMS if arch == "gemma3" else {})
    module, _, kind = name.rpartition(".")
    if module in HF_TO_GGUF:
        return f"{HF_TO_GGUF[module]}.{kind}"
    layer, short = module.removeprefix("model.layers.").split(".", 1)
    plain = short.replace("self_attn.", "attn_").replace("mlp.", "ffn_").replace("_proj", "")
    return f"blk.{layer}.{names.get(short, plain)}.{kind}"


def converter_permute(weights: torch.Tensor, heads: int) -> torch.Tensor:
    """convert_hf_to_gguf.py's row order for llama's Q and K."""
    split = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return split.swapaxes(1, 2).reshape(weights.shape)


def write_gguf(path: Path, model: Any, *, qtype: Any = None, tokenizer: dict | None = None, **fields: Any) -> Path:
    """A model as GGUF; matrices in ``qtype`` (None: float32)."""
    config = model.config
    arch = config.model_type.removesuffix("_text")
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters.get("full_attention", config.rope_parameters)["rope_theta"])
    if arch in ("qwen3", "gemma3"):
        writer.add_key_length(config.head_dim)
    for key, value in fields.items():
        if key == "head_count":  # was written above
            writer.kv_data[0][f"{arch}.attention.head_count"].value = value
            continue
        getattr(writer, f"add_{key}")(value)
    add_tokenizer(writer, tokenizer or small_tokenizer(config.vocab_size))
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if arch == "llama" and "q_proj" in name:
            tensor = converter_permute(tensor, config.num_attention_heads)
        if arch == "llama" and "k_proj" in name:
            tensor = converter_permute(tensor, config.num_key_value_heads)
        if arch == "gemma3" and name.endswith("norm.weight"):
            tensor = tensor + 1
        array = tensor.float().numpy()
        if qtype is None or array.ndim == 1:
            writer.add_tensor(gguf_name(name, arch), array)
        else:
            writer.add_tensor(gguf_name(name, arch), gguf.quants.quantize(array, qtype), raw_dtype=qtype)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return path


def small_tokenizer(size: int, **changes: Any) -> dict[str, Any]:
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>", "1", "2", "3", "Ġ", "a", "b", "ab", "Ġab", "12"]
    tokens += [f"unused{i}" for i in range(size - len(tokens))]
    return {
        "model": "gpt2",
        "pre": "smollm",
        "list": tokens,
        "types": [3, 3, 3, 4] + [1] * (size - 4),
        "merges": ["a b", "Ġ ab", "1 2"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **changes,
    }


def add_tokenizer(writer: gguf.GGUFWriter, facts: dict[str, Any]) -> None:
    """What ``small_tokenizer`` makes, as metadata."""
    writer.add_tokenizer_model(facts["model"])
    if facts["pre"]:
        writer.add_tokenizer_pre(facts["pre"])
    writer.add_token_list(facts["list"])
    writer.add_token_types(facts["types"])
    if facts["merges"]:
        writer.add_token_merges(facts["merges"])
    for key in facts.keys() - {"model", "pre", "list", "types", "merges"}:
        getattr(writer, f"add_{key}")(facts[key])


def tokenizer_keys(facts: dict[str, Any]) -> dict[str, Any]:
    """What ``small_tokenizer`` makes, as metadata that was read; None is left out."""
    names = {"list": "tokens", "types": "token_type", "token_scores": "scores"}
    names |= {"unk_token_id": "unknown_token_id", "pad_token_id": "padding_token_id"}
    arrays = {"types": np.int32, "token_scores": np.float32}
    return {
        f"tokenizer.ggml.{names.get(key, key)}": np.array(value, arrays[key]) if key in arrays else value
        for key, value in facts.items()
        if value is not None and value != []
    }


def logits_of(checkpoint: Checkpoint, ids: torch.Tensor) -> torch.Tensor:
    """What transformers computes from the checkpoint's config and weights alone."""
    with torch.no_grad():
        return model_of(checkpoint)(ids).logits


def model_of(checkpoint: Checkpoint) -> Any:
    """transformers' model of the checkpoint's config and weights alone, in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = dict(checkpoint.config)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config)).float().eval()
    state = {name: checkpoint.weight(name).float() for name in checkpoint.names()}
    result = model.load_state_dict(state, strict=False)
    assert set(result.missing_keys) <= {"lm_head.weight"}
    assert not result.unexpected_keys
    model.tie_weights()
    return model
