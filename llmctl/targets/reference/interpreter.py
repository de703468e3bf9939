"""Runs a Graph's ops with the reference kernels: every op is bound once to its weights, then called step by step.

The ReferenceRuntime runs whole graphs with it; quantization runs one decoder layer at a time, with a hook on the
linears' inputs and weights that change between runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from llmctl.graph.graph import Graph, Op
from llmctl.targets.batch import Batch
from llmctl.targets.reference import kernels
from llmctl.targets.reference.context import Env, RopeTable, StepContext

LinearHook = Callable[[Op, Tensor], None]
_Bound = Callable[[Env, StepContext], None]


class Dequantizable(Protocol):
    """A quantized weight; ``checkpoint.quantized.QuantizedWeight`` is one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape (N, K)."""
        ...

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [N, K]."""
        ...


class Interpreter:
    """A Graph bound to weights.

    Weights are turned to ``dtype`` when an op that uses them is first bound (quantized ones are dequantized); norms
    keep theirs in float32. ``set_weight`` replaces one for the runs that follow.
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
        self.adapters: dict[str, kernels.AdapterWeights] = {}  # by name of a lora op
        self.dtype = dtype
        self.device = torch.device(device)
        self._source = weights
        self._overrides: dict[str, Any] = {}
        self._dense: dict[str, Tensor] = {}
        self._bound: dict[str, _Bound] = {}
        self._tables: dict[tuple[Any, ...], RopeTable] = {}

    def context(self, batch: Batch, cache: Mapping[int, Tensor]) -> StepContext:
        """The step context of a batch over KV caches by layer."""
        return StepContext(batch, cache, self.dtype, self.device)

    def bind(self, ops: Iterable[Op]) -> None:
        """Bind ops ahead of their first run (loads and converts their weights)."""
        for op in ops:
            if op.name not in self._bound:
                self._bound[op.name] = _BINDERS[op.kind](self, op)

    def set_weight(self, name: str, value: Tensor | Dequantizable) -> None:
        """Use ``value`` for weight ``name`` from now on.

        Raises:
            KeyError: the graph has no such weight. ValueError: another shape.
        """
        self._checked(name, value)
        self._overrides[name] = value
        self.release_weight(name)

    def release_weight(self, name: str) -> None:
        """Free the converted copy of a weight; it is made again when next needed."""
        self._dense.pop(name, None)
        for op in self.graph.ops:
            if name in op.weights:
                self._bound.pop(op.name, None)

    def weight(self, name: str) -> Tensor:
        """The dense weight in use, in the compute dtype."""
        if name not in self._dense:
            self._dense[name] = self._load(name, self.dtype)
        return self._dense[name]

    @torch.inference_mode()
    def run(
        self,
        ops: Sequence[Op],
        env: Env,
        ctx: StepContext,
        *,
        keep: Iterable[str] | None = None,
        on_linear: LinearHook | None = None,
    ) -> Env:
        """Run ops in order; results are added to ``env``, which is returned.

        Args:
            ops: any ops of the graph whose inputs are in ``env`` or made on the way.
            env: buffer name -> Tensor [T, width].
            keep: when given, every buffer not named here is dropped from ``env`` after its last use by ``ops``.
            on_linear: called before each linear with the op and its input.
        """
        self.bind(ops)
        drops = _last_uses(ops, set(keep)) if keep is not None else {}
        for op in ops:
            if on_linear is not None and op.kind == "linear":
                on_linear(op, env[op.inputs[0]])
            self._bound[op.name](env, ctx)
            for name in drops.get(op.name, ()):
                env.pop(name, None)
        return env

    def program(self, ops: Sequence[Op], keep: Iterable[str]) -> Callable[[Env, StepContext], Env]:
        """``run`` for a fixed list of ops with everything looked up ahead; weights must not be replaced afterwards."""
        self.bind(ops)
        drops = _last_uses(ops, set(keep))
        steps = [(self._bound[op.name], drops.get(op.name, ())) for op in ops]

        def run(env: Env, ctx: StepContext) -> Env:
            for bound, dead in steps:
                bound(env, ctx)
                for name in dead:
                    del env[name]
            return env

        return run

    def rope_table(self, op: Op) -> RopeTable:
        """The table an op's rope attributes describe, shared by all ops with equal ones."""
        attrs = {k: v for k, v in op.attrs.items() if k not in ("layer", "heads", "kv_heads")}
        return self._tables.setdefault(tuple(sorted(attrs.items())), RopeTable(attrs))

    def norm_weight(self, op: Op, index: int) -> Tensor:
        """A norm's weight in float32, with Gemma's one added."""
        w = self._load(op.weights[index], torch.float32)
        return w + 1 if index == 0 and op.attrs.get("plus_one") else w

    def optional(self, op: Op, index: int) -> Tensor | None:
        """A weight that may be absent."""
        return self.weight(op.weights[index]) if len(op.weights) > index and op.weights[index] else None

    def _load(self, name: str, dtype: torch.dtype) -> Tensor:
        value = self._overrides[name] if name in self._overrides else self._source[name]
        self._checked(name, value)
        dense = value if isinstance(value, Tensor) else value.dequantize(dtype)
        return dense.to(device=self.device, dtype=dtype).contiguous()

    def _checked(self, name: str, value: Any) -> None:
        expected = self.graph.weights[name].shape
        if tuple(value.shape) != expected:
            raise ValueError(f"weight '{name}': expected shape {list(expected)}, found {list(value.shape)}")


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


