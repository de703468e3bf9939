"""Configs as models are published with: sizes that are left to transformers' class, keys of the authors' own code."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from llmctl.checkpoint.text_config import text_model_config
from llmctl.errors import CheckpointError, UnsupportedModelError
from llmctl.graph.families import build_graph
from llmctl.graph.graph import Graph

GEMMA3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "text_config": {
        **{"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34},
        **{"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024},
    },
}
GEMMA3_WINDOWS = [*[1024] * 5, 0] * 5 + [1024] * 4
GEMMA3_ROTATIONS = [(256, 1e4 if window else 1e6) for window in GEMMA3_WINDOWS]
COMMAND_R = {
    **{"architectures": ["CohereForCausalLM"], "model_type": "cohere", "vocab_size": 256000, "hidden_size": 8192},
    **{"intermediate_size": 22528, "num_hidden_layers": 40, "num_attention_heads": 64, "num_key_value_heads": 64},
    **{"hidden_act": "silu", "layer_norm_eps": 1e-5, "logit_scale": 0.0625, "max_position_embeddings": 8192},
    **{"model_max_length": 131072, "rope_theta": 8000000.0, "use_qk_norm": False, "pretraining_tp": 1},
}
COMMAND_R7B = {
    **{"architectures": ["Cohere2ForCausalLM"], "model_type": "cohere2", "vocab_size": 256000, "hidden_size": 4096},
    **{"intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
    **{"head_dim": 128, "hidden_act": "silu", "layer_norm_eps": 1e-5, "logit_scale": 0.25, "rope_theta": 50000},
    **{"max_position_embeddings": 8192, "attention_bias": False, "cache_implementation": "hybrid"},
    **{"layer_switch": 4, "order_of_interleaved_layers": "local_attn_first", "position_embedding_type": "rope_gptj"},
    **{"rope_scaling": None, "rotary_pct": 1.0, "sliding_window": 4096, "sliding_window_pattern": 4},
    **{"use_embedding_sharing": True, "use_gated_activation": True, "use_parallel_block": True},
    **{"use_parallel_embedding": True},
}
SMOLLM3 = {
    **{"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "vocab_size": 128256, "hidden_size": 2048},
    **{"intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 4},
    **{"hidden_act": "silu", "layer_types": ["full_attention"] * 36, "max_position_embeddings": 65536},
    **{"max_window_layers": 28, "mlp_bias": False, "attention_bias": False, "no_rope_layer_interval": 4},
    **{"no_rope_layers": [1, 1, 1, 0] * 9, "pretraining_tp": 2, "rms_norm_eps": 1e-6, "rope_scaling": None},
    **{"rope_theta": 5000000.0, "sliding_window": None, "use_sliding_window": False},
}
ERNIE = {
    **{"architectures": ["Ernie4_5_ForCausalLM"], "model_type": "ernie4_5", "vocab_size": 103424, "hidden_size": 1024},
    **{"intermediate_size": 3072, "num_hidden_layers": 18, "num_attention_heads": 16, "num_key_value_heads": 2},
    **{"head_dim": 128, "hidden_act": "silu", "max_position_embeddings": 131072, "rms_norm_eps": 1e-5},
    **{"rope_theta": 500000, "use_bias": False, "tie_word_embeddings": True},
}
PYTHIA = {  # as transformers 4 saves it again
    **{"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "vocab_size": 50304, "hidden_size": 512},
    **{"intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 8, "hidden_act": "gelu"},
    **{"layer_norm_eps": 1e-5, "max_position_embeddings": 2048, "rotary_emb_base": 10000, "rotary_pct": 0.25},
    **{"partial_rotary_factor": 0.25, "rope_theta": 10000, "rope_scaling": None, "use_parallel_residual": True},
    **{"attention_bias": True, "classifier_dropout": 0.1, "hidden_dropout": 0.0, "tie_word_embeddings": False},
}
PHI4_MINI = {
    **{"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "vocab_size": 200064, "hidden_size": 3072},
    **{"intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 24, "num_key_value_heads": 8},
    **{"hidden_act": "silu", "rms_norm_eps": 1e-5, "attention_bias": False, "mlp_bias": False, "lm_head_bias": False},
    **{"full_attn_mod": 1, "interpolate_factor": 1, "partial_rotary_factor": 0.75, "rope_theta": 10000.0},
    **{"max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "sliding_window": 262144},
    **{"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}},
    **{"tie_word_embeddings": True},
}
STARCODER2 = {
    **{"architectures": ["Starcoder2ForCausalLM"], "model_type": "starcoder2", "vocab_size": 49152},
    **{"hidden_size": 3072, "intermediate_size": 12288, "num_hidden_layers": 30, "num_attention_heads": 24},
    **{"num_key_value_heads": 2, "attention_softmax_in_fp32": True, "hidden_act": "gelu_pytorch_tanh"},
    **{"max_position_embeddings": 16384, "mlp_type": "default", "norm_epsilon": 1e-5, "norm_type": "layer_norm"},
    **{"residual_dropout": 0.1, "embedding_dropout": 0.1, "rope_theta": 999999.4420358813, "sliding_window": 4096},
    **{"scale_attention_softmax_in_fp32": True, "scale_attn_weights": True, "use_bias": True},
}


def rotations(graph: Graph) -> list[tuple[int, float]]:
    """rotary_dim and base of every layer that turns q and k."""
    return [(op.attrs["rotary_dim"], op.attrs["theta"]) for op in graph.ops if op.kind == "rope"]


@pytest.mark.parametrize(
    ("config", "context", "windows", "turned"),
    [
        pytest.param(GEMMA3_4B, 131072, GEMMA3_WINDOWS, GEMMA3_ROTATIONS, id="gemma3"),
        pytest.param(COMMAND_R, 131072, [0] * 40, [(128, 8e6)] * 40, id="command-r"),
        pytest.param(COMMAND_R7B, 8192, [4096, 4096, 4096, 0] * 8, [(128, 5e4)] * 24, id="command-r7b"),
        pytest.param(SMOLLM3, 65536, [0] * 36, [(128, 5e6)] * 27, id="smollm3"),
        pytest.param(ERNIE, 131072, [0] * 18, [(128, 5e5)] * 18, id="ernie"),
        pytest.param(PYTHIA, 2048, [0] * 6, [(16, 1e4)] * 6, id="pythia"),
        pytest.param(PHI4_MINI, 4096, [262144] * 32, [(96, 1e4)] * 32, id="phi4-mini"),
        pytest.param(STARCODER2, 16384, [4096] * 30, [(128, 999999.4420358813)] * 30, id="starcoder2"),
    ],
)  # fmt: skip
def test_published_configs_are_understood_whole(
    config: dict[str, Any],
    context: int,
    windows: list[int],
    turned: list[tuple[int, float]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        graph = build_graph(text_model_config(config, "config.json"))
    assert "not understood" not in caplog.text
    assert graph.max_position == context
    assert [layer.window for layer in graph.kv] == windows
    assert rotations(graph) == turned


@pytest.mark.parametrize(
    ("config", "change"),
    [
        (COMMAND_R7B, {"position_embedding_type": "rope_gpt_neox"}),
        (COMMAND_R7B, {"rotary_pct": 0.5}),
        (COMMAND_R7B, {"use_parallel_block": False}),
        (PHI4_MINI, {"lm_head_bias": True}),
        (STARCODER2, {"norm_type": "rms_norm"}),
        (ERNIE, {"compression_ratio": 2.0}),
    ],
)
def test_other_values_of_their_own_keys_are_refused(config: dict[str, Any], change: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match=next(iter(change))):
        build_graph({**config, **change})


def test_a_key_is_read_in_either_spelling() -> None:
    del (config := dict(PYTHIA))["rotary_pct"]
    assert rotations(build_graph({**config, "partial_rotary_factor": 0.5})) == [(32, 1e4)] * 6
    assert rotations(build_graph({**PYTHIA, "partial_rotary_factor": 0.5})) == [(16, 1e4)] * 6  # its own comes first


def test_contexts_end_where_one_layer_types_long_factors_begin() -> None:
    long = {"rope_type": "longrope", "short_factor": [1.0] * 6, "long_factor": [2.0] * 6, "rope_theta": 1e4}
    config = {
        **{"model_type": "olmo3", "vocab_size": 131, "hidden_size": 60, "intermediate_size": 84},
        **{"num_hidden_layers": 4, "num_attention_heads": 5, "max_position_embeddings": 128, "sliding_window": 8},
        "rope_parameters": {
            "full_attention": {**long, "original_max_position_embeddings": 96},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    }
    assert build_graph(config).max_position == 96


@pytest.mark.parametrize("family", ["gemma3_text", "olmo3"])
def test_layers_that_slide_have_a_window(family: str) -> None:
    """They would have another base of RoPE than the others all the same."""
    config = {"model_type": family, "vocab_size": 131, "hidden_size": 60, "intermediate_size": 84}
    config |= {"num_hidden_layers": 6, "num_attention_heads": 5, "num_key_value_heads": 5}
    with pytest.raises(CheckpointError, match="sliding_window must be a positive integer, found None"):
        build_graph({**config, "sliding_window": None})
    types = ["full_attention"] * 6
    assert not any(layer.window for layer in build_graph({**config, "sliding_window": None, "layer_types": types}).kv)
