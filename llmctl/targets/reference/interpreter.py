"""Runs a Graph's ops with the reference kernels: every op is bound once to its weights, then called step by step.

The ReferenceRuntime runs whole graphs; quantization runs one decoder layer at a time, with a hook before each op and
weights that change under way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmctl.graph.graph import Graph, Op
from llmctl.graph.ops import OP_KINDS
from llmctl.targets.batch import Batch
from llmctl.targets.reference import kernels
from llmctl.targets.reference.context import Env, RopeTable, StepContext

Bound = Callable[[Env, StepContext], None]
"""Executes one op: reads its inputs from the environment and adds its outputs."""
BeforeOp = Callable[[Op, Env], bool]
"""Called before an op runs. It may read the environment and replace weights; true ends the run there."""


class Interpreter:
    """A Graph bound to weights.

    Weights are turned to ``dtype`` when an op that uses them is bound (quantized ones are dequantized); norms keep
    theirs in float32.

    Attributes:
        weights: weight name -> dense Tensor or QuantizedWeight, as given: read when an op that uses one is bound.
        adapters: weights of lora ops, by the op's name.
        changes: how often what executes some op has changed.
    """

    def __init__(
        self,
        graph: Graph,
        weights: Mapping[str, Any],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Bind nothing yet.

        Args:
            weights: Weight name -> dense Tensor or QuantizedWeight; read lazily, so it may load on access.
        """
        self.graph = graph
        self.adapters: dict[str, kernels.AdapterWeights] = {}
        self.changes = 0
        self.dtype = dtype
        self.device = torch.device(device)
        self.weights = weights
        self._dense: dict[str, Tensor] = {}
        self._ops = {op.name: op for op in graph.ops}
        self._bound: dict[str, Bound] = {}
        self._overrides: dict[str, Bound] = {}
        self._tables: dict[tuple[Any, ...], RopeTable] = {}

    def context(self, batch: Batch, cache: Mapping[int, Tensor], groups: Sequence[int] = ()) -> StepContext:
        """The step context of a batch over KV caches by layer; ``groups`` as ``StepContext`` takes them."""
        return StepContext(batch, cache, self.dtype, self.device, groups)

    def program(self, ops: Sequence[Op], keep: Iterable[str]) -> Program:
        """Ops of the graph as one callable; binds them (loads and converts their weights).

        Args:
            keep: the buffers to leave in the environment; every other one is dropped after its last use by ``ops``.
        """
        for op in ops:
            self.bound(op.name)
        drops = _last_uses(ops, set(keep))
        return Program(self, [(op, drops.get(op.name, ())) for op in ops])

    def bound(self, op_name: str) -> Bound:
        """What executes an op: its override, else its reference kernel bound to the weights in use."""
        if op_name in self._overrides:
            return self._overrides[op_name]
        if op_name not in self._bound:
            op = self._ops[op_name]
            self._bound[op_name] = BINDERS[op.kind](self, op)
        return self._bound[op_name]

    def override(self, op_name: str, run: Bound) -> None:
        """Execute an op by ``run`` instead of its reference kernel, in programs made before and after alike.

        For who has another kernel to hold against the reference; the emulated CUDA kernels run whole graphs so.
        """
        self._overrides[op_name] = run
        self.changes += 1

    def release_weight(self, name: str) -> None:
        """Free the converted copy of a weight; it is made again, of what its source then gives, when next needed.

        A program that has run without a hook holds on to the copy until it runs again.
        """
        self._dense.pop(name, None)
        for op in self.graph.ops:
            if name in op.weights:
                self._bound.pop(op.name, None)
        self.changes += 1

    def weight(self, name: str) -> Tensor:
        """The dense weight in use, in the compute dtype."""
        if name not in self._dense:
            self._dense[name] = self._load(name, self.dtype)
        return self._dense[name]

    def rope_table(self, op: Op) -> RopeTable:
        """The table an op's rope attributes describe, shared by all ops with equal ones."""
        attrs = {k: v for k, v in op.attrs.items() if k not in ("layer", "heads", "kv_heads")}
        return self._tables.setdefault(tuple(sorted(attrs.items())), RopeTable(attrs))

    def norm_weight(self, op: Op, index: int) -> Tensor:
        """A norm's weight (or a router's bias) in float32, with Gemma's one added."""
        w = self._load(op.weights[index], torch.float32)
        return w + 1 if index == 0 and op.attrs.get("plus_one") else w

    def optional(self, op: Op, index: int) -> Tensor | None:
        """A weight that may be absent."""
        return self.weight(op.weights[index]) if len(op.weights) > index and op.weights[index] else None

    def _load(self, name: str, dtype: torch.dtype) -> Tensor:
        value = self.weights[name]
        expected = self.graph.weights[name].shape
        if tuple(value.shape) != expected:
            raise ValueError(f"weight '{name}': expected shape {list(expected)}, found {list(value.shape)}")
        dense = value if isinstance(value, Tensor) else value.dequantize(dtype)
        return dense.to(device=self.device, dtype=dtype).contiguous()


