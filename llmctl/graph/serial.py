"""Graph <-> plain JSON data, strictly: unknown keys, missing keys and wrong types are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmctl.graph.graph import Attr, Buffer, Graph, KVLayer, Op, QuantScheme, Weight, WeightPart


def graph_to_dict(graph: Graph) -> dict[str, Any]:
    """A Graph as JSON data (dicts, lists, scalars); ``graph_from_dict`` gives back an equal Graph."""
    return {
        "family": graph.family,
        "vocab_size": graph.vocab_size,
        "hidden_size": graph.hidden_size,
        "num_layers": graph.num_layers,
        "max_position": graph.max_position,
        "kv": [{"kv_heads": k.kv_heads, "head_dim": k.head_dim, "window": k.window} for k in graph.kv],
        "buffers": {b.name: b.width for b in graph.buffers.values()},
        "weights": [_weight_to_dict(w) for w in graph.weights.values()],
        "ops": [_op_to_dict(op) for op in graph.ops],
        "passes": list(graph.passes),
    }


def graph_from_dict(data: Mapping[str, Any]) -> Graph:
    """The Graph that ``graph_to_dict`` wrote.

    Raises:
        ValueError: unknown or missing key, or a value of the wrong type; the message names the path to it.
    """
    top = _Reader(data, "graph")
    weights = [_weight_from_dict(w, f"graph.weights[{i}]") for i, w in enumerate(top.items("weights"))]
    widths = _Reader(top.mapping("buffers"), "graph.buffers")
    graph = Graph(
        family=top.text("family"),
        vocab_size=top.integer("vocab_size"),
        hidden_size=top.integer("hidden_size"),
        num_layers=top.integer("num_layers"),
        max_position=top.integer("max_position"),
        kv=tuple(_kv_from_dict(k, f"graph.kv[{i}]") for i, k in enumerate(top.items("kv"))),
        buffers={name: Buffer(name, widths.integer(name)) for name in widths.data},
        weights={w.name: w for w in weights},
        ops=tuple(_op_from_dict(op, f"graph.ops[{i}]") for i, op in enumerate(top.items("ops"))),
        passes=top.strings("passes"),
    )
    top.done()
    if len(graph.weights) != len(weights):
        raise ValueError("graph.weights: a weight name occurs twice")
    return graph


def scheme_to_dict(scheme: QuantScheme) -> dict[str, Any]:
    """A QuantScheme as JSON data."""
    return {
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "symmetric": scheme.symmetric,
        "act_order": scheme.act_order,
        "book": scheme.book,
        "minimum": scheme.minimum,
        "block_rows": scheme.block_rows,
        "nested": scheme.nested,
        "nested_bits": scheme.nested_bits,
    }


def scheme_from_dict(data: Mapping[str, Any], where: str = "scheme") -> QuantScheme:
    """The QuantScheme that ``scheme_to_dict`` wrote; ValueError as ``graph_from_dict``."""
    r = _Reader(data, where)
    bits, group_size = (r.integer(name) for name in ("bits", "group_size"))
    block_rows, nested, nested_bits = (r.integer(name) for name in ("block_rows", "nested", "nested_bits"))
    symmetric, act_order, minimum = (r.flag(name) for name in ("symmetric", "act_order", "minimum"))
    book = r.text("book")
    r.done()
    try:
        return QuantScheme(bits, group_size, symmetric, act_order, book, minimum, block_rows, nested, nested_bits)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _weight_to_dict(weight: Weight) -> dict[str, Any]:
    parts = [
        {"tensor": p.tensor, "transpose": p.transpose, "rows": list(p.rows) if p.rows else None} for p in weight.parts
    ]
    quant = scheme_to_dict(weight.quant) if weight.quant else None
    return {"name": weight.name, "shape": list(weight.shape), "parts": parts, "quant": quant}


def _weight_from_dict(data: Any, where: str) -> Weight:
    r = _Reader(data, where)
    quant = r.take("quant")
    weight = Weight(
        name=r.text("name"),
        shape=r.ints("shape"),
        parts=tuple(_part_from_dict(p, f"{where}.parts[{i}]") for i, p in enumerate(r.items("parts"))),
        quant=None if quant is None else scheme_from_dict(quant, f"{where}.quant"),
    )
    r.done()
    return weight


def _part_from_dict(data: Any, where: str) -> WeightPart:
    r = _Reader(data, where)
    tensor, transpose = r.text("tensor"), r.flag("transpose")
    rows = None if r.data.get("rows") is None else r.ints("rows")
    r.seen.add("rows")
    r.done()
    if rows is not None and len(rows) != 2:
        raise ValueError(f"{where}.rows: expected two integers, found {list(rows)}")
    return WeightPart(tensor, transpose, None if rows is None else (rows[0], rows[1]))


def _kv_from_dict(data: Any, where: str) -> KVLayer:
    r = _Reader(data, where)
    layer = KVLayer(r.integer("kv_heads"), r.integer("head_dim"), r.integer("window"))
    r.done()
    return layer


def _op_to_dict(op: Op) -> dict[str, Any]:
    attrs = {k: list(v) if isinstance(v, tuple) else v for k, v in op.attrs.items()}
    return {
        "kind": op.kind,
        "name": op.name,
        "inputs": list(op.inputs),
        "outputs": list(op.outputs),
        "weights": list(op.weights),
        "attrs": attrs,
        "layer": op.layer,
    }


def _op_from_dict(data: Any, where: str) -> Op:
    r = _Reader(data, where)
    attrs = {str(k): _attr(v, f"{where}.attrs.{k}") for k, v in r.mapping("attrs").items()}
    op = Op(
        kind=r.text("kind"),
        name=r.text("name"),
        inputs=r.strings("inputs"),
        outputs=r.strings("outputs"),
        weights=r.strings("weights"),
        attrs=attrs,
        layer=r.integer("layer"),
    )
    r.done()
    return op


def _attr(value: Any, where: str) -> Attr:
    if isinstance(value, list) and all(isinstance(v, int | float | str | bool) for v in value):
        return tuple(value)
    if isinstance(value, int | float | str | bool):
        return value
    raise ValueError(f"{where}: expected a scalar or a list of scalars, found {type(value).__name__}")


class _Reader:
    """Typed access to a JSON object that remembers which keys were read."""

    def __init__(self, data: Any, where: str) -> None:
        if not isinstance(data, Mapping):
            raise ValueError(f"{where}: expected an object, found {type(data).__name__}")
        self.data = data
        self.where = where
        self.seen: set[str] = set()

    def take(self, key: str) -> Any:
        if key not in self.data:
            raise ValueError(f"{self.where}: key '{key}' is missing")
        self.seen.add(key)
        return self.data[key]

    def done(self) -> None:
        unknown = sorted(set(self.data) - self.seen)
        if unknown:
            raise ValueError(f"{self.where}: unknown key '{unknown[0]}'")

    def _typed(self, key: str, kind: type, name: str) -> Any:
        value = self.take(key)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{self.where}.{key}: expected {name}, found {type(value).__name__}")
        return value

    def text(self, key: str) -> str:
        return str(self._typed(key, str, "a string"))

    def integer(self, key: str) -> int:
        return int(self._typed(key, int, "an integer"))

    def flag(self, key: str) -> bool:
        return bool(self._typed(key, bool, "true or false"))

    def items(self, key: str) -> list[Any]:
        return list(self._typed(key, list, "a list"))

    def mapping(self, key: str) -> Mapping[Any, Any]:
        return dict(self._typed(key, Mapping, "an object"))

    def strings(self, key: str) -> tuple[str, ...]:
        values = self._typed(key, list, "a list of strings")
        if not all(isinstance(v, str) for v in values):
            raise ValueError(f"{self.where}.{key}: expected a list of strings")
        return tuple(values)

    def ints(self, key: str) -> tuple[int, ...]:
        values = self._typed(key, list, "a list of integers")
        if not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
            raise ValueError(f"{self.where}.{key}: expected a list of integers")
        return tuple(values)
