"""Shape rules of op kinds: what widths, weights and attributes of an op must fit together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llmctl.graph.graph import INPUT_IDS, POSITIONS, Graph, Op

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
"""``fn`` of an op, and (with the suffix ``_mul``) ``epilogue`` of a gated linear."""


class Surroundings:
    """What a rule may ask about the graph around an op, and hold the op to.

    Attributes:
        graph: the op's.
        cached: KV layers written so far; the rules of writers add to it.
        gathered: buffers of gathered rows so far.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.cached: set[int] = set()
        self.gathered: set[str] = set()

    def width(self, buffer: str) -> int:
        """Of a buffer."""
        return self.graph.buffers[buffer].width

    def expect(self, op: Op, what: str, found: Any, expected: Any) -> None:
        """ValueError unless the two are equal."""
        if found != expected:
            raise ValueError(f"op '{op.name}': {what}: expected {expected}, found {found}")

    def shape(self, op: Op, index: int, *expected: int) -> None:
        """A weight's shape, when the weight is there."""
        if op.weights[index]:
            self.expect(op, f"shape of '{op.weights[index]}'", self.graph.weights[op.weights[index]].shape, expected)

    def same_width(self, op: Op) -> int:
        """The one width of all buffers of an op but the step inputs."""
        widths = {self.width(b) for b in (*op.inputs, *op.outputs) if b not in (INPUT_IDS, POSITIONS)}
        self.expect(op, "number of different widths", len(widths), 1)
        return widths.pop()

    def heads(self, op: Op, *buffers: tuple[str, str]) -> None:
        """Buffers as wide as their attribute's heads."""
        for buffer, attr in buffers:
            self.expect(op, f"width of '{buffer}'", self.width(buffer), op.attrs[attr] * op.attrs["head_dim"])


ShapeRule = Callable[[Surroundings, Op], None]
"""Raises ValueError for an op that does not fit. Of a kind that makes int8 rows it sees the op without their scales."""


def embed(s: Surroundings, op: Op) -> None:
    """Ids to rows of a table."""
    s.expect(op, "input", op.inputs[0], INPUT_IDS)
    s.shape(op, 0, s.graph.vocab_size, s.width(op.outputs[0]))


def pos_embed(s: Surroundings, op: Op) -> None:
    """A table with a row for each position, and ``offset`` more."""
    s.expect(op, "second input", op.inputs[1], POSITIONS)
    s.shape(op, 0, s.graph.max_position + op.attrs["offset"], s.same_width(op))


def rowwise(s: Surroundings, op: Op) -> None:
    """Buffers of one width, weights as wide."""
    width = s.same_width(op)
    for i in range(len(op.weights)):
        s.shape(op, i, width)


def head_norm(s: Surroundings, op: Op) -> None:
    """Heads, and a weight for the columns of one."""
    s.same_width(op)
    s.heads(op, (op.inputs[0], "heads"))
    s.shape(op, 0, op.attrs["head_dim"])


def linear(s: Surroundings, op: Op) -> None:
    """A matrix between the inputs' and the outputs' widths, whatever the variant."""
    rows = sum(s.width(b) for b in op.outputs)
    if "splits" in op.attrs:
        s.expect(op, "splits", op.attrs["splits"], tuple(s.width(b) for b in op.outputs))
    if "epilogue" in op.attrs:
        s.expect(op, "epilogue is known", op.attrs["epilogue"] in [f"{fn}_mul" for fn in ACTIVATIONS], True)
        s.expect(op, "splits beside an epilogue", "splits" in op.attrs, False)
        rows *= 2
    if "activations" in op.attrs:
        s.expect(op, "activations", op.attrs["activations"], "int8")
        s.expect(op, "width of the scales", s.width(op.inputs[1]), 1)
    for name in {"scale", "softcap"} & op.attrs.keys():
        s.expect(op, f"{name} of a plain linear is positive", op.attrs[name] > 0 and len(op.outputs) == 1, True)
        s.expect(op, f"{name} beside an epilogue or residual", {"epilogue", "residual"} & op.attrs.keys(), set())
    if "residual" in op.attrs:
        s.expect(op, "residual of a plain linear", op.attrs["residual"] is True and len(op.outputs) == 1, True)
        s.expect(op, "width of the residual", s.width(op.inputs[-1]), s.width(op.outputs[0]))
    s.shape(op, 0, rows, s.width(op.inputs[0]))
    s.shape(op, 1, rows)


def route(s: Surroundings, op: Op) -> None:
    """Logits of all experts to those chosen, within the limits of their groups."""
    count, attrs = s.width(op.inputs[0]), op.attrs
    for output in op.outputs:
        s.expect(op, f"width of '{output}'", s.width(output), attrs["top_k"])
    s.expect(op, "scores are known", attrs["scores"] in ("softmax", "sigmoid"), True)
    s.expect(op, "experts left over by whole groups", count % attrs["groups"], 0)
    most = count // attrs["groups"] * attrs["top_groups"]
    s.expect(op, "top_groups hold top_k", 0 < attrs["top_k"] <= most <= count, True)
    s.shape(op, 0, count)