class Program:
    """A list of ops to run in order over one environment after another; ``Interpreter.program`` makes it."""

    def __init__(self, interpreter: Interpreter, ops: Sequence[tuple[Op, tuple[str, ...]]]) -> None:
        """``ops``: each with the buffers to drop after it."""
        self._interpreter = interpreter
        self._ops = ops
        self._steps: list[tuple[Bound, tuple[str, ...]]] = []
        self._changes = -1  # the interpreter's when the steps were looked up

    def __call__(self, env: Env, ctx: StepContext, before: BeforeOp | None = None) -> Env:
        """Run the ops; results are added to ``env``, which is returned.

        Args:
            env: buffer name -> Tensor [T, width]; holds whatever the ops read and do not make.
        """
        for run, dead in self._looked_up() if before is None else self._watched(env, before):
            run(env, ctx)
            for name in dead:
                del env[name]
        return env

    def _looked_up(self) -> list[tuple[Bound, tuple[str, ...]]]:
        """What executes each op, looked up once for all runs: between two kernels every lookup misses the caches."""
        if self._changes != self._interpreter.changes:
            self._steps = [(self._interpreter.bound(op.name), dead) for op, dead in self._ops]
            self._changes = self._interpreter.changes
        return self._steps

    def _watched(self, env: Env, before: BeforeOp) -> Iterator[tuple[Bound, tuple[str, ...]]]:
        """What executes each op, looked up when the hook has seen it."""
        for op, dead in self._ops:
            if before(op, env):
                return
            yield self._interpreter.bound(op.name), dead


def _last_uses(ops: Sequence[Op], keep: set[str]) -> dict[str, tuple[str, ...]]:
    """Op name -> the buffers that no later op of the list reads."""
    last: dict[str, str] = {}
    for op in ops:
        for buffer in (*op.inputs, *op.outputs):
            last[buffer] = op.name
    dead: dict[str, list[str]] = {}
    for buffer, name in last.items():
        if buffer not in keep:
            dead.setdefault(name, []).append(buffer)
    return {name: tuple(buffers) for name, buffers in dead.items()}


# Binders: op -> function of the step. Everything that does not change between steps is looked up here.


def _unary(op: Op, fn: Callable[[Tensor], Tensor]) -> Bound:
    (x,), (y,) = op.inputs, op.outputs

    def run(env: Env, _: StepContext) -> None:
        env[y] = fn(env[x])

    return run


def _binary(op: Op, fn: Callable[[Tensor, Tensor], Tensor]) -> Bound:
    (x, y), (z,) = op.inputs, op.outputs

    def run(env: Env, _: StepContext) -> None:
        env[z] = fn(env[x], env[y])

    return run


def _bind_embed(interp: Interpreter, op: Op) -> Bound:
    return _unary(op, partial(kernels.embed, w=interp.weight(op.weights[0]), scale=op.attrs["scale"]))


def _bind_pos_embed(interp: Interpreter, op: Op) -> Bound:
    w, offset = interp.weight(op.weights[0]), op.attrs["offset"]
    return _binary(op, lambda x, positions: kernels.pos_embed(x, positions, w, offset))


def _bias(interp: Interpreter, op: Op) -> Tensor | None:
    """A norm's second weight, where its kind has one and it is there."""
    return interp.norm_weight(op, 1) if any(op.weights[1:]) else None


def _bind_norm(interp: Interpreter, op: Op) -> Bound:
    w, b, eps = interp.norm_weight(op, 0), _bias(interp, op), op.attrs["eps"]
    if op.kind == "rms_norm":
        return _unary(op, lambda x: kernels.rms_norm(x, w, eps))
    return _unary(op, lambda x: kernels.layer_norm(x, w, b, eps))


def _bind_head_norm(interp: Interpreter, op: Op) -> Bound:
    w, eps, dim = interp.norm_weight(op, 0), op.attrs["eps"], op.attrs["head_dim"]
    return _unary(op, lambda x: kernels.head_rms_norm(x, w, eps, dim))


