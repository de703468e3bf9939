"""Which checkpoint modules get quantized: the linears of the Graph, seen as the tensors that supply their rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from llmctl.errors import UnsupportedModelError, UsageError
from llmctl.graph import experts
from llmctl.graph.graph import Graph, Op

_CHOOSING = ("route", "weighted_sum")


@dataclass(frozen=True)
class Module:
    """A linear of the checkpoint, e.g. ``model.layers.0.self_attn.q_proj``.

    Attributes:
        name: the tensor's name without ``.weight``.
        layer: decoder layer of its ops.
        weights: the graph weights it supplies, in row order (several for a fused tensor such as GPT-2's ``c_attn``).
        rows: output rows of each.
        in_features: input width.
        aliases: what patterns may call it: its name and its ops'.
    """

    name: str
    layer: int
    weights: tuple[str, ...]
    rows: tuple[int, ...]
    in_features: int
    aliases: tuple[str, ...]

    def matches(self, pattern: str) -> bool:
        """Whether a pattern of ``select_modules`` means it."""
        return any(_matches(pattern, alias) for alias in self.aliases)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return (sum(self.rows), self.in_features)


@dataclass(frozen=True)
class Selection:
    """The split of a Graph's linears: modules to quantize, names of those left dense."""

    modules: tuple[Module, ...]
    ignored: tuple[str, ...]

    def of_layer(self, layer: int) -> tuple[Module, ...]:
        """Modules to quantize in one decoder layer."""
        return tuple(m for m in self.modules if m.layer == layer)


def select_modules(graph: Graph, ignore: Sequence[str]) -> Selection:
    """Split a plain Graph's linears (experts apart) by the ``--ignore`` patterns; those that choose experts stay dense.

    A pattern is a run of whole name components (``lm_head``, ``mlp``, ``layers.0``, ``layers.3.mlp.down_proj``) or a
    glob over the whole name (``*.layers.1?.*``).

    Raises:
        UsageError: a pattern that matches no linear, nothing left to quantize, or a head tied to the embeddings that
            is not ignored.
        UnsupportedModelError: a linear made of several checkpoint tensors, or of rows here and there of one.
    """
    linears: dict[str, list[Op]] = {}
    for op in experts.linears(graph):
        parts = graph.weights[op.weights[0]].parts
        if len({part.tensor for part in parts}) != 1:
            raise UnsupportedModelError(f"linear '{op.name}' is made of {len(parts)} tensors; quantize the plain graph")
        linears.setdefault(parts[0].tensor.removesuffix(".weight"), []).append(op)
    tied = {name for name in linears if _is_embedding(graph, name)}
    aliases = {name: {name, *(op.name for op in ops)} for name, ops in linears.items()}
    unused = [p for p in ignore if not any(_matches(p, a) for names in aliases.values() for a in names)]
    if unused:
        raise UsageError(f"--ignore {unused[0]}: matches no linear of this model", param="ignore")
    ignored = {name for name, names in aliases.items() if any(_matches(p, a) for p in ignore for a in names)}
    choosing = _choosing(graph)
    ignored |= {name for name, ops in linears.items() if any(op.outputs[0] in choosing for op in ops)}
    if tied - ignored:
        raise UsageError(
            f"the head shares its weight with the embeddings ({min(tied)}) and cannot be quantized",
            fix="add --ignore lm_head",
            param="ignore",
        )
    chosen = [_module(graph, name, ops) for name, ops in linears.items() if name not in ignored]
    if not chosen:
        raise UsageError("--ignore leaves no linear to quantize", param="ignore")
    return Selection(tuple(chosen), tuple(sorted(ignored - tied)))


def _matches(pattern: str, name: str) -> bool:
    if any(c in pattern for c in "*?["):
        return fnmatchcase(name, pattern)
    return f".{pattern}." in f".{name}."


def _choosing(graph: Graph) -> set[str]:
    """Buffers that say which experts a token takes, or how much of one."""
    return {op.inputs[0] if op.kind == "route" else op.inputs[1] for op in graph.ops if op.kind in _CHOOSING}


def _is_embedding(graph: Graph, module: str) -> bool:
    tables = (op.weights[0] for op in graph.ops if op.kind in ("embed", "pos_embed"))
    return any(part.tensor == f"{module}.weight" for table in tables for part in graph.weights[table].parts)


def _module(graph: Graph, name: str, ops: Sequence[Op]) -> Module:
    if any(len(graph.weights[op.weights[0]].parts) > 1 for op in ops):
        raise UnsupportedModelError(
            f"'{name}' cannot be quantized: rows of several linears take turns in it",
            fix=f"add --ignore {name.rpartition('.')[2]}",
        )
    weights = sorted((graph.weights[op.weights[0]] for op in ops), key=lambda w: w.parts[0].rows or (0, 0))
    end = 0
    for weight in weights:
        start, stop = weight.parts[0].rows or (0, weight.shape[0])
        if start != end:
            raise UnsupportedModelError(f"rows {end} to {start} of '{name}' belong to no linear")
        end = stop
    layer = next(op.layer for op in ops)
    rows = tuple(w.shape[0] for w in weights)
    aliases = tuple(dict.fromkeys((name, *(op.name for op in ops))))
    return Module(name, layer, tuple(w.name for w in weights), rows, weights[0].shape[1], aliases)
