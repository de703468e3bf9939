"""A two-layer Llama checkpoint written by hand: no transformers, so that a test has it in milliseconds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from llmctl.checkpoint.safetensors_io import write_safetensors
from llmctl.graph.dtypes import BY_SAFETENSORS

HIDDEN, MLP, HEADS, KV_HEADS, VOCAB, LAYERS, MAX_POSITION = 64, 128, 4, 2, 96, 2, 512


def linear_shapes(hidden: int = HIDDEN, mlp: int = MLP) -> dict[str, tuple[int, int]]:
    """(N, K) of every linear in the layers, by module name."""
    kv = hidden // HEADS * KV_HEADS
    per_layer = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
    }
    return {f"model.layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in per_layer.items()}


def config(**changes: Any) -> dict[str, Any]:
    """Its config.json."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCAB,
        "max_position_embeddings": MAX_POSITION,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "dtype": "float16",
        **changes,
    }


def dense_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """Its weights, float16."""
    rng = np.random.default_rng(seed)

    def make(*shape: int) -> np.ndarray:
        return (rng.normal(size=shape) * 0.1).astype(np.float16)

    tensors = {f"{name}.weight": make(*shape) for name, shape in linear_shapes().items()}
    tensors |= {
        f"model.layers.{i}.{norm}.weight": make(HIDDEN)
        for i in range(LAYERS)
        for norm in ("input_layernorm", "post_attention_layernorm")
    }
    return tensors | {
        "model.embed_tokens.weight": make(VOCAB, HIDDEN),
        "model.norm.weight": make(HIDDEN),
        "lm_head.weight": make(VOCAB, HIDDEN),
    }


def write_dense(folder: Path, seed: int = 0) -> Path:
    """The checkpoint with dense float16 weights."""
    return write_arrays(folder, dense_tensors(seed))


def write_arrays(folder: Path, arrays: Mapping[str, np.ndarray], **changes: Any) -> Path:
    """A checkpoint of any tensors, with its config.json changed."""
    codes = {row.numpy: code for code, row in BY_SAFETENSORS.items() if row.name == row.numpy}
    return _write(folder, config(**changes), {n: (codes[str(a.dtype)], a.shape, a) for n, a in arrays.items()})


def write_gptq(
    folder: Path,
    *,
    bits: int = 4,
    group_size: int = 32,
    symmetric: bool = False,
    act_order: bool = False,
    seed: int = 0,
    head: bool = False,
) -> Path:
    """The checkpoint with random GPTQ weights in all layers, and in its output head if ``head``."""
    import torch

    from llmctl.checkpoint import gptq
    from llmctl.checkpoint.quantized import QuantizedWeight
    from llmctl.graph.graph import QuantScheme

    scheme = QuantScheme(bits, group_size, symmetric, act_order)
    generator = torch.Generator().manual_seed(seed)
    shapes = linear_shapes() | ({"lm_head": (VOCAB, HIDDEN)} if head else {})
    tensors: dict[str, Any] = {
        name: ("F16", array.shape, array)
        for name, array in dense_tensors(seed).items()
        if name.removesuffix(".weight") not in shapes
    }
    for name, (rows, columns) in shapes.items():
        groups = (rows, scheme.groups(columns))
        top = 2**bits
        zeros = torch.full(groups, top // 2) if symmetric else torch.randint(1, top, groups, generator=generator)
        weight = QuantizedWeight(
            torch.randint(0, top, (rows, columns), generator=generator).to(torch.uint8),
            (torch.rand(groups, generator=generator) * 0.02 + 0.001).half(),
            zeros.to(torch.uint8),
            scheme,
            (torch.randperm(columns, generator=generator) // group_size).to(torch.int32) if act_order else None,
        )
        # Without act-order g_idx says nothing; leaving it out keeps the headers sufficient to describe the checkpoint.
        packed = {suffix: plane for suffix, plane in gptq.pack(weight).items() if act_order or suffix != "g_idx"}
        dtypes = {torch.int32: "I32", torch.float16: "F16"}
        tensors |= {f"{name}.{k}": (dtypes[v.dtype], tuple(v.shape), v.contiguous()) for k, v in packed.items()}
    quantization = {
        "quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": symmetric, "desc_act": act_order,
        "checkpoint_format": "gptq",
    }  # fmt: skip
    return _write(folder, config(quantization_config=quantization), tensors)


@cache
def _tokenizer() -> str:
    """One token a printable ASCII character, as far as ``VOCAB`` goes."""
    from tokenizers import Tokenizer, models

    tokens = ["<unk>", "<s>", "</s>", *(chr(c) for c in range(ord("~"), ord(" ") - 1, -1))][:VOCAB]
    return str(Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [], unk_token="<unk>")).to_str())


def _write(folder: Path, settings: dict[str, Any], tensors: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    (folder / "tokenizer.json").write_text(_tokenizer())
    write_safetensors(folder / "model.safetensors", tensors)
    return folder
