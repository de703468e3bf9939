"""Random quantized weights and tiny checkpoints for this room's tests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.checkpoint.safetensors_io import tensor_spec, write_safetensors
from llmctl.graph.graph import QuantScheme


def random_weight(
    rows: int,
    columns: int,
    bits: int = 4,
    group: int = 32,
    *,
    symmetric: bool = False,
    act_order: bool = False,
    seed: int = 0,
) -> QuantizedWeight:
    """A QuantizedWeight [rows, columns] with zero points from 1 up and float16 scales."""
    g = torch.Generator().manual_seed(seed)
    scheme = QuantScheme(bits, group, symmetric, act_order)
    groups = scheme.groups(columns)
    zeros = torch.randint(1, 1 << bits, (rows, groups), generator=g, dtype=torch.uint8)
    index = None
    if act_order:
        index = (torch.randperm(columns, generator=g) % groups).to(torch.int32)
    return QuantizedWeight(
        codes=torch.randint(0, 1 << bits, (rows, columns), generator=g, dtype=torch.uint8),
        scales=(torch.rand(rows, groups, generator=g) * 0.1 + 0.001).half(),
        zeros=torch.full_like(zeros, 1 << (bits - 1)) if symmetric else zeros,
        scheme=scheme,
        g_idx=index,
    )


def same_weight(a: QuantizedWeight, b: QuantizedWeight) -> bool:
    """Equal planes and scheme."""
    index = (a.g_idx is None) == (b.g_idx is None) and (a.g_idx is None or torch.equal(a.g_idx, b.g_idx))
    return (
        index
        and a.scheme == b.scheme
        and all(torch.equal(getattr(a, plane), getattr(b, plane)) for plane in ("codes", "scales", "zeros"))
    )


def write_folder(path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """A one-file checkpoint folder."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    write_safetensors(path / "model.safetensors", {name: tensor_spec(tensor) for name, tensor in tensors.items()})
    return path


def tiny_llama(
    path: Path, *, tied: bool = False, shard: str = "1GB", dtype: torch.dtype = torch.bfloat16, **extra: Any
):
    """A random two-layer Llama saved by transformers; returns the model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    settings: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 72,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
        **extra,
    }
    model = LlamaForCausalLM(LlamaConfig(**settings)).to(dtype).eval()
    model.save_pretrained(path, max_shard_size=shard)
    return model
