"""A tiny random transformers model of every family and variant in ``graph/family_table.py``, odd sizes on purpose."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from llmctl.checkpoint.assemble import checkpoint_graph
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.checkpoint.reader import Checkpoint
from llmctl.graph.graph import Graph

VOCAB = 131
_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 60,
    "intermediate_size": 84,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "max_position_embeddings": 128,
}
_QWEN = {**_SMALL, "num_attention_heads": 6, "num_key_value_heads": 2}


def _rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 1000.0, **parameters}}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**_SMALL, "num_key_value_heads": 1}),
    "llama_biases_tied": (
        "Llama",
        {**_SMALL, "num_key_value_heads": 5, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama_gelu_wide_heads": (
        "Llama",
        {**_SMALL, "num_key_value_heads": 1, "head_dim": 14, "hidden_act": "gelu_pytorch_tanh"},
    ),
    "llama_linear": ("Llama", {**_SMALL, **_rope(rope_type="linear", factor=4.0)}),
    "llama_llama3": (
        "Llama",
        {
            **_SMALL,
            **_rope(
                rope_type="llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=32,
            ),
        },
    ),
    "llama_yarn": ("Llama", {**_SMALL, **_rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)}),
    "llama_yarn_mscale": (
        "Llama",
        {
            **_SMALL,
            **_rope(
                rope_type="yarn",
                factor=4.0,
                original_max_position_embeddings=32,
                mscale=0.7,
                mscale_all_dim=1.3,
                beta_fast=8.0,
                beta_slow=2.0,
                truncate=False,
            ),
        },
    ),
    "mistral": ("Mistral", {**_SMALL, "num_attention_heads": 10, "num_key_value_heads": 2, "sliding_window": 7}),
    "mistral_full": ("Mistral", {**_SMALL, "num_key_value_heads": 1, "sliding_window": None}),
    "qwen2": ("Qwen2", dict(_QWEN)),
    "qwen2_window": (
        "Qwen2",
        {**_QWEN, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {**_QWEN, "num_attention_heads": 4, "head_dim": 12, "tie_word_embeddings": True}),
    "qwen3_bias": ("Qwen3", {**_QWEN, "head_dim": 18, "attention_bias": True}),
    "phi": ("Phi", dict(_SMALL)),
    "phi_partial": ("Phi", {**_SMALL, "num_key_value_heads": 1, **_rope(partial_rotary_factor=0.4)}),
    "phi3": ("Phi3", {**_SMALL, "num_key_value_heads": 1, "pad_token_id": 0}),
    "phi3_partial_window": (
        "Phi3",
        {
            **{**_QWEN, "num_attention_heads": 5, "num_key_value_heads": 5, "sliding_window": 7, "pad_token_id": 0},
            **{"tie_word_embeddings": True, **_rope(rope_type="default", partial_rotary_factor=0.7)},
        },
    ),
    "gpt2": (
        "GPT2",
        {"vocab_size": VOCAB, "n_embd": 60, "n_layer": 3, "n_head": 5, "n_positions": 128},
    ),
    "gpt2_untied": (
        "GPT2",
        {
            **{"vocab_size": VOCAB, "n_embd": 60, "n_layer": 2, "n_head": 3, "n_positions": 128, "n_inner": 84},
            "tie_word_embeddings": False,
        },
    ),
}


@dataclass(frozen=True)
class FamilyModel:
    """A transformers model, the same weights as an opened checkpoint, and its plain Graph."""

    model: Any
    checkpoint: Checkpoint
    graph: Graph

    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """transformers' logits f32 [T, vocab] of one sequence."""
        with torch.no_grad():
            return self.model(torch.tensor([token_ids])).logits[0]


_FOLDERS: list[TemporaryDirectory[str]] = []


@cache
def family_model(case: str) -> FamilyModel:
    """The model of one of ``CASES``; made once a process."""
    import transformers

    name, settings = CASES[case]
    torch.manual_seed(sum(case.encode()))
    config = getattr(transformers, f"{name}Config")(**settings)
    model = getattr(transformers, "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")
    made = model(config).eval()
    for parameter in made.parameters():
        _randomise(parameter.data)
    _FOLDERS.append(TemporaryDirectory())
    made.save_pretrained(_FOLDERS[-1].name)
    checkpoint = open_checkpoint(Path(_FOLDERS[-1].name))
    return FamilyModel(made, checkpoint, checkpoint_graph(checkpoint))


def _randomise(parameter: torch.Tensor) -> None:
    """Far from the initial values, under which biases are zero, norms one and attention nearly uniform."""
    if parameter.ndim == 1:
        parameter.add_(torch.randn_like(parameter) * 0.3)
    else:
        parameter.copy_(torch.randn_like(parameter) * 1.5 * parameter.shape[-1] ** -0.5)