def _unary(op: Op, fn: Callable[[Tensor], Tensor]) -> _Bound:
    (x,), (y,) = op.inputs, op.outputs

    def run(env: Env, _: StepContext) -> None:
        env[y] = fn(env[x])

    return run


def _binary(op: Op, fn: Callable[[Tensor, Tensor], Tensor]) -> _Bound:
    (x, y), (z,) = op.inputs, op.outputs

    def run(env: Env, _: StepContext) -> None:
        env[z] = fn(env[x], env[y])

    return run


def _bind_embed(interp: Interpreter, op: Op) -> _Bound:
    return _unary(op, partial(kernels.embed, w=interp.weight(op.weights[0]), scale=op.attrs["scale"]))


def _bind_pos_embed(interp: Interpreter, op: Op) -> _Bound:
    w, offset = interp.weight(op.weights[0]), op.attrs["offset"]
    return _binary(op, lambda x, positions: kernels.pos_embed(x, positions, w, offset))


def _bind_norm(interp: Interpreter, op: Op) -> _Bound:
    w, eps = interp.norm_weight(op, 0), op.attrs["eps"]
    if op.kind == "rms_norm":
        return _unary(op, lambda x: kernels.rms_norm(x, w, eps))
    if op.kind == "head_rms_norm":
        dim = op.attrs["head_dim"]
        return _unary(op, lambda x: kernels.head_rms_norm(x, w, eps, dim))
    b = interp.norm_weight(op, 1) if op.weights[1] else None
    return _unary(op, lambda x: kernels.layer_norm(x, w, b, eps))


def _bind_add_norm(interp: Interpreter, op: Op) -> _Bound:
    (x, residual), (y, total) = op.inputs, op.outputs
    w, eps = interp.norm_weight(op, 0), op.attrs["eps"]
    b = interp.norm_weight(op, 1) if op.kind == "add_layer_norm" and op.weights[1] else None

    def run(env: Env, _: StepContext) -> None:
        if op.kind == "add_rms_norm":
            env[y], env[total] = kernels.add_rms_norm(env[x], env[residual], w, eps)
        else:
            env[y], env[total] = kernels.add_layer_norm(env[x], env[residual], w, b, eps)

    return run


def _bind_norm_s8(interp: Interpreter, op: Op) -> _Bound:
    """The norm in float32, quantized without a rounding between."""
    q, scale, w, eps = *op.outputs[:2], interp.norm_weight(op, 0), op.attrs["eps"]
    b = interp.norm_weight(op, 1) if "layer" in op.kind and op.weights[1] else None

    def run(env: Env, _: StepContext) -> None:
        x = env[op.inputs[0]]
        if op.kind.startswith("add_"):
            x = env[op.outputs[2]] = x + env[op.inputs[1]]
        y = kernels.layer_norm(x.float(), w, b, eps) if "layer" in op.kind else kernels.rms_norm(x.float(), w, eps)
        env[q], env[scale] = kernels.quantize_rows(y)

    return run


def _bind_quantize(_: Interpreter, op: Op) -> _Bound:
    (x,), (q, scale) = op.inputs, op.outputs

    def run(env: Env, _: StepContext) -> None:
        env[q], env[scale] = kernels.quantize_rows(env[x])

    return run


def _bind_lora(interp: Interpreter, op: Op) -> _Bound:
    (x, y), (z,) = op.inputs, op.outputs
    columns = slice(op.attrs["column"], op.attrs["column"] + op.attrs["rows"])

    def run(env: Env, ctx: StepContext) -> None:
        env[z] = env[y]
        if ctx.adapters is not None:
            env[z] = env[y].clone()
            weights = interp.adapters[op.name]
            env[z][:, columns] = kernels.lora(env[x], env[y][:, columns], ctx.adapters, weights)

    return run


