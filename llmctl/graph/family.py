"""What a row of ``family_table.py`` says of one architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from llmctl.graph.rope_config import ROPE_TYPES

# True, False, or the name of the config key that decides (absent key = False).
Switch = bool | str


@dataclass(frozen=True)
class TensorNames:
    """Checkpoint modules (tensor names without ``.weight``/``.bias``); ``{i}`` is the layer, ``{e}`` the expert.

    Linears that name the same module are row slices of one tensor, in the order q, k, v or gate, up. A norm without a
    name is not there: one before attention or MLP (in a parallel layer, whose MLP then reads attention's input), or one
    of what they make, before it is added to the residual.
    """

    embed: str = "model.embed_tokens"
    pos_embed: str = ""
    attn_norm: str = "model.layers.{i}.input_layernorm"
    attn_out_norm: str = ""
    mlp_norm: str = "model.layers.{i}.post_attention_layernorm"
    mlp_out_norm: str = ""
    q: str = "model.layers.{i}.self_attn.q_proj"
    k: str = "model.layers.{i}.self_attn.k_proj"
    v: str = "model.layers.{i}.self_attn.v_proj"
    o: str = "model.layers.{i}.self_attn.o_proj"
    q_norm: str = "model.layers.{i}.self_attn.q_norm"
    k_norm: str = "model.layers.{i}.self_attn.k_norm"
    gate: str = "model.layers.{i}.mlp.gate_proj"
    up: str = "model.layers.{i}.mlp.up_proj"
    down: str = "model.layers.{i}.mlp.down_proj"
    router: str = "model.layers.{i}.mlp.gate"
    expert_gate: str = "model.layers.{i}.mlp.experts.{e}.gate_proj"
    expert_up: str = "model.layers.{i}.mlp.experts.{e}.up_proj"
    expert_down: str = "model.layers.{i}.mlp.experts.{e}.down_proj"
    shared_gate: str = "model.layers.{i}.mlp.shared_experts.gate_proj"
    shared_up: str = "model.layers.{i}.mlp.shared_experts.up_proj"
    shared_down: str = "model.layers.{i}.mlp.shared_experts.down_proj"
    shared_switch: str = ""
    final_norm: str = "model.norm"
    head: str = "lm_head"


@dataclass(frozen=True)
class Experts:
    """How the layers of a mixture of experts choose among them; how many there are, config.json says.

    Attributes:
        width: the config key of an expert's intermediate size.
        scores: what the router's logits become.
        renormalise: whether the shares of those chosen are made to add up to one.
        corrected: experts are chosen by score plus a bias of their own (``e_score_correction_bias``), within the best
            ``topk_group`` of ``n_group`` groups, and their shares are multiplied by ``routed_scaling_factor``.
        layers: those with experts: ``all``, by ``decoder_sparse_step`` and ``mlp_only_layers`` (``stepped``), or from
            ``first_k_dense_replace`` on (``after``).
        shared: the config key of the intermediate size of an expert that all tokens take, or (``n_shared_experts``) of
            how many experts it is as wide as; "": there is none. It is switched by a gate of its own where
            ``TensorNames.shared_switch`` names one.
    """

    width: str = "moe_intermediate_size"
    scores: Literal["softmax", "sigmoid"] = "softmax"
    renormalise: Switch = "norm_topk_prob"
    corrected: bool = False
    layers: Literal["all", "stepped", "after"] = "all"
    shared: str = ""


@dataclass(frozen=True)
class Family:
    """What distinguishes one architecture.

    Attributes:
        name: HF ``model_type``.
        architectures: HF classes whose checkpoints are read, the causal model's first.
        models: which are of it, for users.
        limits: what of the family is not read, or not computed as its authors do, for users.
        keys: canonical config key -> this family's spelling, where it differs from Llama's; the canonical one is read
            where a config has that alone.
        defaults: values that HF's config class supplies when config.json leaves a key out.
        norm: ``rms`` or ``layer`` (with bias, unless ``norm_bias`` is off); ``eps_key`` holds its epsilon.
        plus_one: norms multiply by 1 + weight.
        positions: ``rope`` or ``learned``.
        partial_rotary: the family honours ``partial_rotary_factor``.
        rope_types: the scalings of RoPE that it has here.
        rope_style: which columns of a head turn together: ``neox`` (i, i + half), ``gptj`` (2 i, 2 i + 1).
        rope_layers: the layers whose q and k are turned: ``all``, those with a window (``sliding``; also
            ``sliding_if_any``: all of a model without ``sliding_window``), those that ``no_rope_layers`` or
            ``no_rope_layer_interval`` leave (``listed``).
        local_theta: the config key of RoPE's base in layers with a window; "": the same as in the others. Such a
            family's ``rope_parameters`` may be by layer type, and ``rope_scaling`` is of full attention alone.
        query_scale: from a position on queries grow with theirs (``llama_4_scaling_beta``); contexts go up to
            there.
        gated: the MLP is ``down(act(gate(x)) * up(x))``, else ``down(act(up(x)))``.
        parallel: attention and MLP are added to the residual together.
        experts: how MLPs are chosen among; None: each layer has one.
        qk_norm: q and k are RMS-normalised before RoPE: each ``head``, or the whole ``row``.
        qk_normed: whether they are.
        bias_qkv, bias_o, bias_mlp, bias_head: which linears have a bias.
        window: ``none``, ``all`` (``sliding_window`` on every layer), ``switched`` (likewise, where
            ``use_sliding_window``), ``by_layer`` (``use_sliding_window``, ``max_window_layers``, ``layer_types``) or
            ``typed`` (``layer_types``; where that is absent, every ``sliding_window_pattern``-th layer has none).
        conv1d: layer linears are stored ``[in, out]``.
        heads_in_qkv: the shared module of q, k and v has them head by head, not one after the other.
        factors: which of ``config_keys.FACTORS`` the family honours.
        sqrt_embed: embeddings are multiplied by the square root of their width.
        wide_range: activations of its models leave float16's range.
        neutral: config keys that must have one of these values here, on top of (or instead of) ``NEUTRAL``.
    """

    name: str
    architectures: tuple[str, ...]
    models: str = ""
    limits: str = ""
    names: TensorNames = field(default_factory=TensorNames)
    keys: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    norm: Literal["rms", "layer"] = "rms"
    norm_bias: bool = True
    plus_one: bool = False
    eps_key: str = "rms_norm_eps"
    act_key: str = "hidden_act"
    positions: Literal["rope", "learned"] = "rope"
    partial_rotary: bool = False
    rope_types: tuple[str, ...] = ROPE_TYPES
    rope_style: Literal["neox", "gptj"] = "neox"
    rope_layers: Literal["all", "sliding", "sliding_if_any", "listed"] = "all"
    local_theta: str = ""
    query_scale: bool = False
    gated: bool = True
    parallel: Switch = False
    experts: Experts | None = None
    qk_norm: Literal["none", "head", "row"] = "none"
    qk_normed: Switch = True
    bias_qkv: Switch = False
    bias_o: Switch = False
    bias_mlp: Switch = False
    bias_head: bool = False
    window: Literal["none", "all", "switched", "by_layer", "typed"] = "none"
    conv1d: bool = False
    heads_in_qkv: bool = False
    factors: tuple[str, ...] = ()
    sqrt_embed: bool = False
    wide_range: bool = False
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    @property
    def base(self) -> str:
        """The base model's attribute in the causal model, which names of its tensors start with."""
        return self.names.embed.partition(".")[0]
