"""What is told of each GGUF architecture: a row each, its fields of config.json, and the keys that say them in a file.

Sources: llama.cpp's convert_hf_to_gguf.py (what it writes of each class), gguf-py's tensor name map, and llama.cpp's
own models for what a file leaves out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llmctl.checkpoint.gguf_gemma import gemma2_fields, gemma2_keys, gemma3_fields, gemma3_keys
from llmctl.checkpoint.gguf_keys import Keys, is_set
from llmctl.checkpoint.gguf_phi import phi3_fields, phi3_keys
from llmctl.errors import UnsupportedModelError
from llmctl.graph.config_reader import ConfigReader
from llmctl.graph.hf_config import Arch

Fields = Callable[[Keys, Mapping[str, Any]], dict[str, Any]]
"""Fields of a family's config, of its keys and what is known already."""
MakeKeys = Callable[[Arch, ConfigReader], dict[str, Any]]
"""The other way round: keys, without the architecture's name, of a model and its config."""

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_BLOCK = {**_ATTENTION, **_MLP}
_GEMMA_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_OLMO_NORMS = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_FUSED = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj"}
ROUTER = "ffn_gate_inp"
"""GGUF's name of the module that chooses experts, whose weight is float32."""
EXPERT = "{e}"
"""In a name: the stored tensor holds all experts, its first axis, and is seen as one an expert."""


def _experts(router: str, gate: str, up: str, down: str) -> dict[str, str]:
    projections = {"gate": gate, "up": up, "down": down}
    return {ROUTER: router} | {f"ffn_{ours}_exps": theirs for ours, theirs in projections.items()}


_OF_MLP, _SPARSE = f"mlp.experts.{EXPERT}.", f"block_sparse_moe.experts.{EXPERT}."
_EXPERTS = _experts("mlp.gate", f"{_OF_MLP}gate_proj", f"{_OF_MLP}up_proj", f"{_OF_MLP}down_proj")
_MIXTRAL = _experts("block_sparse_moe.gate", f"{_SPARSE}w1", f"{_SPARSE}w3", f"{_SPARSE}w2")
_GRANITE_MOE = _experts(
    "block_sparse_moe.router.layer", f"{_SPARSE}gate_proj", f"{_SPARSE}up_proj", f"{_SPARSE}down_proj"
)
ONE_ROW = "mlp.shared_expert_gate"
"""The module whose matrix has one row, and is stored as a vector."""
_SHARED = {
    "ffn_gate_inp_shexp": ONE_ROW,
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}


@dataclass(frozen=True)
class ArchFacts:
    """One GGUF architecture.

    Attributes:
        architecture: HF class name.
        model_type: HF's; None: the GGUF architecture's name.
        permuted: llama.cpp stores Q and K rows permuted for its interleaved rotary embedding.
        norm_plus_one: llama.cpp stores 1 + w for the weight w of a norm.
        blocks: names of a layer's tensors, GGUF's to HF's.
        extra: config fields that are constants of the family.
        biased: whether linears have biases is said by config.json, and here by the tensors.
        fields, keys: of the family alone; what ``keys`` cannot say, ``check_same_model`` refuses.
        windows, experts, partial: whether ``fields`` reads sliding windows, experts, a rotary embedding of some of the
            columns.
    """

    architecture: str
    model_type: str | None = None
    permuted: bool = False
    norm_plus_one: bool = False
    blocks: Mapping[str, str] = field(default_factory=lambda: _BLOCK)
    extra: Mapping[str, Any] = field(default_factory=lambda: {"hidden_act": "silu"})
    biased: bool = False
    fields: Fields = lambda keys, config: {}  # noqa: ARG005
    keys: MakeKeys = lambda arch, reader: {}  # noqa: ARG005
    windows: bool = False
    experts: bool = False
    partial: bool = False


_GRANITE = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}


def _granite_fields(keys: Keys, _: Mapping[str, Any]) -> dict[str, Any]:
    return {ours: keys.number(theirs) for theirs, ours in _GRANITE.items() if keys.get(theirs) is not None}


def _granite_keys(_: Arch, reader: ConfigReader) -> dict[str, Any]:
    return {theirs: reader.factor(ours) for theirs, ours in _GRANITE.items()}


def _smollm3_fields(_: Keys, config: Mapping[str, Any]) -> dict[str, Any]:
    """Every fourth layer has no rotary embedding, which no file says."""
    layers = range(config["num_hidden_layers"])
    return {"no_rope_layers": [int((layer + 1) % 4 != 0) for layer in layers], "use_sliding_window": False}


def _expert_counts(keys: Keys, _: Mapping[str, Any], name: str = "num_experts") -> dict[str, Any]:
    return {name: keys.integer("expert_count"), "num_experts_per_tok": keys.integer("expert_used_count")}


def _local_expert_counts(keys: Keys, config: Mapping[str, Any]) -> dict[str, Any]:
    return _expert_counts(keys, config, "num_local_experts")


def _granite_moe_fields(keys: Keys, config: Mapping[str, Any]) -> dict[str, Any]:
    return {**_granite_fields(keys, config), **_local_expert_counts(keys, config)}


def _expert_keys(arch: Arch, _: ConfigReader) -> dict[str, Any]:
    assert arch.mixture is not None
    return {"expert_count": arch.mixture.count, "expert_used_count": arch.mixture.chosen}


