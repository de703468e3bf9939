"""Rotations folded into a model's weights (QuaRot, Ashkboos et al., 2024; SpinQuant's R1 and R2, Liu et al., 2024).

The residual stream is turned by one orthogonal matrix, what a head's values are by another. An RMS norm's root mean
square is that of the turned stream, once its weight has moved into the linears that read it; so the model computes what
it did, while outliers of weights and activations are spread over all channels. Where the matrices may go is found by
following the Graph, never by names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llmctl.checkpoint.assemble import assemble, checkpoint_graph
from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.checkpoint.reader import Checkpoint
from llmctl.checkpoint.tensor_info import TensorInfo
from llmctl.errors import UnsupportedModelError
from llmctl.graph.family_table import FAMILIES
from llmctl.graph.graph import Graph, Op
from llmctl.quantize.hadamard import Turn, hadamard_orders

STREAM, HEADS = "stream", "heads"


def rotate(checkpoint: Checkpoint, seed: int) -> Checkpoint:
    """The checkpoint with its residual stream and its heads' values turned; tensors are turned as they are asked for.

    Embeddings that the head shares become two tensors: the head alone takes the last norm's weight.

    Raises:
        UnsupportedModelError: a model that rotations do not pass, or of a width without a known Hadamard matrix.
    """
    untied = _untied(checkpoint)
    graph = checkpoint_graph(untied)
    changes = find_changes(graph)
    generator = torch.Generator().manual_seed(seed)
    widths = {STREAM: graph.hidden_size, HEADS: graph.kv[0].head_dim}
    try:
        turns = {name: Turn.random(width, generator) for name, width in widths.items()}
    except ValueError as error:
        raise UnsupportedModelError(f"--rotate: {error}", fix="leave --rotate out") from error
    return untied.over(_Turned(untied, graph, changes, turns), untied.config_with_dtype)


def rotated(graph: Graph) -> str:
    """What a rotation of this model turns, in a line for users."""
    widths = ((graph.hidden_size, "the residual stream"), (graph.kv[0].head_dim, "the values of heads"))
    said = (f"{what} ({' x '.join(map(str, hadamard_orders(width)))})" for width, what in widths)
    return f"rotated: {' and '.join(said)}"


@dataclass(frozen=True)
class Change:
    """What becomes of one weight; of a bias, ``rows`` alone.

    Attributes:
        gain: the norm's weight that its columns take; "": none.
        plus_one: that norm multiplies by 1 + weight.
        columns, rows: the turns of its input and of its output, ``STREAM`` or ``HEADS``; "": none.
        norm: it is the weight of a norm that has been folded away.
    """

    gain: str = ""
    plus_one: bool = False
    columns: str = ""
    rows: str = ""
    norm: bool = False


def find_changes(graph: Graph) -> dict[str, Change]:
    """Graph weight -> what turning the residual stream and the heads' values makes of it.

    Raises:
        UnsupportedModelError: the stream is read or written by something that a rotation does not pass.
    """
    return _Finder(graph).find()


class _Finder:
    """Follows the stream from the embeddings to the head."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.changes: dict[str, Change] = {}

    def find(self) -> dict[str, Change]:
        stream: set[str] = set()
        for op in self.graph.ops:
            if op.kind == "embed":
                stream.add(op.outputs[0])
                self._change(op.weights[0], columns=STREAM)
            elif not stream.intersection(op.inputs):
                continue
            elif op.kind == "add":
                for branch in (name for name in op.inputs if name not in stream):
                    self._turn_writers(branch, op)
                stream.add(op.outputs[0])
            elif op.kind == "rms_norm":
                self._fold_norm(op)
            else:
                raise _refused(op, "reads the residual stream")
        for op in self.graph.ops:
            if op.kind == "attention":
                self._turn_heads(op)
        return self.changes

    def _turn_writers(self, buffer: str, reader: Op) -> None:
        """The linears behind a branch that is added to the stream."""
        op = self.graph.producer(buffer)
        if op is None or op.kind not in ("linear", "add") or self.graph.consumers(buffer) != (reader,):
            raise _refused(op or reader, "writes the residual stream")
        if op.kind == "add":
            for branch in op.inputs:
                self._turn_writers(branch, op)
        else:
            self._turn_rows(op, STREAM)

    def _fold_norm(self, norm: Op) -> None:
        plus_one = bool(norm.attrs["plus_one"])
        for op in self._readers(norm.outputs[0]):
            self._change(op.weights[0], gain=norm.weights[0], plus_one=plus_one, columns=STREAM)
        self._change(norm.weights[0], norm=True, plus_one=plus_one)

    def _readers(self, buffer: str) -> list[Op]:
        """The linears that read a norm's output."""
        found: list[Op] = []
        for op in self.graph.consumers(buffer):
            if op.kind == "gather_rows":
                found += self._readers(op.outputs[0])
            elif op.kind == "linear":
                found.append(op)
            else:
                raise _refused(op, "reads a norm of the residual stream")
        return found

    def _turn_heads(self, attention: Op) -> None:
        layer = attention.attrs["layer"]
        writers = [op for op in self.graph.ops if op.kind == "kv_write" and op.attrs["layer"] == layer]
        values, readers = writers[0].inputs[1], self.graph.consumers(attention.outputs[0])
        source = self.graph.producer(values)
        shared = len(writers) > 1 or self.graph.consumers(values) != (writers[0],)
        if shared or source is None or source.kind != "linear" or any(op.kind != "linear" for op in readers):
            raise _refused(attention, "has values that something else reads or makes")
        self._turn_rows(source, HEADS)
        for op in readers:
            self._change(op.weights[0], columns=HEADS)

    def _turn_rows(self, op: Op, turn: str) -> None:
        for name in filter(None, op.weights):
            self._change(name, rows=turn)

    def _change(self, weight: str, **what: Any) -> None:
        self.changes[weight] = replace(self.changes.get(weight, Change()), **what)