def grouped_linear(s: Surroundings, op: Op) -> None:
    """A matrix an expert, one below the other; an input for each that is chosen, or one for all."""
    count, chosen, (rows, columns) = op.attrs["count"], s.width(op.inputs[1]), s.graph.weights[op.weights[0]].shape
    for i in range(len(op.weights)):
        s.shape(op, i, rows, columns)
    rows *= count if "apart" in op.attrs else 1
    s.expect(op, "width of x, by its experts", s.width(op.inputs[0]) in (columns, chosen * columns), True)
    s.expect(op, "rows left over by whole experts", rows % count, 0)
    if "epilogue" in op.attrs:
        s.expect(op, "epilogue is known", op.attrs["epilogue"] in [f"{fn}_mul" for fn in ACTIVATIONS], True)
        s.expect(op, "rows of gate and up", rows, 2 * count * (s.width(op.outputs[0]) // chosen))
        rows //= 2
    s.expect(op, "width of the result", s.width(op.outputs[0]), chosen * (rows // count))


def weighted_sum(s: Surroundings, op: Op) -> None:
    """As many parts as shares."""
    s.expect(op, "width of the parts", s.width(op.inputs[0]), s.width(op.inputs[1]) * s.width(op.outputs[0]))


def act(s: Surroundings, op: Op) -> None:
    """Elementwise, by a known function."""
    s.same_width(op)
    s.expect(op, "fn is known", op.attrs["fn"] in ACTIVATIONS, True)


def act_mul(s: Surroundings, op: Op) -> None:
    """Gate and up side by side."""
    s.expect(op, "fn is known", op.attrs["fn"] in ACTIVATIONS, True)
    s.expect(op, "width of gate and up", s.width(op.inputs[0]), 2 * s.width(op.outputs[0]))


def rope(s: Surroundings, op: Op) -> None:
    """Queries and keys as wide as their heads, before and after."""
    s.expect(op, "last input", op.inputs[-1], POSITIONS)
    rotary = op.attrs["rotary_dim"]
    s.expect(op, "rotary_dim is even and fits", rotary % 2 == 0 and 0 < rotary <= op.attrs["head_dim"], True)
    attrs = ("heads", "kv_heads", "kv_heads")
    s.heads(op, *zip(op.inputs[:-1], attrs, strict=False), *zip(op.outputs, attrs, strict=False))


def kv_write(s: Surroundings, op: Op) -> None:
    """Keys and values as wide as their layer's KV cache, which nothing has written yet."""
    _write(s, op, op.inputs)


def rope_kv_write(s: Surroundings, op: Op) -> None:
    """As ``rope`` and ``kv_write``."""
    rope(s, op)
    _write(s, op, op.inputs[1:3])


def _write(s: Surroundings, op: Op, inputs: tuple[str, ...]) -> None:
    layer = op.attrs["layer"]
    s.expect(op, "layer has a KV cache that is not yet written", 0 <= layer < len(s.graph.kv), layer not in s.cached)
    kv = s.graph.kv[layer]
    for buffer in inputs:
        s.expect(op, f"width of '{buffer}'", s.width(buffer), kv.kv_heads * kv.head_dim)
    s.cached.add(layer)


def attention(s: Surroundings, op: Op) -> None:
    """Heads that fit their layer's KV cache, which is written before."""
    s.expect(op, f"layer {op.attrs['layer']} is written before", op.attrs["layer"] in s.cached, True)
    kv = s.graph.kv[op.attrs["layer"]]
    found = (op.attrs["kv_heads"], op.attrs["head_dim"], op.attrs["window"])
    s.expect(op, "kv_heads, head_dim, window", found, (kv.kv_heads, kv.head_dim, kv.window))
    s.expect(op, "heads is a multiple of kv_heads", op.attrs["heads"] % kv.kv_heads, 0)
    s.heads(op, (op.inputs[0], "heads"), (op.outputs[0], "heads"))


def lora(s: Surroundings, op: Op) -> None:
    """Columns of a result over all tokens."""
    s.expect(op, "width of the result", s.width(op.outputs[0]), s.width(op.inputs[1]))
    rank, column, rows = (op.attrs[name] for name in ("rank", "column", "rows"))
    s.expect(op, "rank is positive", rank > 0, True)
    s.expect(op, "columns are the result's", 0 <= column < column + rows <= s.width(op.outputs[0]), True)
    s.expect(op, "tokens have adapters, gathered rows", op.inputs[0] in s.gathered, False)
