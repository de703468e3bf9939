"""HF config (+ what the checkpoint holds) -> plain Graph. One builder over the rows of ``family_table.py``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llmctl.graph.family import TensorNames
from llmctl.graph.graph import INPUT_IDS, LOGITS, POSITIONS, Attr, Buffer, Graph, KVLayer
from llmctl.graph.graph_writer import GraphWriter, Lookup
from llmctl.graph.hf_config import Arch, read_arch
from llmctl.graph.mixture_config import Mixture

Same = Callable[[str, str], bool]


def build_graph(config: Mapping[str, Any], lookup: Lookup | None = None, same: Same | None = None) -> Graph:
    """The plain Graph of a model.

    Args:
        config: HF ``config.json``.
        lookup: tensor name -> its description, None when the checkpoint does not hold it. Without a lookup every
            tensor is taken to be there, dense and of the right shape.
        same: whether two tensors hold the same numbers. A head that is stored although the config ties it to the
            embeddings is tied to them only if it equals them (transformers' rule, and vLLM's); None: it does.

    Raises:
        UnsupportedModelError: family or setting that is not supported.
        CheckpointError: bad config; a tensor that is missing or has another shape than the config implies.
    """
    return _Builder(read_arch(config), lookup, same).build()


class _Builder(GraphWriter):
    """Writes one model's graph."""

    def __init__(self, arch: Arch, lookup: Lookup | None, same: Same | None) -> None:
        super().__init__(arch.family.name, lookup)
        self.arch = arch
        self.names: TensorNames = arch.family.names
        self.same = same

    def build(self) -> Graph:
        arch = self.arch
        x = self._embed()
        for self.layer in range(arch.num_layers):
            x = self._decoder_layer(x)
        self.layer = arch.num_layers
        x = self._norm("final_norm", self.names.final_norm, x)
        x = self._op("gather_rows", "gather", (x,), arch.hidden_size)
        self._head(x)
        return Graph(
            family=arch.family.name,
            vocab_size=arch.vocab_size,
            hidden_size=arch.hidden_size,
            num_layers=arch.num_layers,
            max_position=arch.max_position,
            kv=tuple(KVLayer(arch.kv_heads, arch.head_dim, window) for window in arch.windows),
            buffers=self.buffers,
            weights=self.weights,
            ops=tuple(self.ops),
        )

    # parts of a model

    def _embed(self) -> str:
        arch = self.arch
        shape = (arch.vocab_size, arch.hidden_size)
        weight = self._weight("embed.weight", shape, f"{self.names.embed}.weight")
        x = self._op("embed", "embed", (INPUT_IDS,), arch.hidden_size, (weight,), {"scale": arch.embed_scale})
        if arch.family.positions == "rope":
            return x
        shape = (arch.max_position, arch.hidden_size)
        weight = self._weight("pos_embed.weight", shape, f"{self.names.pos_embed}.weight")
        return self._op("pos_embed", "pos_embed", (x, POSITIONS), arch.hidden_size, (weight,), {"offset": 0})

    def _decoder_layer(self, x: str) -> str:
        names, hidden = self.names, self.arch.hidden_size
        normed = self._layer_norm("attn_norm", names.attn_norm, x)
        attended = self._layer_norm("attn_out_norm", names.attn_out_norm, self._attention(normed))
        if self.arch.parallel:
            own = self._layer_norm("mlp_norm", names.mlp_norm, x) if names.mlp_norm else normed
            branch = self._op("add", self._name("parallel_add"), (attended, self._mlp(own)), hidden)
            return self._op("add", self._name("residual"), (branch, x), hidden)
        x = self._op("add", self._name("attn_residual"), (attended, x), hidden)
        made = self._mlp(self._layer_norm("mlp_norm", names.mlp_norm, x))
        made = self._layer_norm("mlp_out_norm", names.mlp_out_norm, made)
        return self._op("add", self._name("mlp_residual"), (made, x), hidden)

    def _layer_norm(self, role: str, module: str, x: str) -> str:
        """A norm of this layer; ``x`` itself where the family has none."""
        return self._norm(self._name(role), module, x) if module else x

    def _attention(self, x: str) -> str:
        arch, names = self.arch, self.names
        q_width, kv_width = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
        modules = {"q_proj": (names.q, q_width), "k_proj": (names.k, kv_width), "v_proj": (names.v, kv_width)}
        in_turn = arch.heads if arch.family.heads_in_qkv else 1
        q, k, v = self._linears(modules, x, arch.hidden_size, arch.bias_qkv, in_turn)
        q = self._qk_norm("q_norm", names.q_norm, q, arch.heads)
        k = self._qk_norm("k_norm", names.k_norm, k, arch.kv_heads)
        heads: dict[str, Attr] = {"heads": arch.heads, "kv_heads": arch.kv_heads, "head_dim": arch.head_dim}
        rope = arch.ropes[self.layer]
        if rope is not None:
            q, k = self._ops("rope", self._name("rope"), (q, k, POSITIONS), (q_width, kv_width), (), {**heads, **rope})
        self._ops("kv_write", self._name("kv_write"), (k, v), (), (), {"layer": self.layer})
        attrs = {
            **heads,
            "layer": self.layer,
            "scale": arch.attention_scale,
            "window": arch.windows[self.layer],
            "softcap": arch.attention_cap,
        }
        o = self._op("attention", self._name("attention"), (q,), q_width, (), attrs)
        return self._linears({"o_proj": (names.o, arch.hidden_size)}, o, q_width, arch.bias_o)[0]

    def _mlp(self, x: str) -> str:
        mixture = self.arch.mixture
        if mixture is not None and mixture.layers[self.layer]:
            return self._mixture(x, mixture)
        names = self.names
        return self._one_mlp(x, (names.gate, names.up, names.down), self.arch.intermediate_size)

    def _one_mlp(self, x: str, modules: tuple[str, str, str], width: int, prefix: str = "") -> str:
        """``modules``: gate, up, down. ``prefix``: of the ops' roles."""
        arch, (gate_module, up_module, down_module) = self.arch, modules
        roles = {f"{prefix}gate_proj": (gate_module, width), f"{prefix}up_proj": (up_module, width)}
        if arch.family.gated:
            gate, up = self._linears(roles, x, arch.hidden_size, arch.bias_mlp)
            h = self._op("mul", self._name(f"{prefix}gate_mul"), (self._act(gate, width, prefix), up), width)
        else:
            up = self._linears({f"{prefix}up_proj": (up_module, width)}, x, arch.hidden_size, arch.bias_mlp)[0]
            h = self._act(up, width, prefix)
        return self._linears({f"{prefix}down_proj": (down_module, arch.hidden_size)}, h, width, arch.bias_mlp)[0]

    def _act(self, x: str, width: int, prefix: str = "") -> str:
        fn = self.arch.activation
        h = self._op("act", self._name(f"{prefix}act"), (x,), width, (), {"fn": fn.removesuffix("2")})
        return self._op("mul", self._name(f"{prefix}square"), (h, h), width) if fn == "relu2" else h

    def _mixture(self, x: str, mixture: Mixture) -> str:
        """The chosen experts' MLPs by their shares, and the one that all tokens take."""
        hidden, names, chosen = self.arch.hidden_size, self.names, mixture.chosen
        logits = self._linears({"router": (names.router, mixture.count)}, x, hidden, bias=False)[0]
        experts, shares = self._route(logits, mixture)
        wide = chosen * mixture.width
        gate = self._grouped("gate_proj", names.expert_gate, (x, experts), (mixture.width, hidden), mixture)
        up = self._grouped("up_proj", names.expert_up, (x, experts), (mixture.width, hidden), mixture)
        h = self._op("mul", self._name("experts.gate_mul"), (self._act(gate, wide, "experts."), up), wide)
        made = self._grouped("down_proj", names.expert_down, (h, experts), (hidden, mixture.width), mixture)
        y = self._op("weighted_sum", self._name("experts.sum"), (made, shares), hidden)
        if not mixture.shared_width:
            return y
        modules = (names.shared_gate, names.shared_up, names.shared_down)
        shared = self._one_mlp(x, modules, mixture.shared_width, "shared.")
        if names.shared_switch:
            switch = self._linears({"shared.switch": (names.shared_switch, 1)}, x, hidden, bias=False)[0]
            name = self._name("shared.switched")
            shared = self._op("weighted_sum", name, (shared, switch), hidden, (), {"sigmoid": True})
        return self._op("add", self._name("shared.add"), (y, shared), hidden)

    def _route(self, logits: str, mixture: Mixture) -> tuple[str, ...]:
        facts, bias = self.arch.family.experts, ""
        if facts is not None and facts.corrected:
            tensor = f"{self.names.router.format(i=self.layer)}.e_score_correction_bias"
            bias = self._weight(self._name("route.bias"), (mixture.count,), tensor)
        widths = (mixture.chosen, mixture.chosen)
        return self._ops("route", self._name("route"), (logits,), widths, (bias,), mixture.routing)

    def _grouped(
        self, role: str, module: str, inputs: tuple[str, str], shape: tuple[int, int], mixture: Mixture
    ) -> str:
        """A product of each token with its experts' matrices, ``shape`` [out, in] each."""
        name = self._name(f"experts.{role}")
        tensors = [f"{module.format(i=self.layer, e=e)}.weight" for e in range(mixture.count)]
        weight = self._stacked_weight(f"{name}.weight", shape, tensors)
        width = mixture.chosen * shape[0]
        return self._op("grouped_linear", name, inputs, width, (weight,), {"count": mixture.count})

    def _head(self, x: str) -> None:
        arch, head = self.arch, self.names.head
        if self._is_tied():
            weights = ["embed.weight"]
        else:
            weights = [self._weight("lm_head.weight", (arch.vocab_size, arch.hidden_size), f"{head}.weight")]
        bias = self._weight("lm_head.bias", (arch.vocab_size,), f"{head}.bias") if arch.family.bias_head else ""
        self.buffers[LOGITS] = Buffer(LOGITS, arch.vocab_size)
        attrs: dict[str, Attr] = {} if arch.logit_scale == 1.0 else {"scale": arch.logit_scale}
        attrs |= {"softcap": arch.logit_cap} if arch.logit_cap else {}
        self._append("linear", "lm_head", (x,), (LOGITS,), (*weights, bias), attrs)

    def _is_tied(self) -> bool:
        head, embed = f"{self.names.head}.weight", f"{self.names.embed}.weight"
        if not self.arch.tied or self.lookup is None or self.lookup(head) is None:
            return self.arch.tied
        return self.same is None or self.same(head, embed)

    # pieces

    def _name(self, role: str) -> str:
        return f"layers.{self.layer}.{role}"

    def _norm(self, name: str, module: str, x: str, width: int = 0) -> str:
        """A norm over the ``width`` columns of x, by default those of the residual stream."""
        family, width, module = self.arch.family, width or self.arch.hidden_size, module.format(i=self.layer)
        weights = [self._weight(f"{name}.weight", (width,), f"{module}.weight")]
        attrs: dict[str, Attr] = {"eps": self.arch.eps}
        if family.norm == "rms":
            return self._op("rms_norm", name, (x,), width, weights, {**attrs, "plus_one": family.plus_one})
        attrs |= {"plus_one": True} if family.plus_one else {}
        weights.append(self._weight(f"{name}.bias", (width,), f"{module}.bias") if family.norm_bias else "")
        return self._op("layer_norm", name, (x,), width, weights, attrs)

    def _qk_norm(self, role: str, module: str, x: str, heads: int) -> str:
        family, dim, name = self.arch.family, self.arch.head_dim, self._name(role)
        if not self.arch.qk_normed:
            return x
        if family.qk_norm == "row":
            return self._norm(name, module, x, heads * dim)
        weight = self._weight(f"{name}.weight", (dim,), f"{module.format(i=self.layer)}.weight")
        attrs: dict[str, Attr] = {"eps": self.arch.eps, "heads": heads, "head_dim": dim}
        attrs |= {"plus_one": True} if family.plus_one else {}
        return self._op("head_rms_norm", name, (x,), heads * dim, (weight,), attrs)

    def _linears(
        self, modules: Mapping[str, tuple[str, int]], x: str, width: int, bias: bool, in_turn: int = 1
    ) -> list[str]:
        """One linear per role over the input ``x``; roles that share a module get a row slice of it, one after the
        other, or as many as ``in_turn`` each, taking turns."""
        outputs = []
        for role, (module, out) in modules.items():
            rows, total = _row_slices(modules, role, in_turn)
            name, module = self._name(role), module.format(i=self.layer)
            conv1d = self.arch.family.conv1d
            weights = [self._weight(f"{name}.weight", (out, width), f"{module}.weight", rows, total, conv1d)]
            weights.append(self._weight(f"{name}.bias", (out,), f"{module}.bias", rows, total) if bias else "")
            outputs.append(self._op("linear", name, (x,), out, weights))
        return outputs


def _row_slices(
    modules: Mapping[str, tuple[str, int]], role: str, in_turn: int
) -> tuple[tuple[tuple[int, int], ...], int | None]:
    """The rows of its module that a role takes, and the module's total; none and None when it takes all of them."""
    module, out = modules[role]
    shared = [(r, o) for r, (m, o) in modules.items() if m == module]
    if len(shared) == 1:
        return (), None
    total = sum(o for _, o in shared)
    first = sum(o for _, o in shared[: [r for r, _ in shared].index(role)]) // in_turn
    starts = [first + turn * total // in_turn for turn in range(in_turn)]
    return tuple((start, start + out // in_turn) for start in starts), total