def _granite_moe_keys(arch: Arch, reader: ConfigReader) -> dict[str, Any]:
    return {**_granite_keys(arch, reader), **_expert_keys(arch, reader)}


def _wide_expert_keys(arch: Arch, reader: ConfigReader) -> dict[str, Any]:
    assert arch.mixture is not None
    return {**_expert_keys(arch, reader), "expert_feed_forward_length": arch.mixture.width}


def _shared_expert_keys(arch: Arch, reader: ConfigReader) -> dict[str, Any]:
    assert arch.mixture is not None
    return {**_wide_expert_keys(arch, reader), "expert_shared_feed_forward_length": arch.mixture.shared_width}


def _expert_fields(keys: Keys, config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **_expert_counts(keys, config),
        "moe_intermediate_size": keys.integer("expert_feed_forward_length"),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _shared_expert_fields(keys: Keys, config: Mapping[str, Any]) -> dict[str, Any]:
    width = keys.integer("expert_shared_feed_forward_length")
    return {**_expert_fields(keys, config), "shared_expert_intermediate_size": width}


_SILU = {"hidden_act": "silu"}
_QWEN = {**_SILU, "use_sliding_window": False}
ARCHITECTURES: dict[str, ArchFacts] = {
    "llama": ArchFacts("LlamaForCausalLM", permuted=True, biased=True),
    "llama+experts": ArchFacts(
        "MixtralForCausalLM",
        model_type="mixtral",
        permuted=True,
        blocks={**_ATTENTION, **_MIXTRAL},
        fields=_local_expert_counts,
        keys=_expert_keys,
        experts=True,
    ),
    "qwen2": ArchFacts("Qwen2ForCausalLM", extra=_QWEN),
    "qwen2moe": ArchFacts(
        "Qwen2MoeForCausalLM",
        model_type="qwen2_moe",
        blocks={**_ATTENTION, **_EXPERTS, **_SHARED},
        extra={**_QWEN, "norm_topk_prob": False},
        fields=_shared_expert_fields,
        keys=_shared_expert_keys,
        experts=True,
    ),
    "qwen3": ArchFacts("Qwen3ForCausalLM", extra={**_QWEN, "attention_bias": False}),
    "qwen3moe": ArchFacts(
        "Qwen3MoeForCausalLM",
        model_type="qwen3_moe",
        blocks={**_ATTENTION, **_EXPERTS},
        extra={**_QWEN, "attention_bias": False, "norm_topk_prob": True},
        fields=_expert_fields,
        keys=_wide_expert_keys,
        experts=True,
    ),
    "gemma2": ArchFacts(
        "Gemma2ForCausalLM",
        norm_plus_one=True,
        blocks=_BLOCK | _GEMMA_NORMS,
        extra={"attention_bias": False},
        fields=gemma2_fields,
        keys=gemma2_keys,
        windows=True,
    ),
    "gemma3": ArchFacts(
        "Gemma3ForCausalLM",
        model_type="gemma3_text",
        norm_plus_one=True,
        blocks=_BLOCK | _GEMMA_NORMS,
        extra={"attention_bias": False},
        fields=gemma3_fields,
        keys=gemma3_keys,
        windows=True,
    ),
    "granite": ArchFacts("GraniteForCausalLM", permuted=True, biased=True, fields=_granite_fields, keys=_granite_keys),
    "granitemoe": ArchFacts(
        "GraniteMoeForCausalLM",
        permuted=True,
        blocks={**_ATTENTION, **_GRANITE_MOE},
        biased=True,
        fields=_granite_moe_fields,
        keys=_granite_moe_keys,
        experts=True,
    ),
    "olmoe": ArchFacts(
        "OlmoeForCausalLM",
        blocks={**_ATTENTION, **_EXPERTS},
        extra={**_SILU, "attention_bias": False, "norm_topk_prob": False},
        fields=_expert_counts,
        keys=_expert_keys,
        experts=True,
    ),
    "olmo2": ArchFacts("Olmo2ForCausalLM", blocks={**_BLOCK, **_OLMO_NORMS}, extra={**_SILU, "attention_bias": False}),
    "phi3": ArchFacts(
        "Phi3ForCausalLM",
        blocks={**_ATTENTION, **_FUSED},
        fields=phi3_fields,
        keys=phi3_keys,
        windows=True,
        partial=True,
    ),
    "smollm3": ArchFacts("SmolLM3ForCausalLM", permuted=True, fields=_smollm3_fields),
}
"""By GGUF's name; the same name with ``+experts`` where a file's metadata count some and that is another model."""


def row_of(metadata: Mapping[str, Any], where: str) -> str:
    """The row of a file.

    Raises:
        UnsupportedModelError: there is none.
    """
    name = str(metadata.get("general.architecture"))
    if name not in ARCHITECTURES:
        known = ", ".join(sorted(set(map(gguf_architecture, ARCHITECTURES))))
        raise UnsupportedModelError(f"{where}: GGUF architecture '{name}' is not read; known: {known}")
    of_experts = f"{name}+experts"
    return of_experts if of_experts in ARCHITECTURES and is_set(metadata.get(f"{name}.expert_count")) else name


ROW_OF_FAMILY: dict[str, str] = {
    **{facts.model_type or row: row for row, facts in ARCHITECTURES.items()},
    "mistral": "llama",
}
"""By HF's ``model_type``."""


def gguf_architecture(row: str) -> str:
    """GGUF's name of a row's architecture."""
    return row.partition("+")[0]