def _bind_add_norm(interp: Interpreter, op: Op) -> Bound:
    (x, residual), (y, total) = op.inputs, op.outputs
    w, b, eps, rms = interp.norm_weight(op, 0), _bias(interp, op), op.attrs["eps"], op.kind == "add_rms_norm"

    def run(env: Env, _: StepContext) -> None:
        if rms:
            env[y], env[total] = kernels.add_rms_norm(env[x], env[residual], w, eps)
        else:
            env[y], env[total] = kernels.add_layer_norm(env[x], env[residual], w, b, eps)

    return run


def _bind_norm_s8(interp: Interpreter, op: Op) -> Bound:
    kind = OP_KINDS[op.kind]
    kernel = getattr(kernels, kind.reference)
    bias = (_bias(interp, op),) if "b" in kind.weights else ()
    rest = (interp.norm_weight(op, 0), *bias, op.attrs["eps"])

    def run(env: Env, _: StepContext) -> None:
        env.update(zip(op.outputs, kernel(*(env[name] for name in op.inputs), *rest), strict=True))

    return run


def _bind_quantize(_: Interpreter, op: Op) -> Bound:
    (x,), (q, scale) = op.inputs, op.outputs

    def run(env: Env, _: StepContext) -> None:
        env[q], env[scale] = kernels.quantize_rows(env[x])

    return run


def _bind_lora(interp: Interpreter, op: Op) -> Bound:
    (x, y), (z,) = op.inputs, op.outputs
    columns = slice(op.attrs["column"], op.attrs["column"] + op.attrs["rows"])

    def run(env: Env, ctx: StepContext) -> None:
        env[z] = env[y]
        if ctx.adapters is not None:
            env[z] = env[y].clone()
            weights = interp.adapters[op.name]
            env[z][:, columns] = kernels.lora(env[x], env[y][:, columns], ctx.adapters, weights)

    return run


def _bind_act_mul(_: Interpreter, op: Op) -> Bound:
    return _unary(op, partial(kernels.act_mul, fn=op.attrs["fn"]))


def _bind_act_mul_s8(_: Interpreter, op: Op) -> Bound:
    (x,), (q, scale), fn = op.inputs, op.outputs, op.attrs["fn"]

    def run(env: Env, _: StepContext) -> None:
        env[q], env[scale] = kernels.act_mul_s8(env[x], fn)

    return run


def _bind_linear(interp: Interpreter, op: Op) -> Bound:
    if not {"scale", "softcap"}.isdisjoint(op.attrs):
        return _bind_capped_linear(interp, op)
    plain = {"activations", "residual"}.isdisjoint(op.attrs)
    return _bind_float_linear(interp, op) if plain else _bind_fed_linear(interp, op)


def _bind_capped_linear(interp: Interpreter, op: Op) -> Bound:
    """A linear whose result is scaled or capped: the linear, and that."""
    attrs = {name: value for name, value in op.attrs.items() if name not in ("scale", "softcap")}
    inner, (y,) = _bind_linear(interp, op.with_(attrs=attrs)), op.outputs
    scale, softcap = op.attrs.get("scale", 1.0), op.attrs.get("softcap", 0.0)

    def run(env: Env, ctx: StepContext) -> None:
        inner(env, ctx)
        env[y] = kernels.capped(env[y], scale, softcap)

    return run


def _bind_fed_linear(interp: Interpreter, op: Op) -> Bound:
    """A linear with int8 rows or a residual: what is float about it, between the two."""
    attrs = {name: value for name, value in op.attrs.items() if name not in ("activations", "residual")}
    inner = _bind_float_linear(interp, op.with_(inputs=op.inputs[:1], attrs=attrs))
    x, y, int8 = op.inputs[0], op.outputs[0], "activations" in op.attrs

    def run(env: Env, ctx: StepContext) -> None:
        codes = env[x]
        if int8:
            env[x] = kernels.dequantize_rows(codes, env[op.inputs[1]]).to(interp.dtype)
        inner(env, ctx)
        env[x] = codes
        if "residual" in op.attrs:
            env[y] = env[y] + env[op.inputs[-1]]

    return run


def _bind_float_linear(interp: Interpreter, op: Op) -> Bound:
    w, b = interp.weight(op.weights[0]), interp.optional(op, 1)
    splits, epilogue = op.attrs.get("splits"), op.attrs.get("epilogue")
    if epilogue:
        return _unary(op, lambda x: kernels.linear_gated(x, w, b, epilogue))
    if not splits:
        return _unary(op, lambda x: kernels.linear(x, w, b))
    x, outputs = op.inputs[0], op.outputs

    def run(env: Env, _: StepContext) -> None:
        env.update(zip(outputs, kernels.linear_splits(env[x], w, b, splits), strict=True))

    return run


