"""Configs and tensor descriptions: what is read, what is refused, and in which words."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import pytest
from family_models import CASES, MORE_CASES, config_of, family_model

from llmctl.errors import CheckpointError, UnsupportedModelError
from llmctl.graph.check import check_graph
from llmctl.graph.config_keys import NEUTRAL
from llmctl.graph.families import build_graph
from llmctl.graph.family_table import FAMILIES
from llmctl.graph.graph import Graph, QuantScheme

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 131,
    "hidden_size": 60,
    "intermediate_size": 84,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}


def rope(graph: Graph) -> dict[str, Any]:
    attrs = dict(next(op for op in graph.ops if op.kind == "rope").attrs)
    return {k: v for k, v in attrs.items() if k not in ("heads", "kv_heads", "head_dim")}


def test_old_and_new_rope_spellings_are_one() -> None:
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    old = {**LLAMA, "rope_theta": 5e5, "rope_scaling": {"type": "llama3", **llama3}}
    new = {**LLAMA, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **llama3}}
    assert build_graph(old) == build_graph(new)
    assert rope(build_graph(new)) == {
        "rotary_dim": 12,
        "theta": 5e5,
        "style": "neox",
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position": 32.0,
    }


def test_rope_defaults() -> None:
    assert rope(build_graph(LLAMA)) == {"rotary_dim": 12, "theta": 1e4, "style": "neox", "rope_type": "default"}
    assert rope(build_graph({**LLAMA, "rope_theta": None, "rope_scaling": None}))["theta"] == 1e4
    yarn = rope(build_graph({**LLAMA, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}))
    assert yarn["original_max_position"] == 128.0
    assert yarn["attention_factor"] == pytest.approx(1.1386294)
    assert (yarn["beta_fast"], yarn["beta_slow"], yarn["truncate"]) == (32.0, 1.0, True)


def test_phi_rotates_half_unless_told_otherwise() -> None:
    phi = {**LLAMA, "model_type": "phi", "layer_norm_eps": 1e-5, "hidden_act": "gelu_new"}
    assert rope(build_graph(phi))["rotary_dim"] == 6
    assert rope(build_graph({**phi, "partial_rotary_factor": 0.4}))["rotary_dim"] == 4
    assert rope(build_graph({**phi, "rope_parameters": {"partial_rotary_factor": 0.4}}))["rotary_dim"] == 4


def test_phi3_takes_slices_of_fused_tensors() -> None:
    graph = build_graph({**LLAMA, "model_type": "phi3", "partial_rotary_factor": 0.5})
    assert rope(graph)["rotary_dim"] == 6
    rows = {name: weight.parts[0].rows for name, weight in graph.weights.items() if weight.parts[0].rows is not None}
    assert {name.removeprefix("layers.1."): found for name, found in rows.items() if "layers.1." in name} == {
        "q_proj.weight": (0, 60),
        "k_proj.weight": (60, 72),
        "v_proj.weight": (72, 84),
        "gate_proj.weight": (0, 84),
        "up_proj.weight": (84, 168),
    }


@pytest.mark.parametrize(
    ("case", "words"), [("ministral3", "llama_4_scaling_beta"), ("phi3_longrope", "RoPE's long_factor")]
)
def test_contexts_end_where_something_is_not_computed(case: str, words: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert build_graph(config_of(case).to_dict() | {"architectures": None}).max_position == 96
    assert words in caplog.text
    assert "contexts are of up to 96 tokens, not 128" in caplog.text


def test_a_residual_multiplier_is_carried_by_the_stream() -> None:
    granite = {**LLAMA, "model_type": "granite", "residual_multiplier": 0.5, "embedding_multiplier": 6.0}
    graph = build_graph(granite)
    assert [op.attrs["scale"] for op in graph.ops if op.kind == "embed"] == [12.0]
    assert {op.attrs["eps"] for op in graph.ops if op.kind == "rms_norm"} == {4e-5}
    assert [op.attrs for op in graph.linears() if op.name == "lm_head"] == [{}]


def windows(config: dict[str, Any]) -> list[int]:
    graph = build_graph(config)
    assert [op.attrs["window"] for op in graph.ops if op.kind == "attention"] == [k.window for k in graph.kv]
    return [k.window for k in graph.kv]


def test_windows_by_family() -> None:
    mistral, qwen = {**LLAMA, "model_type": "mistral"}, {**LLAMA, "model_type": "qwen2"}
    assert windows({**mistral, "sliding_window": 7}) == [7, 7]
    assert windows({**mistral, "sliding_window": None}) == [0, 0]
    assert windows({**qwen, "sliding_window": 9, "max_window_layers": 1}) == [0, 0]
    assert windows({**qwen, "sliding_window": 9, "max_window_layers": 1, "use_sliding_window": True}) == [0, 9]
    types = ["sliding_attention", "full_attention"]
    assert windows({**qwen, "sliding_window": 9, "use_sliding_window": True, "layer_types": types}) == [9, 0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"model_type": "mamba"},
            "model_type 'mamba' is not supported; known families: arcee, cohere, cohere2, e",
        ),
        ({"model_type": None}, "model_type 'None' is not supported"),
        ({"hidden_act": "mish"}, "hidden_act 'mish' is not supported; known activations"),
        ({"rope_scaling": {"type": "x", "factor": 2.0}}, "rope_type 'x' is not supported; supported: default, dynamic"),
        ({"model_type": "phi3", "rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type 'yarn' is not supported"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "per layer type"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "spin": 1}}, "'spin' is not supported for rope_type"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"lm_head_bias": True}, "lm_head_bias=True"),
        ({"sliding_window": 8}, "sliding_window=8"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types entry 'sliding_attention'"),
        ({"num_local_experts": 8}, "num_local_experts=8"),
        ({"logits_scaling": 8.0}, "logits_scaling=8.0"),
        ({"attention_multiplier": 0.1}, "attention_multiplier=0.1"),
        ({"rope_interleaved": True}, "rope_interleaved=True"),
        ({"head_dim": 11}, "rotary dimension 11 of head_dim 11"),
        ({"model_type": "mistral", "attention_bias": True}, "attention_bias=True is not supported for family 'mistral"),
        ({"model_type": "phi", "layer_norm_eps": 1e-5, "qk_layernorm": True}, "qk_layernorm=True"),
        ({"model_type": "qwen2", "layer_types": ["chunked_attention"] * 2}, "layer_types entry 'chunked_attention'"),
    ],
)
def test_what_would_change_the_model_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        build_graph({**LLAMA, **change})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"scale_attn_weights": False}, {"scale_attn_by_inverse_layer_idx": True},
                                    {"add_cross_attention": True}])  # fmt: skip
def test_gpt2_quirks_are_refused(change: dict[str, Any]) -> None:
    config = {"model_type": "gpt2", "vocab_size": 131, "n_embd": 60, "n_layer": 2, "n_head": 5}
    check_graph(build_graph(config))
    with pytest.raises(UnsupportedModelError, match=next(iter(change))):
        build_graph({**config, **change})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": None}, "hidden_size must be a positive integer, found None"),
        ({"vocab_size": "131"}, "vocab_size must be a positive integer, found '131'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer, found 0"),
        ({"num_key_value_heads": 2}, "5 attention heads are not a multiple of 2"),
        ({"num_attention_heads": 7, "num_key_value_heads": 7}, "hidden_size 60 is not a multiple of 7"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps must be a number"),
        ({"rope_theta": -1}, "rope_theta must be a positive number, found -1"),
        (
            {"rope_scaling": {"type": "longrope"}},
            "original_max_position_embeddings must be a positive integer",
        ),
        (
            {"rope_scaling": {"type": "su", "short_factor": [1.0] * 5, "original_max_position_embeddings": 64}},
            "short_factor must be a list of 6 numbers",
        ),
        ({"rope_scaling": {"type": "linear"}}, "factor must be a positive number, found None"),
        ({"rope_scaling": [1]}, "rope_parameters must be an object"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "layer_types has 1 entries for 2 layers"),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 2}, "no sliding window is in use"),
    ],
)
def test_nonsense_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        build_graph({**LLAMA, **change})
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["LlamaForSequenceClassification"]}, "'LlamaForSequenceClassification' is not read; of"),
        ({"architectures": ["XForCausalLM"], "auto_map": {"AutoModel": "x.X"}}, "its code (auto_map) is not run; of"),
        ({"architectures": ["LlamaForCausalLM", "LlamaForTokenClassification"]}, "'LlamaForTokenClassification'"),
        ({"architectures": ["MistralForCausalLM"]}, "known: LlamaForCausalLM, LlamaModel"),
        ({"architectures": "LlamaForCausalLM"}, "architectures must be a list of class names"),
        ({"architectures": [["LlamaForCausalLM"]]}, "architectures must be a list of class names"),
    ],
)
def test_other_architectures_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        build_graph({**LLAMA, **change})
    assert words in str(caught.value)


def test_every_family_has_a_tiny_model() -> None:
    assert {config_of(case).model_type for case in [*CASES, *MORE_CASES]} == set(FAMILIES)


@pytest.mark.parametrize("row", FAMILIES.values(), ids=lambda row: row.name)
def test_architectures_are_transformers_own(row: Any) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

    expected = (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[row.name], MODEL_MAPPING_NAMES[row.name])
    assert row.architectures[:2] == expected


def test_code_that_comes_with_a_checkpoint_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        build_graph({**LLAMA, "architectures": ["LlamaForCausalLM"], "auto_map": {"AutoModel": "x.X"}})
    assert "auto_map" in caplog.text


ODD: list[Any] = [
    *(None, True, False, 0, -1, 3, 2**70, 1.5, math.inf, math.nan, "", "x", [], [1], ["a"], [[]], {}, {"a": 1}),
    *({"rope_type": []}, {"rope_type": "linear", "factor": []}, {"partial_rotary_factor": "x"}, {"rope_theta": "x"}),
]


@pytest.mark.parametrize("row", FAMILIES.values(), ids=lambda row: row.name)
def test_any_value_of_any_key_is_read_or_refused_in_one_line(row: Any) -> None:
    base = {**LLAMA, "model_type": row.name, **row.defaults}
    base |= {new: base[old] for old, new in row.keys.items() if old in base}
    base |= {row.eps_key: 1e-5, row.act_key: "gelu_new", "n_inner": 84}
    more = {"rope_scaling", "rope_parameters", "rope_theta", "head_dim", "layer_types", "tie_word_embeddings"}
    more |= {"architectures", "auto_map", "partial_rotary_factor", "sliding_window", "dtype"}
    described = Info((1,))
    said = ""
    for key in sorted({*base, *NEUTRAL, *more}):
        for value in ODD:
            try:
                build_graph({**base, key: value}, lambda _: described)
            except CheckpointError as error:
                said += f"{error}|"
    assert "config.json" in said
    assert "\n" not in said


def test_neutral_values_and_metadata_pass_silently(caplog: pytest.LogCaptureFixture) -> None:
    config = {**LLAMA, "pretraining_tp": 2, "attention_bias": False, "torch_dtype": "float16", "use_cache": True}
    config |= {"sliding_window": None, "rope_interleaved": False, "bos_token_id": 1, "transformers_version": "5.0"}
    with caplog.at_level(logging.WARNING):
        assert build_graph(config) == build_graph(LLAMA)
    assert not caplog.records


def test_unknown_keys_are_named_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        build_graph({**LLAMA, "unsloth_fixed": True})
    assert "unsloth_fixed" in caplog.text


@dataclass(frozen=True)
class Info:
    shape: tuple[int, ...]
    quant: QuantScheme | None = None


def described(case: str) -> dict[str, Info]:
    checkpoint = family_model(case).checkpoint
    return {name: Info(tuple(checkpoint.describe(name).shape)) for name in checkpoint.names()}


@pytest.mark.parametrize(
    ("case", "tensor"),
    [
        ("llama", "model.layers.1.self_attn.k_proj.weight"),
        ("gpt2", "transformer.h.2.attn.c_attn.bias"),
        ("phi", "lm_head.bias"),
        ("phi3", "model.layers.1.mlp.gate_up_proj.weight"),
    ],
)
def test_missing_tensor_is_named(case: str, tensor: str) -> None:
    tensors = described(case)
    del tensors[tensor]
    with pytest.raises(CheckpointError, match=f"tensor '{tensor}' is missing"):
        build_graph(family_model(case).checkpoint.config, tensors.get)


@pytest.mark.parametrize(
    ("case", "tensor", "found", "expected"),
    [
        ("llama", "model.layers.1.self_attn.k_proj.weight", (13, 60), [12, 60]),
        ("llama", "model.embed_tokens.weight", (130, 60), [131, 60]),
        ("gpt2", "transformer.h.2.attn.c_attn.weight", (180, 60), [60, 180]),
        ("gpt2", "transformer.h.0.attn.c_attn.bias", (240,), [180]),
        ("gpt2", "transformer.h.0.mlp.c_fc.weight", (240, 60), [60, 240]),
        ("phi3", "model.layers.2.self_attn.qkv_proj.weight", (180, 60), [84, 60]),
    ],
)
def test_wrong_shape_is_named(case: str, tensor: str, found: tuple[int, ...], expected: list[int]) -> None:
    tensors = {**described(case), tensor: Info(found)}
    with pytest.raises(CheckpointError) as caught:
        build_graph(family_model(case).checkpoint.config, tensors.get)
    assert f"tensor '{tensor}': expected shape {expected}, found {list(found)}" in str(caught.value)


def test_quantization_is_taken_from_the_checkpoint() -> None:
    scheme = QuantScheme(4, 20, False)
    tensors = described("gpt2")
    name = "transformer.h.1.attn.c_attn.weight"
    tensors[name] = Info((180, 60), scheme)  # a quantized weight is described as [N, K], Conv1D or not
    graph = build_graph(family_model("gpt2").checkpoint.config, tensors.get)
    check_graph(graph)
    part = graph.weights["layers.1.k_proj.weight"].parts[0]
    assert (part.tensor, part.transpose, part.rows) == (name, False, (60, 120))
    assert graph.weights["layers.1.k_proj.weight"].quant == scheme
    assert graph.weights["layers.0.k_proj.weight"].quant is None


def test_a_tied_head_reads_the_embedding() -> None:
    tied, untied = build_graph({**LLAMA, "tie_word_embeddings": True}), build_graph(LLAMA)
    assert tied.ops[-1].weights == ("embed.weight", "")
    assert untied.ops[-1].weights == ("lm_head.weight", "")


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("stored", [True, False])
def test_a_tied_head_that_is_stored_is_used_unless_it_is_the_same(same: bool, stored: bool) -> None:
    tensors = described("llama")
    if not stored:
        del tensors["lm_head.weight"]
    asked = []

    def compare(one: str, other: str) -> bool:
        asked.append((one, other))
        return same

    graph = build_graph({**LLAMA, "num_hidden_layers": 3, "tie_word_embeddings": True}, tensors.get, compare)
    assert graph.ops[-1].weights == ("lm_head.weight" if stored and not same else "embed.weight", "")
    assert asked == ([("lm_head.weight", "model.embed_tokens.weight")] if stored else [])
