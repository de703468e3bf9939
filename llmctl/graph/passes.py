"""Passes: Graph -> an equal Graph with fewer, larger ops. Each matches on dataflow, never on names, and leaves alone
what does not match, so that any pass may run on any graph and in any order.

``fuse_gated_activation`` finds work only after ``merge_gate_up``. ``int8_activations`` alone changes what is computed:
it rounds activations. Adapters are inserted by ``graph.lora``, which needs to know which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from llmctl.errors import UsageError
from llmctl.graph.graph import Buffer, Graph, Op, QuantScheme, Weight, WeightPart
from llmctl.graph.ops import OP_KINDS
from llmctl.graph.rewrite import Changes, Flow, rewritten

Pass = Callable[[Graph], Graph]

_AFTER_ADD = {kind.name: kind.after_add for kind in OP_KINDS.values() if kind.after_add}
_AS_INT8 = {kind.name: kind.as_int8 for kind in OP_KINDS.values() if kind.as_int8}
_INT8: Mapping[str, str] = {"activations": "int8"}


def apply_passes(graph: Graph, names: Iterable[str] | None = None) -> Graph:
    """Apply passes by name, in order; None means ``DEFAULT_PASSES``.

    Raises:
        UsageError: no such pass.
    """
    for name in DEFAULT_PASSES if names is None else names:
        if name not in PASSES:
            raise UsageError(f"unknown pass '{name}'; known passes: {', '.join(PASSES)}", param="passes")
        graph = PASSES[name](graph)
    return graph


def merge_qkv(graph: Graph) -> Graph:
    """One linear with ``splits`` for the q, k and v projections that feed the same attention."""
    return _merge_groups(graph, _qkv_groups(graph), "merge_qkv", "qkv_proj")


def merge_gate_up(graph: Graph) -> Graph:
    """One linear with ``splits`` for the gate and up projections of a gated MLP."""
    return _merge_groups(graph, _gate_up_groups(graph), "merge_gate_up", "gate_up_proj")


def fuse_gated_activation(graph: Graph) -> Graph:
    """``mul(act(gate), up)`` of one merged linear's two halves becomes that linear's epilogue."""
    flow = Flow(graph)
    changed: Changes = {}
    for mul in graph.ops:
        match = _gated(flow, mul) if mul.kind == "mul" else None
        if match is None:
            continue
        linear, act = match
        attrs = {k: v for k, v in linear.attrs.items() if k != "splits"}
        changed[linear.name] = linear.with_(outputs=mul.outputs, attrs={**attrs, "epilogue": f"{act.attrs['fn']}_mul"})
        changed[act.name] = changed[mul.name] = None
    return rewritten(graph, changed, "fuse_gated_activation")


def fuse_gated_experts(graph: Graph) -> Graph:
    """``mul(act(gate), up)`` of two grouped linears over the same experts becomes one with an epilogue."""
    flow = Flow(graph)
    changed: Changes = {}
    weights = dict(graph.weights)
    for mul in graph.ops:
        match = _gated_experts(graph, flow, mul) if mul.kind == "mul" else None
        if match is None:
            continue
        gate, up, act = match
        first, last = sorted((gate, up), key=lambda op: flow.index[op.name])
        name = f"{first.name.rpartition('.')[0]}.gate_up_proj".lstrip(".")
        weight = _interleaved(f"{name}.weight", graph.weights[gate.weights[0]], graph.weights[up.weights[0]], gate)
        weights[weight.name] = weight
        changed |= {op.name: None for op in (first, act, mul)}
        attrs = {**gate.attrs, "epilogue": f"{act.attrs['fn']}_mul"}
        changed[last.name] = last.with_(name=name, outputs=mul.outputs, weights=(weight.name,), attrs=attrs)
    return rewritten(replace(graph, weights=weights), changed, "fuse_gated_experts")


def fuse_rope_kv(graph: Graph) -> Graph:
    """RoPE and the KV-cache write of the rotated key become one op."""
    flow = Flow(graph)
    changed: Changes = {}
    for write in graph.ops:
        rope = flow.producer.get(write.inputs[0]) if write.kind == "kv_write" else None
        if rope is None or rope.kind != "rope" or rope.outputs[1] != write.inputs[0]:
            continue
        query, key = rope.outputs
        if flow.uses[key] != 1 or any(flow.index[c] < flow.index[write.name] for c in flow.consumers.get(query, ())):
            continue
        q, k, positions = rope.inputs
        changed[rope.name] = None
        changed[write.name] = rope.with_(
            kind="rope_kv_write",
            inputs=(q, k, write.inputs[1], positions),
            outputs=(query,),
            attrs={**rope.attrs, "layer": write.attrs["layer"]},
        )
    return rewritten(graph, changed, "fuse_rope_kv")


def fuse_add_norm(graph: Graph) -> Graph:
    """A residual add and the first norm of its sum become one op with both results."""
    flow = Flow(graph)
    changed: Changes = {}
    for norm in graph.ops:
        add = flow.producer.get(norm.inputs[0]) if norm.kind in _AFTER_ADD else None
        if add is None or add.kind != "add" or add.name in changed:
            continue
        changed[add.name] = norm.with_(
            kind=_AFTER_ADD[norm.kind],
            inputs=add.inputs,
            outputs=(norm.outputs[0], add.outputs[0]),
            layer=add.layer,
        )
        changed[norm.name] = None
    return rewritten(graph, changed, "fuse_add_norm")


def fuse_linear_add(graph: Graph) -> Graph:
    """``linear(x) + residual`` becomes a linear that adds it, where no norm has taken the add (parallel residuals)."""
    flow = Flow(graph)
    changed: Changes = {}
    for add in graph.ops:
        match = _added_linear(flow, add) if add.kind == "add" else None
        if match is None or match[0].name in changed:
            continue
        linear, residual = match
        # In the add's place: the residual may be written after the linear.
        changed[linear.name] = None
        attrs = {**linear.attrs, "residual": True}
        changed[add.name] = linear.with_(
            inputs=(*linear.inputs, residual), outputs=add.outputs, attrs=attrs, layer=add.layer
        )
    return rewritten(graph, changed, "fuse_linear_add")


def int8_activations(graph: Graph) -> Graph:
    """Linears of symmetric weights of 5 to 8 bits take int8 rows with a scale each. The norm (or gating) before them
    makes those where they alone read its result, an op of its own elsewhere."""
    flow = Flow(graph)
    readers: dict[str, list[Op]] = {}
    for op in graph.linears():
        scheme = graph.weights[op.weights[0]].quant
        if scheme is not None and _takes_int8(scheme) and "activations" not in op.attrs:
            readers.setdefault(op.inputs[0], []).append(op)
    changed: Changes = {}
    buffers: list[Buffer] = []
    for x, linears in readers.items():
        pair = (f"{x}.q", f"{x}.scale")
        buffers += [Buffer(pair[0], graph.buffers[x].width), Buffer(pair[1], 1)]
        fed = {op.name: op.with_(inputs=(*pair, *op.inputs[1:]), attrs={**op.attrs, **_INT8}) for op in linears}
        changed.update(fed)
        maker = flow.producer.get(x)
        alone = flow.uses[x] == len(linears)
        if maker is not None and maker.kind in _AS_INT8 and alone and x == maker.outputs[0]:
            changed[maker.name] = maker.with_(kind=_AS_INT8[maker.kind], outputs=(*pair, *maker.outputs[1:]))
        else:
            first = min(linears, key=lambda op: flow.index[op.name])
            quantize = Op("quantize", f"{x}.quantize", (x,), pair, layer=first.layer)
            changed[first.name] = (quantize, fed[first.name])
    return rewritten(graph, changed, "int8_activations", buffers)


PASSES: Mapping[str, Pass] = {
    "merge_qkv": merge_qkv,
    "merge_gate_up": merge_gate_up,
    "fuse_gated_activation": fuse_gated_activation,
    "fuse_gated_experts": fuse_gated_experts,
    "fuse_rope_kv": fuse_rope_kv,
    "fuse_add_norm": fuse_add_norm,
    "fuse_linear_add": fuse_linear_add,
    "int8_activations": int8_activations,
}
DEFAULT_PASSES: tuple[str, ...] = (
    "merge_qkv", "merge_gate_up", "fuse_gated_activation", "fuse_gated_experts", "fuse_rope_kv", "fuse_add_norm",
)  # fmt: skip


def _takes_int8(scheme: QuantScheme) -> bool:
    return scheme.bits > 4 and scheme.symmetric and not scheme.act_order and not scheme.book


def _qkv_groups(graph: Graph) -> list[tuple[Op, ...]]:
    flow = Flow(graph)
    writes = {op.attrs["layer"]: op for op in graph.ops if op.kind in ("kv_write", "rope_kv_write")}
    groups: list[tuple[Op, ...]] = []
    for attention in graph.ops:
        write = writes.get(attention.attrs["layer"]) if attention.kind == "attention" else None
        if write is None:
            continue
        k, v = write.inputs[:2] if write.kind == "kv_write" else write.inputs[1:3]
        sources = [_source_linear(flow, buffer) for buffer in (attention.inputs[0], k, v)]
        linears = tuple(op for op in sources if op is not None)
        if len(linears) == 3 and _mergeable(graph, flow, linears):
            groups.append(linears)
    return groups


def _source_linear(flow: Flow, buffer: str) -> Op | None:
    """The linear a query, key or value comes from, through their norms and RoPE."""
    op = flow.producer.get(buffer)
    while op is not None and op.kind in ("rope", "rope_kv_write", "head_rms_norm", "rms_norm"):
        buffer = op.inputs[op.outputs.index(buffer)]
        op = flow.producer.get(buffer)
    return op if op is not None and op.kind == "linear" else None


def _gate_up_groups(graph: Graph) -> list[tuple[Op, ...]]:
    flow = Flow(graph)
    groups: list[tuple[Op, ...]] = []
    for mul in graph.ops:
        if mul.kind != "mul":
            continue
        for act_buffer, up_buffer in (mul.inputs, mul.inputs[::-1]):
            act, up = flow.producer.get(act_buffer), flow.producer.get(up_buffer)
            gate = flow.producer.get(act.inputs[0]) if act is not None and act.kind == "act" else None
            if gate is not None and up is not None and _mergeable(graph, flow, (gate, up)):
                groups.append((gate, up))
                break
    return groups


def _mergeable(graph: Graph, flow: Flow, ops: Sequence[Op]) -> bool:
    """Whether plain linears read one buffer, own their weights, and are stored alike (act-order differs per tensor)."""
    first = ops[0]
    if len({op.name for op in ops}) != len(ops) or any(op.kind != "linear" or op.attrs for op in ops):
        return False
    if any(op.inputs != first.inputs or bool(op.weights[1]) != bool(first.weights[1]) for op in ops):
        return False
    if any(flow.weight_uses[name] != 1 for op in ops for name in op.weights if name):
        return False
    schemes = {graph.weights[op.weights[0]].quant for op in ops}
    scheme = next(iter(schemes))
    return len(schemes) == 1 and (scheme is None or not scheme.act_order)


def _merge_groups(graph: Graph, groups: Sequence[tuple[Op, ...]], pass_name: str, role: str) -> Graph:
    changed: Changes = {}
    weights = dict(graph.weights)
    for group in groups:
        if any(op.name in changed for op in group):
            continue
        first = min(group, key=graph.ops.index)
        name = f"{first.name.rpartition('.')[0]}.{role}".lstrip(".")
        names = [""] * len(first.weights)
        for i, suffix in enumerate(("weight", "bias")):
            if first.weights[i]:
                names[i] = f"{name}.{suffix}"
                weights[names[i]] = _stacked(names[i], [graph.weights[op.weights[i]] for op in group])
        changed.update({op.name: None for op in group})
        changed[first.name] = first.with_(
            name=name,
            outputs=tuple(op.outputs[0] for op in group),
            weights=tuple(names),
            attrs={"splits": tuple(graph.buffers[op.outputs[0]].width for op in group)},
        )
    return rewritten(replace(graph, weights=weights), changed, pass_name)


def _stacked(name: str, weights: Sequence[Weight]) -> Weight:
    """Weights concatenated along dim 0; neighbouring slices of one tensor become one slice."""
    parts: list[WeightPart] = []
    for part in (part for weight in weights for part in weight.parts):
        last = parts[-1] if parts else None
        if (
            last is not None
            and last.rows is not None
            and part.rows is not None
            and (last.tensor, last.transpose, last.rows[1]) == (part.tensor, part.transpose, part.rows[0])
        ):
            parts[-1] = replace(last, rows=(last.rows[0], part.rows[1]))
        else:
            parts.append(part)
    shape = (sum(w.shape[0] for w in weights), *weights[0].shape[1:])
    return Weight(name, shape, tuple(parts), _stacked_scheme(weights))


def _stacked_scheme(weights: Sequence[Weight]) -> QuantScheme | None:
    """The scheme of equal ones stacked."""
    scheme = weights[0].quant
    for weight in weights[:-1]:
        scheme = scheme and scheme.stacked(weight.shape[0])
    return scheme


def _added_linear(flow: Flow, add: Op) -> tuple[Op, str] | None:
    """(linear, residual) when ``add`` sums a plain linear's result, which nothing else reads, and another buffer."""
    for product, residual in (add.inputs, add.inputs[::-1]):
        linear = flow.producer.get(product)
        if linear is None or linear.kind != "linear" or flow.uses[product] != 1:
            continue
        if {"splits", "epilogue", "residual", "scale", "softcap"}.isdisjoint(linear.attrs):
            return linear, residual
    return None


