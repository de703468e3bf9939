"""Holds a Graph to the conventions of ``graph.py``: SSA, references, shapes, attributes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmctl.graph.graph import INPUT_IDS, LOGITS, POSITIONS, Graph, Op

_ROPE_ATTRS = "heads kv_heads head_dim rotary_dim theta style rope_type"
_ROPE_FIELDS: Mapping[str, str] = {
    "default": "",
    "linear": "factor",
    "llama3": "factor low_freq_factor high_freq_factor original_max_position",
    "yarn": "factor beta_fast beta_slow original_max_position attention_factor truncate",
}
_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


@dataclass(frozen=True)
class _Spec:
    """Counts of inputs, outputs and weights, which weights may be absent, and the attributes."""

    inputs: int
    outputs: int
    weights: int = 0
    optional: tuple[int, ...] = ()
    attrs: str = ""


_SPECS: Mapping[str, _Spec] = {
    "embed": _Spec(1, 1, 1, attrs="scale"),
    "pos_embed": _Spec(2, 1, 1, attrs="offset"),
    "rms_norm": _Spec(1, 1, 1, attrs="eps plus_one"),
    "layer_norm": _Spec(1, 1, 2, (1,), attrs="eps"),
    "head_rms_norm": _Spec(1, 1, 1, attrs="eps heads head_dim"),
    "linear": _Spec(1, 1, 2, (1,)),
    "act": _Spec(1, 1, attrs="fn"),
    "mul": _Spec(2, 1),
    "add": _Spec(2, 1),
    "rope": _Spec(3, 2, attrs=_ROPE_ATTRS),
    "kv_write": _Spec(2, 0, attrs="layer"),
    "attention": _Spec(1, 1, attrs="layer heads kv_heads head_dim scale window softcap"),
    "gather_rows": _Spec(1, 1),
    "add_rms_norm": _Spec(2, 2, 1, attrs="eps plus_one"),
    "add_layer_norm": _Spec(2, 2, 2, (1,), attrs="eps"),
    "rope_kv_write": _Spec(4, 1, attrs=f"{_ROPE_ATTRS} layer"),
    "quantize": _Spec(1, 2),
    "act_mul_s8": _Spec(1, 2, attrs="fn"),
    "rms_norm_s8": _Spec(1, 2, 1, attrs="eps plus_one"),
    "layer_norm_s8": _Spec(1, 2, 2, (1,), attrs="eps"),
    "add_rms_norm_s8": _Spec(2, 3, 1, attrs="eps plus_one"),
    "add_layer_norm_s8": _Spec(2, 3, 2, (1,), attrs="eps"),
    "lora": _Spec(2, 1, attrs="module first_row rows column rank"),
    "act_mul": _Spec(1, 1, attrs="fn"),
}


def check_graph(graph: Graph) -> None:
    """Check a whole graph.

    Raises:
        ValueError: the first thing found wrong; the message names the op, buffer or weight.
    """
    _check_tables(graph)
    checker = _Checker(graph)
    for op in graph.ops:
        checker.check(op)
    checker.finish()


def _check_tables(graph: Graph) -> None:
    for table in (graph.buffers, graph.weights):
        for key, item in table.items():
            if key != item.name:
                raise ValueError(f"'{key}' is filed under another name than its own, '{item.name}'")
    names = [op.name for op in graph.ops]
    if len(set(names)) != len(names):
        raise ValueError(f"op name '{next(n for n in names if names.count(n) > 1)}' occurs twice")
    layers = [op.layer for op in graph.ops]
    if layers != sorted(layers) or not all(-1 <= layer <= graph.num_layers for layer in layers):
        raise ValueError(f"op layers must rise from -1 to {graph.num_layers}")
    if len(graph.kv) != graph.num_layers:
        raise ValueError(f"{len(graph.kv)} KV layers for {graph.num_layers} decoder layers")
    for weight in graph.weights.values():
        if weight.quant is not None and len(weight.shape) != 2:
            raise ValueError(f"weight '{weight.name}': only a matrix can be quantized, found shape {weight.shape}")
        if not weight.parts:
            raise ValueError(f"weight '{weight.name}' has no parts")


class _Checker:
    """Walks the ops in order, remembering what has been written."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.written = {INPUT_IDS, POSITIONS}
        self.read: set[str] = set()
        self.used: set[str] = set()
        self.cached: set[int] = set()
        self.gathered: set[str] = set()

    def check(self, op: Op) -> None:
        spec = _SPECS.get(op.kind)
        if spec is None:
            raise ValueError(f"op '{op.name}': unknown kind '{op.kind}'")
        self._check_attrs(op, spec)
        inputs = spec.inputs + ("activations" in op.attrs) + ("residual" in op.attrs)
        outputs = len(op.attrs["splits"]) if "splits" in op.attrs else spec.outputs
        for what, found, expected in (
            ("inputs", len(op.inputs), inputs),
            ("outputs", len(op.outputs), outputs),
            ("weights", len(op.weights), spec.weights),
        ):
            if found != expected:
                raise ValueError(f"op '{op.name}': expected {expected} {what}, found {found}")
        self._check_flow(op, spec)
        _SHAPES[op.kind](self, op)

    def finish(self) -> None:
        """Nothing unused, and the logits there."""
        graph = self.graph
        if LOGITS not in self.gathered or graph.buffers[LOGITS].width != graph.vocab_size:
            raise ValueError(f"'{LOGITS}' must be written from gathered rows, {graph.vocab_size} wide")
        # One output of several may be idle (the last sum of a fused add and norm); an op without effect may not.
        busy = {b for op in graph.ops if self.read.intersection(op.outputs) for b in op.outputs}
        unused = [b for b in graph.buffers if b not in busy | {INPUT_IDS, POSITIONS, LOGITS}]
        unused += [w for w in graph.weights if w not in self.used]
        if unused:
            raise ValueError(f"'{unused[0]}' is never used")

    def width(self, buffer: str) -> int:
        return self.graph.buffers[buffer].width

    def expect(self, op: Op, what: str, found: Any, expected: Any) -> None:
        if found != expected:
            raise ValueError(f"op '{op.name}': {what}: expected {expected}, found {found}")

    def shape(self, op: Op, index: int, *expected: int) -> None:
        """A weight's shape, when the weight is there."""
        if op.weights[index]:
            self.expect(op, f"shape of '{op.weights[index]}'", self.graph.weights[op.weights[index]].shape, expected)

    def same_width(self, op: Op) -> int:
        widths = {self.width(b) for b in (*op.inputs, *op.outputs) if b not in (INPUT_IDS, POSITIONS)}
        self.expect(op, "number of different widths", len(widths), 1)
        return widths.pop()

    def heads(self, op: Op, *buffers: tuple[str, str]) -> None:
        """Buffers as wide as their attribute's heads."""
        for buffer, attr in buffers:
            self.expect(op, f"width of '{buffer}'", self.width(buffer), op.attrs[attr] * op.attrs["head_dim"])

    def _check_attrs(self, op: Op, spec: _Spec) -> None:
        expected = set(spec.attrs.split())
        if "rope_type" in expected:
            if op.attrs.get("rope_type") not in _ROPE_FIELDS or op.attrs.get("style") not in ("neox", "gptj"):
                raise ValueError(f"op '{op.name}': unknown rope_type or style")
            expected |= set(_ROPE_FIELDS[op.attrs["rope_type"]].split())
        allowed = {"splits", "epilogue", "activations", "residual"} if op.kind == "linear" else set()
        wrong = (expected - set(op.attrs)) | (set(op.attrs) - expected - allowed)
        if wrong:
            raise ValueError(f"op '{op.name}': attributes: expected {sorted(expected)}, found {sorted(op.attrs)}")

    def _check_flow(self, op: Op, spec: _Spec) -> None:
        for name in op.inputs:
            if name not in self.written:
                raise ValueError(f"op '{op.name}' reads '{name}' before it is written")
        gathered = {name in self.gathered for name in op.inputs}
        if len(gathered) != 1 or (gathered == {True} and op.kind == "gather_rows"):
            raise ValueError(f"op '{op.name}' mixes rows of all tokens with gathered rows")
        for name in op.outputs:
            if name in self.written:
                raise ValueError(f"op '{op.name}' writes '{name}', which is written already")
            if name not in self.graph.buffers:
                raise ValueError(f"op '{op.name}' writes '{name}', which is no buffer")
        for i, name in enumerate(op.weights):
            if (name or i not in spec.optional) and name not in self.graph.weights:
                raise ValueError(f"op '{op.name}' uses weight '{name}', which does not exist")
        self.read.update(op.inputs)
        self.written.update(op.outputs)
        self.used.update(op.weights)
        if gathered == {True} or op.kind == "gather_rows":
            self.gathered.update(op.outputs)


