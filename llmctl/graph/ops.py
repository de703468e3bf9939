"""The op kinds, each declared once: what it takes, makes and computes, and what holds an op to that.

Whoever executes or rewrites ops has a table by kind of its own; tests/targets/test_op_kinds.py holds every target's
against ``OP_KINDS``. Nothing here knows a device or a tensor library: a reference function is named, not imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from llmctl.graph import shapes
from llmctl.graph.graph import Op
from llmctl.graph.shapes import ShapeRule

ROPE_FIELDS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position"),
    "yarn": ("factor", "beta_fast", "beta_slow", "original_max_position", "attention_factor", "truncate"),
    "longrope": ("factors", "attention_factor"),
}
"""``rope_type`` -> the attributes it needs besides: HF's ``rope_parameters``, defaults resolved. An
``attention_factor`` multiplies cos and sin, ``truncate`` is a bool; targets/rope.py has the formulas."""

_ROPE = "heads kv_heads head_dim rotary_dim theta style rope_type"


@dataclass(frozen=True)
class OpKind:
    """A kind of op.

    Attributes:
        name: what ``Op.kind`` says.
        computes: in one line, by the names that follow.
        inputs, outputs, weights: of a plain op of the kind, in order.
        optional: the weights that may be absent, ``""``.
        attrs: attributes that every op of the kind has; ``rope_type`` brings those of ``ROPE_FIELDS``.
        shapes: raises ValueError where widths, weights and attributes do not fit together.
        reference: its function in targets/reference/kernels.py.
        int8_rows: the first two outputs are integers -127..127 and, of width 1, what each row of them is multiplied by.
        after_add: the kind that adds a residual to x first, and makes the sum too; "" when there is none.
        as_int8: the kind whose first output is int8 rows instead; "" when there is none.
        variants: attributes that an op may have besides, and what they change.
    """

    name: str
    computes: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: tuple[str, ...]
    optional: frozenset[str]
    attrs: tuple[str, ...]
    shapes: ShapeRule
    reference: str
    int8_rows: bool = False
    after_add: str = ""
    as_int8: str = ""
    variants: Mapping[str, str] = field(default_factory=dict)

    def counts(self, op: Op) -> dict[str, int]:
        """How many inputs, outputs and weights an op has, its variants counted in."""
        return {
            "inputs": len(self.inputs) + ("activations" in op.attrs) + ("residual" in op.attrs),
            "outputs": len(op.attrs["splits"]) if "splits" in op.attrs else len(self.outputs),
            "weights": op.attrs["count"] if "apart" in op.attrs else len(self.weights),
        }


def _kind(
    name: str,
    flow: str,
    rule: ShapeRule,
    reference: str,
    computes: str,
    *,
    weights: str = "",
    attrs: str = "",
    int8_rows: bool = False,
    after_add: str = "",
    as_int8: str = "",
    variants: Mapping[str, str] | None = None,
) -> OpKind:
    """``flow`` is ``inputs -> outputs``; a ``?`` marks a weight that may be absent."""
    inputs, _, outputs = flow.partition("->")
    names = tuple(weight.removesuffix("?") for weight in weights.split())
    optional = frozenset(weight.removesuffix("?") for weight in weights.split() if weight.endswith("?"))
    return OpKind(
        name, computes, tuple(inputs.split()), tuple(outputs.split()), names, optional, tuple(attrs.split()),
        rule, reference, int8_rows, after_add, as_int8, variants or {},
    )  # fmt: skip


_LINEAR_VARIANTS = {
    "splits": "(O1, O2, …): as many outputs, from w [O1 + O2 + …, I]",
    "epilogue": "silu_mul|gelu_mul|gelu_tanh_mul|relu_mul: y = fn(gate) * up, from w [2 F, I] with gate's rows first",
    "residual": "True: one more input, the last, which is added to the one output",
    "scale": "a float: y = that times the product",
    "softcap": "a float: y = softcap * tanh(y / softcap), of what is scaled",
    "activations": '"int8": x is two inputs, int8 rows and their scales',
}

_GROUPED_VARIANTS = {
    "epilogue": "as a linear's, from w [E 2 F, I] with each expert's gate above its up",
    "apart": "True: a weight [O, I] an expert, for quantization",
}

_PLUS_ONE = {"plus_one": "True: * (1 + w)"}

_DECLARED = (
    # plain: what families write
    _kind("embed", "ids -> x", shapes.embed, "embed", "x = w[ids] * scale, a float; w [V, H]",
          weights="w", attrs="scale"),
    _kind("pos_embed", "x positions -> y", shapes.pos_embed, "pos_embed",
          "y = x + w[positions + offset], an int; w [P, H]", weights="w", attrs="offset"),
    _kind("rms_norm", "x -> y", shapes.rowwise, "rms_norm",
          "y = x / sqrt(mean(x^2) + eps) * w [H]; plus_one: * (1 + w), as Gemma",
          weights="w", attrs="eps plus_one", after_add="add_rms_norm", as_int8="rms_norm_s8"),
    _kind("layer_norm", "x -> y", shapes.rowwise, "layer_norm",
          "y = (x - mean(x)) / sqrt(var(x) + eps) * w [H] + b [H]",
          weights="w b?", attrs="eps", after_add="add_layer_norm", as_int8="layer_norm_s8", variants=_PLUS_ONE),
    _kind("head_rms_norm", "x -> y", shapes.head_norm, "head_rms_norm", "y = rms_norm of each head of x; w [head_dim]",
          weights="w", attrs="eps heads head_dim", variants=_PLUS_ONE),
    _kind("linear", "x -> y", shapes.linear, "linear", "y = x @ w.T + b; w [O, I], b [O]",
          weights="w b?", variants=_LINEAR_VARIANTS),
    # experts: what each token's chosen ones make lies side by side, in the order in which they were chosen
    _kind("route", "logits -> experts shares", shapes.route, "route",
          "scores of the logits [E], softmax|sigmoid; experts: the top_k of highest score + bias [E], out of the "
          "top_groups of groups with the highest sum of two; shares: scores, renormalise: over their sum, * scale",
          weights="bias?", attrs="top_k scores renormalise scale groups top_groups"),
    _kind("grouped_linear", "x experts -> y", shapes.grouped_linear, "grouped_linear",
          "y [k O] = x @ w[e].T for each of the token's k experts e; w [E O, I], one expert below the other; x: one "
          "[I] for all of them, or side by side [k I]",
          weights="w", attrs="count", variants=_GROUPED_VARIANTS),
    _kind("weighted_sum", "x shares -> y", shapes.weighted_sum, "weighted_sum",
          "y [H] = sum of share * part over the parts of x [k H]", variants={"sigmoid": "True: shares are logits"}),
    _kind("act", "x -> y", shapes.act, "act", "y = fn(x); fn: silu|gelu|gelu_tanh|relu", attrs="fn"),
    _kind("mul", "x y -> z", shapes.rowwise, "mul", "z = x * y"),
    _kind("add", "x y -> z", shapes.rowwise, "add", "z = x + y"),
    _kind("rope", "q k positions -> q2 k2", shapes.rope, "rope",
          "the first rotary_dim columns of every head turned by its token's position; style: neox|gptj", attrs=_ROPE),
    _kind("kv_write", "k v ->", shapes.kv_write, "kv_write",
          "every token's k and v go to its slot of the layer's KV cache", attrs="layer"),
    _kind("attention", "q -> o", shapes.attention, "paged_attention",
          "softmax attention over the cached context of each token's sequence; window, softcap: 0 means none",
          attrs="layer heads kv_heads head_dim scale window softcap"),
    _kind("gather_rows", "x -> y", shapes.rowwise, "gather_rows", "y = the rows of x whose logits are wanted"),
    # fused: what passes make
    _kind("add_rms_norm", "x residual -> y sum", shapes.rowwise, "add_rms_norm",
          "sum = x + residual; y = rms_norm(sum)", weights="w", attrs="eps plus_one", as_int8="add_rms_norm_s8"),
    _kind("add_layer_norm", "x residual -> y sum", shapes.rowwise, "add_layer_norm",
          "sum = x + residual; y = layer_norm(sum)", weights="w b?", attrs="eps", as_int8="add_layer_norm_s8",
          variants=_PLUS_ONE),
    _kind("rope_kv_write", "q k v positions -> q2", shapes.rope_kv_write, "rope_kv_write",
          "rope of q and k; the turned k and v go where kv_write puts them", attrs=f"{_ROPE} layer"),
    # int8 activations: what int8_activations makes
    _kind("quantize", "x -> q scale", shapes.rowwise, "quantize_rows",
          "scale = max|x| / 127 of each row; q = round(x / scale)", int8_rows=True),
    _kind("rms_norm_s8", "x -> q scale", shapes.rowwise, "rms_norm_s8", "q, scale = quantize(rms_norm(x))",
          weights="w", attrs="eps plus_one", int8_rows=True),
    _kind("layer_norm_s8", "x -> q scale", shapes.rowwise, "layer_norm_s8", "q, scale = quantize(layer_norm(x))",
          weights="w b?", attrs="eps", int8_rows=True, variants=_PLUS_ONE),
    _kind("add_rms_norm_s8", "x residual -> q scale sum", shapes.rowwise, "add_rms_norm_s8",
          "sum = x + residual; q, scale = quantize(rms_norm(sum))", weights="w", attrs="eps plus_one", int8_rows=True),
    _kind("add_layer_norm_s8", "x residual -> q scale sum", shapes.rowwise, "add_layer_norm_s8",
          "sum = x + residual; q, scale = quantize(layer_norm(sum))", weights="w b?", attrs="eps", int8_rows=True,
          variants=_PLUS_ONE),
    _kind("act_mul_s8", "x -> q scale", shapes.act_mul, "act_mul_s8", "q, scale = quantize(act_mul(x))",
          attrs="fn", int8_rows=True),
    # adapters: what graph.lora makes. Their weights are the runtime's, by the op's name; a token has its own, or none.
    _kind("lora", "x y -> z", shapes.lora, "lora",
          "z[:, column:][:, :rows] = y + scale * (x @ A.T) @ B.T, z = y elsewhere; A [rank, I] and B are those of rows "
          "from first_row on of the checkpoint's module", attrs="module first_row rows column rank"),
    _kind("act_mul", "x -> y", shapes.act_mul, "act_mul", "y = fn(gate) * up; x is gate's columns, then up's",
          attrs="fn", as_int8="act_mul_s8"),
)  # fmt: skip

OP_KINDS: Mapping[str, OpKind] = {kind.name: kind for kind in _DECLARED}
"""Every kind by its name."""
