"""Holds a Graph to the conventions of ``graph.py`` and its ops to their kinds: SSA, references, shapes, attributes."""

from __future__ import annotations

from llmctl.graph.graph import INPUT_IDS, LOGITS, POSITIONS, Graph, Op
from llmctl.graph.ops import OP_KINDS, ROPE_FIELDS, OpKind
from llmctl.graph.shapes import Surroundings


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
        self.around = Surroundings(graph)
        self.written = {INPUT_IDS, POSITIONS}
        self.read: set[str] = set()
        self.used: set[str] = set()

    def check(self, op: Op) -> None:
        kind = OP_KINDS.get(op.kind)
        if kind is None:
            raise ValueError(f"op '{op.name}': unknown kind '{op.kind}'")
        self._check_attrs(op, kind)
        for what, expected in kind.counts(op).items():
            found = len(getattr(op, what))
            if found != expected:
                raise ValueError(f"op '{op.name}': expected {expected} {what}, found {found}")
        self._check_flow(op, kind)
        kind.shapes(self.around, self._unscaled(op) if kind.int8_rows else op)

    def finish(self) -> None:
        """Nothing unused, and the logits there."""
        graph = self.graph
        if LOGITS not in self.around.gathered or graph.buffers[LOGITS].width != graph.vocab_size:
            raise ValueError(f"'{LOGITS}' must be written from gathered rows, {graph.vocab_size} wide")
        # One output of several may be idle (the last sum of a fused add and norm); an op without effect may not.
        busy = {b for op in graph.ops if self.read.intersection(op.outputs) for b in op.outputs}
        unused = [b for b in graph.buffers if b not in busy | {INPUT_IDS, POSITIONS, LOGITS}]
        unused += [w for w in graph.weights if w not in self.used]
        if unused:
            raise ValueError(f"'{unused[0]}' is never used")

    def _unscaled(self, op: Op) -> Op:
        """An op that makes int8 rows without their scales, which are as wide as nothing else."""
        self.around.expect(op, "width of the scales", self.around.width(op.outputs[1]), 1)
        return op.with_(outputs=(op.outputs[0], *op.outputs[2:]))

    def _check_attrs(self, op: Op, kind: OpKind) -> None:
        expected = set(kind.attrs)
        if "rope_type" in expected:
            if op.attrs.get("rope_type") not in ROPE_FIELDS or op.attrs.get("style") not in ("neox", "gptj"):
                raise ValueError(f"op '{op.name}': unknown rope_type or style")
            expected |= set(ROPE_FIELDS[op.attrs["rope_type"]])
        wrong = (expected - set(op.attrs)) | (set(op.attrs) - expected - set(kind.variants))
        if wrong:
            raise ValueError(f"op '{op.name}': attributes: expected {sorted(expected)}, found {sorted(op.attrs)}")

    def _check_flow(self, op: Op, kind: OpKind) -> None:
        for name in op.inputs:
            if name not in self.written:
                raise ValueError(f"op '{op.name}' reads '{name}' before it is written")
        gathered = {name in self.around.gathered for name in op.inputs}
        if len(gathered) != 1 or (gathered == {True} and op.kind == "gather_rows"):
            raise ValueError(f"op '{op.name}' mixes rows of all tokens with gathered rows")
        for name in op.outputs:
            if name in self.written:
                raise ValueError(f"op '{op.name}' writes '{name}', which is written already")
            if name not in self.graph.buffers:
                raise ValueError(f"op '{op.name}' writes '{name}', which is no buffer")
        roles = kind.weights * len(op.weights) if "apart" in op.attrs else kind.weights
        for role, name in zip(roles, op.weights, strict=True):
            if (name or role not in kind.optional) and name not in self.graph.weights:
                raise ValueError(f"op '{op.name}' uses weight '{name}', which does not exist")
        self.read.update(op.inputs)
        self.written.update(op.outputs)
        self.used.update(op.weights)
        if gathered == {True} or op.kind == "gather_rows":
            self.around.gathered.update(op.outputs)