def _embed(c: _Checker, op: Op) -> None:
    c.expect(op, "input", op.inputs[0], INPUT_IDS)
    c.shape(op, 0, c.graph.vocab_size, c.width(op.outputs[0]))


def _pos_embed(c: _Checker, op: Op) -> None:
    c.expect(op, "second input", op.inputs[1], POSITIONS)
    c.shape(op, 0, c.graph.max_position + op.attrs["offset"], c.same_width(op))


def _norm(c: _Checker, op: Op) -> None:
    width = c.same_width(_unscaled(c, op))
    for i in range(len(op.weights)):
        c.shape(op, i, width)


def _unscaled(c: _Checker, op: Op) -> Op:
    """The op without the scales it makes, which are as wide as nothing else."""
    if not (op.kind.endswith("_s8") or op.kind == "quantize"):
        return op
    c.expect(op, "width of the scales", c.width(op.outputs[1]), 1)
    return op.with_(outputs=(op.outputs[0], *op.outputs[2:]))


def _head_norm(c: _Checker, op: Op) -> None:
    c.same_width(op)
    c.heads(op, (op.inputs[0], "heads"))
    c.shape(op, 0, op.attrs["head_dim"])


def _linear(c: _Checker, op: Op) -> None:
    rows = sum(c.width(b) for b in op.outputs)
    if "splits" in op.attrs:
        c.expect(op, "splits", op.attrs["splits"], tuple(c.width(b) for b in op.outputs))
    if "epilogue" in op.attrs:
        c.expect(op, "epilogue is known", op.attrs["epilogue"] in [f"{fn}_mul" for fn in _ACTIVATIONS], True)
        c.expect(op, "splits beside an epilogue", "splits" in op.attrs, False)
        rows *= 2
    if "activations" in op.attrs:
        c.expect(op, "activations", op.attrs["activations"], "int8")
        c.expect(op, "width of the scales", c.width(op.inputs[1]), 1)
    if "residual" in op.attrs:
        c.expect(op, "residual of a plain linear", op.attrs["residual"] is True and len(op.outputs) == 1, True)
        c.expect(op, "width of the residual", c.width(op.inputs[-1]), c.width(op.outputs[0]))
    c.shape(op, 0, rows, c.width(op.inputs[0]))
    c.shape(op, 1, rows)