def _bind_act_mul(_: Interpreter, op: Op) -> _Bound:
    fn = op.attrs["fn"]
    if op.kind == "act_mul":
        return _unary(op, partial(kernels.act_mul, fn=fn))
    (x,), (q, scale) = op.inputs, op.outputs

    def run(env: Env, _: StepContext) -> None:
        env[q], env[scale] = kernels.quantize_rows(kernels.act_mul(env[x].float(), fn))

    return run


def _bind_linear(interp: Interpreter, op: Op) -> _Bound:
    plain = {"activations", "residual"}.isdisjoint(op.attrs)
    return _bind_float_linear(interp, op) if plain else _bind_fed_linear(interp, op)


def _bind_fed_linear(interp: Interpreter, op: Op) -> _Bound:
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


def _bind_float_linear(interp: Interpreter, op: Op) -> _Bound:
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


def _bind_rope(interp: Interpreter, op: Op) -> _Bound:
    q, k, _ = op.inputs
    q_out, k_out = op.outputs
    table, dim, style = interp.rope_table(op), op.attrs["head_dim"], op.attrs["style"]

    def run(env: Env, ctx: StepContext) -> None:
        factors = ctx.rope_factors(table)
        env[q_out] = kernels.rope(env[q], factors, dim, style)
        env[k_out] = kernels.rope(env[k], factors, dim, style)

    return run


def _bind_rope_kv_write(interp: Interpreter, op: Op) -> _Bound:
    q, k, v, _ = op.inputs
    (q_out,) = op.outputs
    table, dim, style, layer = interp.rope_table(op), op.attrs["head_dim"], op.attrs["style"], op.attrs["layer"]

    def run(env: Env, ctx: StepContext) -> None:
        factors = ctx.rope_factors(table)
        env[q_out] = kernels.rope(env[q], factors, dim, style)
        rotated = kernels.rope(env[k], factors, dim, style)
        kernels.kv_write(ctx.cache[layer], rotated, env[v], ctx.slots, padded=ctx.padded)

    return run


def _bind_kv_write(_: Interpreter, op: Op) -> _Bound:
    k, v = op.inputs
    layer = op.attrs["layer"]

    def run(env: Env, ctx: StepContext) -> None:
        kernels.kv_write(ctx.cache[layer], env[k], env[v], ctx.slots, padded=ctx.padded)

    return run


def _bind_attention(_: Interpreter, op: Op) -> _Bound:
    (q,), (o,) = op.inputs, op.outputs
    layer, heads, scale = op.attrs["layer"], op.attrs["heads"], op.attrs["scale"]
    window, softcap = op.attrs["window"], op.attrs["softcap"]

    def run(env: Env, ctx: StepContext) -> None:
        groups = ctx.attention_groups(window)
        env[o] = kernels.paged_attention(env[q], ctx.cache[layer], groups, heads, scale, softcap, ctx.scratch)

    return run


def _bind_gather(_: Interpreter, op: Op) -> _Bound:
    (x,), (y,) = op.inputs, op.outputs

    def run(env: Env, ctx: StepContext) -> None:
        env[y] = kernels.gather_rows(env[x], ctx.rows)

    return run


_BINDERS: dict[str, Callable[[Interpreter, Op], _Bound]] = {
    "embed": _bind_embed,
    "pos_embed": _bind_pos_embed,
    "rms_norm": _bind_norm,
    "layer_norm": _bind_norm,
    "head_rms_norm": _bind_norm,
    "linear": _bind_linear,
    "act": lambda _, op: _unary(op, kernels.ACTIVATIONS[str(op.attrs["fn"])]),
    "mul": lambda _, op: _binary(op, torch.mul),
    "add": lambda _, op: _binary(op, torch.add),
    "rope": _bind_rope,
    "kv_write": _bind_kv_write,
    "attention": _bind_attention,
    "gather_rows": _bind_gather,
    "add_rms_norm": _bind_add_norm,
    "add_layer_norm": _bind_add_norm,
    "rope_kv_write": _bind_rope_kv_write,
    "quantize": _bind_quantize,
    "lora": _bind_lora,
    "act_mul": _bind_act_mul,
    "act_mul_s8": _bind_act_mul,
    **dict.fromkeys(("rms_norm_s8", "layer_norm_s8", "add_rms_norm_s8", "add_layer_norm_s8"), _bind_norm_s8),
}