def _gated(flow: Flow, mul: Op) -> tuple[Op, Op] | None:
    """(linear, act) when ``mul`` is the gated product of one linear's two equal splits, gate first."""
    for act_buffer, up in (mul.inputs, mul.inputs[::-1]):
        act = flow.producer.get(act_buffer)
        linear = flow.producer.get(up)
        if act is None or act.kind != "act" or linear is None or linear.kind != "linear":
            continue
        splits = linear.attrs.get("splits", ())
        halves = len(splits) == 2 and splits[0] == splits[1] and linear.outputs == (act.inputs[0], up)
        if halves and all(flow.uses[buffer] == 1 for buffer in (act_buffer, act.inputs[0], up)):
            return linear, act
    return None


def _gated_experts(graph: Graph, flow: Flow, mul: Op) -> tuple[Op, Op, Op] | None:
    """(gate, up, act) when ``mul`` is the gated product of two plain grouped linears that may become one."""
    for act_buffer, up_buffer in (mul.inputs, mul.inputs[::-1]):
        act, up = flow.producer.get(act_buffer), flow.producer.get(up_buffer)
        gate = flow.producer.get(act.inputs[0]) if act is not None and act.kind == "act" else None
        if act is None or gate is None or up is None or gate.name == up.name:
            continue
        if any(op.kind != "grouped_linear" or set(op.attrs) != {"count"} for op in (gate, up)):
            continue
        alone = all(flow.uses[buffer] == 1 for buffer in (act_buffer, up_buffer, act.inputs[0]))
        own = all(flow.weight_uses[op.weights[0]] == 1 for op in (gate, up))
        if not (alone and own) or gate.inputs != up.inputs or gate.attrs != up.attrs:
            continue
        one, other = (graph.weights[op.weights[0]] for op in (gate, up))
        parts = {len(weight.parts) for weight in (one, other)}
        if one.shape == other.shape and one.quant == other.quant and parts == {gate.attrs["count"]}:
            return gate, up, act
    return None


def _interleaved(name: str, gate: Weight, up: Weight, op: Op) -> Weight:
    """Two stacks of experts as one, each expert's gate above its up."""
    parts = tuple(part for pair in zip(gate.parts, up.parts, strict=True) for part in pair)
    scheme = gate.quant and gate.quant.stacked(gate.shape[0] // op.attrs["count"])
    return Weight(name, (2 * gate.shape[0], gate.shape[1]), parts, scheme)