def _bind_route(interp: Interpreter, op: Op) -> Bound:
    (logits,), (experts, shares) = op.inputs, op.outputs
    bias = interp.norm_weight(op, 0) if op.weights[0] else None
    choose: Callable[[Tensor], tuple[Tensor, Tensor]] = partial(kernels.route, bias=bias, **op.attrs)

    def run(env: Env, _: StepContext) -> None:
        env[experts], env[shares] = choose(env[logits])

    return run


def _bind_grouped_linear(interp: Interpreter, op: Op) -> Bound:
    matrices, count = [interp.weight(name) for name in op.matrices], op.attrs["count"]
    experts = matrices if "apart" in op.attrs else matrices[0].view(count, -1, matrices[0].shape[1]).unbind()
    return _binary(op, partial(kernels.grouped_linear, w=experts, epilogue=op.attrs.get("epilogue", "")))


def _bind_weighted_sum(_: Interpreter, op: Op) -> Bound:
    return _binary(op, partial(kernels.weighted_sum, **op.attrs))


def _bind_rope(interp: Interpreter, op: Op) -> Bound:
    q, k, _ = op.inputs
    q_out, k_out = op.outputs
    table, dim, style = interp.rope_table(op), op.attrs["head_dim"], op.attrs["style"]

    def run(env: Env, ctx: StepContext) -> None:
        factors = ctx.rope_factors(table)
        env[q_out] = kernels.rope(env[q], factors, dim, style)
        env[k_out] = kernels.rope(env[k], factors, dim, style)

    return run


def _bind_rope_kv_write(interp: Interpreter, op: Op) -> Bound:
    q, k, v, _ = op.inputs
    (q_out,) = op.outputs
    table, dim, style, layer = interp.rope_table(op), op.attrs["head_dim"], op.attrs["style"], op.attrs["layer"]

    def run(env: Env, ctx: StepContext) -> None:
        factors, cache, slots = ctx.rope_factors(table), ctx.cache[layer], ctx.slots(layer)
        env[q_out] = kernels.rope_kv_write(env[q], env[k], env[v], factors, dim, style, cache, slots, padded=ctx.padded)

    return run


def _bind_kv_write(_: Interpreter, op: Op) -> Bound:
    k, v = op.inputs
    layer = op.attrs["layer"]

    def run(env: Env, ctx: StepContext) -> None:
        kernels.kv_write(ctx.cache[layer], env[k], env[v], ctx.slots(layer), padded=ctx.padded)

    return run


def _bind_attention(_: Interpreter, op: Op) -> Bound:
    (q,), (o,) = op.inputs, op.outputs
    layer, heads, scale = op.attrs["layer"], op.attrs["heads"], op.attrs["scale"]
    window, softcap = op.attrs["window"], op.attrs["softcap"]

    def run(env: Env, ctx: StepContext) -> None:
        groups = ctx.attention_groups(layer, window)
        env[o] = kernels.paged_attention(env[q], ctx.cache[layer], groups, heads, scale, softcap, ctx.scratch)

    return run


def _bind_gather(_: Interpreter, op: Op) -> Bound:
    (x,), (y,) = op.inputs, op.outputs

    def run(env: Env, ctx: StepContext) -> None:
        env[y] = kernels.gather_rows(env[x], ctx.rows)

    return run


BINDERS: Mapping[str, Callable[[Interpreter, Op], Bound]] = {
    "embed": _bind_embed,
    "pos_embed": _bind_pos_embed,
    "rms_norm": _bind_norm,
    "layer_norm": _bind_norm,
    "head_rms_norm": _bind_head_norm,
    "linear": _bind_linear,
    "route": _bind_route,
    "grouped_linear": _bind_grouped_linear,
    "weighted_sum": _bind_weighted_sum,
    "act": lambda _, op: _unary(op, kernels.ACTIVATIONS[str(op.attrs["fn"])]),
    "mul": lambda _, op: _binary(op, kernels.mul),
    "add": lambda _, op: _binary(op, kernels.add),
    "rope": _bind_rope,
    "kv_write": _bind_kv_write,
    "attention": _bind_attention,
    "gather_rows": _bind_gather,
    "add_rms_norm": _bind_add_norm,
    "add_layer_norm": _bind_add_norm,
    "rope_kv_write": _bind_rope_kv_write,
    "quantize": _bind_quantize,
    "rms_norm_s8": _bind_norm_s8,
    "layer_norm_s8": _bind_norm_s8,
    "add_rms_norm_s8": _bind_norm_s8,
    "add_layer_norm_s8": _bind_norm_s8,
    "act_mul_s8": _bind_act_mul_s8,
    "lora": _bind_lora,
    "act_mul": _bind_act_mul,
}
"""By op kind."""