def _refused(op: Op, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"--rotate: '{op.name}' ({op.kind}) {what}, and a rotation does not pass it", fix="leave --rotate out"
    )


def _untied(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with a head of its own, equal to the embeddings where it has been theirs."""
    graph = checkpoint_graph(checkpoint)
    if graph.head not in graph.tables():
        return checkpoint
    name, table = f"{FAMILIES[graph.family].names.head}.weight", graph.weights[graph.head].parts[0].tensor
    return checkpoint.over(_Untied(checkpoint, name, table), {**checkpoint.config, "tie_word_embeddings": False})


class _Untied:
    """A checkpoint's tensors, one of them under another name besides."""

    def __init__(self, checkpoint: Checkpoint, name: str, of: str) -> None:
        self._checkpoint, self._name, self._of = checkpoint, name, of
        self.release = checkpoint.release

    def entries(self) -> Mapping[str, TensorInfo]:
        names = self._checkpoint.names()
        found = {name: self._checkpoint.describe(name) for name in names}
        return {**found, self._name: replace(found[self._of], stored="")}

    def load(self, name: str) -> Tensor | QuantizedWeight:
        return self._checkpoint.weight(self._of if name == self._name else name)


class _Turned:
    """A checkpoint's tensors after their changes, in float32."""

    def __init__(
        self, checkpoint: Checkpoint, graph: Graph, changes: Mapping[str, Change], turns: Mapping[str, Turn]
    ) -> None:
        self._checkpoint, self._graph, self._changes, self._turns = checkpoint, graph, changes, turns
        self.release = checkpoint.release
        self._weights: dict[str, list[str]] = {}
        for name in changes:
            for part in graph.weights[name].parts:
                self._weights.setdefault(part.tensor, []).append(name)

    def entries(self) -> Mapping[str, TensorInfo]:
        found = {name: self._checkpoint.describe(name) for name in self._checkpoint.names()}
        return {n: replace(info, dtype="F32", stored="") if n in self._weights else info for n, info in found.items()}

    def load(self, name: str) -> Tensor | QuantizedWeight:
        found = self._checkpoint.weight(name)
        if name not in self._weights:
            return found
        assert isinstance(found, Tensor)
        made = found.to(torch.float32, copy=True)
        for weight in self._weights[name]:
            (part,) = self._graph.weights[weight].parts  # a plain graph's linears are whole, and LayerNorm's refused
            rows = slice(*part.rows) if part.rows else slice(None)
            made[rows] = self._changed(self._changes[weight], made[rows])
        return made

    def _changed(self, change: Change, value: Tensor) -> Tensor:
        if change.norm:
            return torch.full_like(value, 0.0 if change.plus_one else 1.0)
        if change.gain:
            gain = assemble(self._graph.weights[change.gain], self._checkpoint)
            assert isinstance(gain, Tensor)
            value = value * (gain.float() + 1 if change.plus_one else gain.float())
        if change.columns:
            value = self._turns[change.columns].rows(value)
        if change.rows:
            turn = self._turns[change.rows]
            value = turn.rows(value) if value.ndim == 1 else turn.columns(value)
        return value