def _elementwise(c: _Checker, op: Op) -> None:
    c.same_width(op)
    if op.kind == "act":
        c.expect(op, "fn is known", op.attrs["fn"] in _ACTIVATIONS, True)


def _rope(c: _Checker, op: Op) -> None:
    c.expect(op, "last input", op.inputs[-1], POSITIONS)
    rotary = op.attrs["rotary_dim"]
    c.expect(op, "rotary_dim is even and fits", rotary % 2 == 0 and 0 < rotary <= op.attrs["head_dim"], True)
    attrs = ("heads", "kv_heads", "kv_heads")
    c.heads(op, *zip(op.inputs[:-1], attrs, strict=False), *zip(op.outputs, attrs, strict=False))
    if op.kind == "rope_kv_write":
        _write(c, op, op.inputs[1:3])


def _write(c: _Checker, op: Op, inputs: tuple[str, ...]) -> None:
    layer = op.attrs["layer"]
    c.expect(op, "layer has a KV cache that is not yet written", 0 <= layer < len(c.graph.kv), layer not in c.cached)
    kv = c.graph.kv[layer]
    for buffer in inputs:
        c.expect(op, f"width of '{buffer}'", c.width(buffer), kv.kv_heads * kv.head_dim)
    c.cached.add(layer)


def _attention(c: _Checker, op: Op) -> None:
    c.expect(op, f"layer {op.attrs['layer']} is written before", op.attrs["layer"] in c.cached, True)
    kv = c.graph.kv[op.attrs["layer"]]
    found = (op.attrs["kv_heads"], op.attrs["head_dim"], op.attrs["window"])
    c.expect(op, "kv_heads, head_dim, window", found, (kv.kv_heads, kv.head_dim, kv.window))
    c.expect(op, "heads is a multiple of kv_heads", op.attrs["heads"] % kv.kv_heads, 0)
    c.heads(op, (op.inputs[0], "heads"), (op.outputs[0], "heads"))


def _lora(c: _Checker, op: Op) -> None:
    c.expect(op, "width of the result", c.width(op.outputs[0]), c.width(op.inputs[1]))
    rank, column, rows = (op.attrs[name] for name in ("rank", "column", "rows"))
    c.expect(op, "rank is positive", rank > 0, True)
    c.expect(op, "columns are the result's", 0 <= column < column + rows <= c.width(op.outputs[0]), True)
    c.expect(op, "tokens have adapters, gathered rows", op.inputs[0] in c.gathered, False)


def _act_mul(c: _Checker, op: Op) -> None:
    c.expect(op, "fn is known", op.attrs["fn"] in _ACTIVATIONS, True)
    c.expect(op, "width of gate and up", c.width(op.inputs[0]), 2 * c.width(op.outputs[0]))
    _unscaled(c, op)


_SHAPES = {
    "embed": _embed,
    "pos_embed": _pos_embed,
    "rms_norm": _norm,
    "layer_norm": _norm,
    "head_rms_norm": _head_norm,
    "linear": _linear,
    "act": _elementwise,
    "mul": _elementwise,
    "add": _elementwise,
    "rope": _rope,
    "kv_write": lambda c, op: _write(c, op, op.inputs),
    "attention": _attention,
    "gather_rows": _elementwise,
    "add_rms_norm": _norm,
    "add_layer_norm": _norm,
    "rope_kv_write": _rope,
    "quantize": _norm,
    "rms_norm_s8": _norm,
    "layer_norm_s8": _norm,
    "add_rms_norm_s8": _norm,
    "add_layer_norm_s8": _norm,
    "lora": _lora,
    "act_mul": _act_mul,
    "act_mul_s8": _act_mul,
}
