"""Random models of every family, written as Hugging Face folders without transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from fixtures import make_tokenizer
from torch import Tensor

from llmctl.checkpoint.safetensors_io import tensor_spec, write_safetensors
from llmctl.graph.families import build_graph
from llmctl.graph.graph import INPUT_IDS, LOGITS, POSITIONS, Graph
from llmctl.targets.batch import packed_batch
from llmctl.targets.reference.context import allocate_cache
from llmctl.targets.reference.interpreter import Interpreter

_LLAMA: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **_LLAMA},
    "mistral": {"model_type": "mistral", **_LLAMA, "sliding_window": 16},
    "qwen2": {"model_type": "qwen2", **_LLAMA, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **_LLAMA, "head_dim": 32},
    "phi": {"model_type": "phi", **_LLAMA, "num_key_value_heads": 4, "hidden_act": "gelu_new"},
    "phi3": {"model_type": "phi3", **_LLAMA, "partial_rotary_factor": 0.75},
    "gpt2": {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
}
FAMILIES = sorted(CONFIGS)
_MORE: dict[str, dict[str, Any]] = {
    "arcee": {},
    "cohere2": {"sliding_window": 16, "sliding_window_pattern": 2, "tie_word_embeddings": True},
    "ernie4_5": {"head_dim": 16},
    "exaone4": {"sliding_window": 16, "sliding_window_pattern": 2},
    "gemma2": {"head_dim": 16, "hidden_activation": None, "sliding_window": 16, "tie_word_embeddings": True},
    "gemma3_text": {"head_dim": 16, "sliding_window": 16, "sliding_window_pattern": 2, "tie_word_embeddings": True},
    "glm4": {"head_dim": 16, "attention_bias": True},
    "gpt_neox": {"num_key_value_heads": 4},
    "granite": {"residual_multiplier": 0.5, "embedding_multiplier": 6.0, "logits_scaling": 2.0},
    "nemotron": {},
    "olmo2": {},
    "qwen2_moe": {
        **{"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "decoder_sparse_step": 2},
        "shared_expert_intermediate_size": 64,
    },
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 16},
    "smollm3": {"no_rope_layer_interval": 2},
    "starcoder2": {"use_bias": True, "sliding_window": 16},
}
CONFIGS |= {name: {"model_type": name, **_LLAMA, **changes} for name, changes in _MORE.items()}
MORE_FAMILIES = sorted(_MORE)


def random_tensors(graph: Graph, seed: int = 0) -> dict[str, Tensor]:
    """Checkpoint tensors of a graph, f32 in their stored orientation, with outlier channels in the norms."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, list[int]] = {}
    for weight in graph.weights.values():
        for part in weight.parts:
            rows = part.rows[1] if part.rows else weight.shape[0] // len(weight.parts)
            shape = shapes.setdefault(part.tensor, [0, *weight.shape[1:], part.transpose])
            shape[0] = max(shape[0], rows)
    tensors = {}
    for name, (*shape, transpose) in shapes.items():
        value = torch.randn(*shape, generator=generator) * 0.1
        if "norm" in name or "ln_" in name:
            value = (1 + value) if name.endswith("weight") else value
            value[:: len(value) // 4] *= 6
        tensors[name] = value.T.contiguous() if transpose else value
    return tensors


CALIBRATION_TEXT = "the quick brown fox reads a book about engines and kernels. " * 60


def write_small_llama(folder: Path) -> Path:
    """A Llama whose widths groups of 32 divide."""
    return write_model(folder, "llama", num_key_value_heads=4, intermediate_size=128)


def write_model(folder: Path, family: str, **changes: Any) -> Path:
    """A random checkpoint of a family with a tokenizer; float32 on disk."""
    vocab_size = make_tokenizer(folder)
    config = {**CONFIGS[family], "vocab_size": vocab_size, "dtype": "float32", **changes}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = random_tensors(build_graph(config))
    write_safetensors(folder / "model.safetensors", {name: tensor_spec(t) for name, t in tensors.items()})
    return folder


def logits_of(graph: Graph, weights: Any, tokens: list[list[int]]) -> Tensor:
    """Logits of every token, ``[tokens, vocab]``, of a plain graph over its weights."""
    interpreter = Interpreter(graph, weights)
    batch = packed_batch(tokens)
    cache = allocate_cache(graph, int(batch.block_tables.max()) + 1, batch.block_size, torch.float32)
    context = interpreter.context(batch, cache)
    context.rows = torch.arange(batch.num_tokens)
    env = context.inputs()
    assert set(env) == {INPUT_IDS, POSITIONS}
    return interpreter.program(graph.ops, (LOGITS,))(env, context)[LOGITS]


def random_tokens(samples: int, length: int, vocab: int, seed: int = 0) -> list[list[int]]:
    """Token ids."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[list[int]] = torch.randint(0, vocab, (samples, length), generator=generator).tolist()
    return rows
