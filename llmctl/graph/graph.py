"""The Graph: a model as plain data. A flat list of ops over named activation buffers and named weights.

Families write plain ops, passes rewrite a Graph into an equal one with fused ops, runtimes interpret it.
Everything here is frozen, hashable by value and JSON-serialisable; nothing here knows a device or a tensor library.

Conventions
-----------
* An activation buffer is a matrix ``[T, width]`` where T is the number of tokens in the step (or R, the number of
  sampled rows, after ``gather_rows``). Buffers are in SSA form: each is written by exactly one op.
* Step inputs are the reserved buffers ``INPUT_IDS`` and ``POSITIONS`` (width 1, int32); the graph's result is
  ``LOGITS`` (``[R, vocab]``).
* A linear weight is ``[out, in]``; ``y = x @ w.T + b``.
* The paged KV cache is not a buffer: ``kv_write`` and ``attention`` name it by ``layer`` (an index into ``Graph.kv``).
* ``ops.OP_KINDS`` declares the kinds of ops; an absent optional weight is ``""``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from llmctl.graph.code_books import CODE_BOOKS

INPUT_IDS = "input_ids"
POSITIONS = "positions"
LOGITS = "logits"

PRODUCTS = ("linear", "grouped_linear")
"""Kinds of ops whose first weight is a matrix [out, in]."""

Scalar = int | float | str | bool
Attr = Scalar | tuple[Scalar, ...]


@dataclass(frozen=True)
class QuantScheme:
    """How a linear weight is stored as codes with a scale a block: ``w = value(code) * scale``.

    ``value(code)`` is ``code - zero`` for integers and the code book's entry otherwise; with a minimum it is the code,
    and ``w = code * scale + minimum``.

    Attributes:
        bits: width of a code: 2, 3, 4, 5, 6 or 8.
        group_size: columns sharing one scale (and zero or minimum); -1 means the whole row.
        symmetric: nothing is stored for the zero, which is the constant ``2**(bits-1)``, or in the code book.
        act_order: columns belong to groups through a ``g_idx`` table rather than ``k // group_size``.
        book: name in ``code_books.CODE_BOOKS``; "" for integers.
        minimum: a float minimum a group in place of an integer zero.
        block_rows: rows sharing one scale; the last block may have fewer.
        nested: 0, or how many scales that follow one another are stored as codes and floats that they share:
            of integers times a float16, of groups of a row, and minimums likewise; with a code book of 4 bits, as
            bitsandbytes' double quantization. nested_bits: width of those codes, 4, 6 or 8; a code book's are 8.

    Raises:
        ValueError: attributes that contradict one another.
    """

    bits: int
    group_size: int
    symmetric: bool
    act_order: bool = False
    book: str = ""
    minimum: bool = False
    block_rows: int = 1
    nested: int = 0
    nested_bits: int = 8

    def __post_init__(self) -> None:
        if self.book and (self.book not in CODE_BOOKS or CODE_BOOKS[self.book].bits != self.bits):
            raise ValueError(f"no code book '{self.book}' of {self.bits} bits; known: {', '.join(CODE_BOOKS)}")
        if self.symmetric and self.minimum:
            raise ValueError("a symmetric weight has no minimum")
        if self.book and not self.symmetric:
            raise ValueError(f"code book '{self.book}' has its own zero: symmetric must be true")
        if self.block_rows < 1 or (self.block_rows > 1 and not self.symmetric):
            raise ValueError(f"block_rows: expected 1, or more of a symmetric weight, found {self.block_rows}")
        nestable = not self.has_zeros and not (self.book and self.bits == 8)
        if self.nested < 0 or (self.nested and not (nestable and not self.act_order and self.block_rows == 1)):
            raise ValueError(
                "nested: expected 0, or more of integers without a zero a group or a book of 4 bits, columns in order, "
                f"found {self.nested}"
            )
        if self.nested_bits not in ((4, 6, 8) if self.nested and not self.book else (8,)):
            raise ValueError(
                f"nested_bits: expected 8, or 4 or 6 of nested scales of integers, found {self.nested_bits}"
            )

    @property
    def has_zeros(self) -> bool:
        """Whether an integer zero is stored for every group."""
        return not self.symmetric and not self.minimum

    @property
    def nested_zero(self) -> int:
        """The code of a nested scale of 0, of integers: scales have signs where there are no minimums."""
        return 0 if self.minimum else 1 << (self.nested_bits - 1)

    def stacked(self, out_features: int) -> QuantScheme:
        """Of matrices of ``out_features`` rows stacked: blocks that a seam would cut become a scale a row."""
        return self if out_features % self.block_rows == 0 else replace(self, block_rows=1)

    def groups(self, in_features: int) -> int:
        """Number of groups along an input axis of ``in_features``."""
        return 1 if self.group_size == -1 else -(-in_features // self.group_size)

    def row_blocks(self, out_features: int) -> int:
        """Number of blocks along an output axis of ``out_features``."""
        return -(-out_features // self.block_rows)


@dataclass(frozen=True)
class WeightPart:
    """One checkpoint tensor (or a slice of it) that supplies rows of a Weight.

    Attributes:
        tensor: name in the checkpoint, with its HF spelling, e.g. ``model.layers.0.self_attn.q_proj.weight``.
        transpose: the checkpoint stores ``[in, out]`` (GPT-2's Conv1D).
        rows: half-open range of rows (after the transpose) to take; None takes all.
    """

    tensor: str
    transpose: bool = False
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class Weight:
    """A named weight: logical shape, where it comes from, and how it is stored.

    ``parts`` are concatenated along dim 0. ``quant`` is None for a dense weight.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[WeightPart, ...]
    quant: QuantScheme | None = None


@dataclass(frozen=True)
class Buffer:
    """A named activation buffer ``[T, width]``."""

    name: str
    width: int


@dataclass(frozen=True)
class Op:
    """One operation; ``layer`` is its decoder layer, -1 before the first and ``num_layers`` after the last.

    Values of ``attrs`` are ``Attr``s; typed Any because each kind fixes its own.
    """

    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: tuple[str, ...] = ()
    attrs: Mapping[str, Any] = field(default_factory=dict)
    layer: int = -1

    @property
    def matrices(self) -> tuple[str, ...]:
        """Weights that a product multiplies by: one, or one an expert where they are apart."""
        return self.weights if "apart" in self.attrs else self.weights[:1]

    def with_(self, **changes: Any) -> Op:
        """A copy with fields replaced."""
        return replace(self, **changes)


@dataclass(frozen=True)
class KVLayer:
    """Shape of one layer's KV cache: ``kv_heads`` heads of ``head_dim``; ``window`` 0 means full attention."""

    kv_heads: int
    head_dim: int
    window: int = 0


@dataclass(frozen=True)
class Graph:
    """A whole model.

    Attributes:
        family: family-table name, e.g. ``llama``.
        vocab_size: width of LOGITS.
        hidden_size: width of the residual stream.
        num_layers: decoder layers.
        max_position: longest sequence the model was made for, tokens.
        kv: per-layer KV-cache shapes; ops name a layer by its index here.
        buffers / weights / ops: in order of first use / creation / execution.
        passes: names of the passes applied, in order.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    max_position: int
    kv: tuple[KVLayer, ...]
    buffers: Mapping[str, Buffer]
    weights: Mapping[str, Weight]
    ops: tuple[Op, ...]
    passes: tuple[str, ...] = ()

    def layer_ops(self, layer: int) -> tuple[Op, ...]:
        """Ops of decoder layer ``layer`` (-1: before the first; ``num_layers``: after the last), in order."""
        return tuple(op for op in self.ops if op.layer == layer)

    def linears(self) -> Iterator[Op]:
        """All linear ops, in execution order."""
        return (op for op in self.ops if op.kind == "linear")

    def products(self) -> Iterator[Op]:
        """All ops that multiply by a matrix: linears and grouped linears, in execution order."""
        return (op for op in self.ops if op.kind in PRODUCTS)

    @property
    def head(self) -> str:
        """The weight of the linear that writes ``LOGITS``."""
        return next(op.weights[0] for op in self.linears() if LOGITS in op.outputs)

    def tables(self) -> set[str]:
        """Weights that are looked up by row."""
        return {op.weights[0] for op in self.ops if op.kind in ("embed", "pos_embed")}

    def gather_index(self) -> int:
        """Index of the ``gather_rows`` op, from which on only rows whose logits are wanted are computed."""
        return next(i for i, op in enumerate(self.ops) if op.kind == "gather_rows")

    def producer(self, buffer: str) -> Op | None:
        """The op that writes ``buffer``; None for a step input."""
        return next((op for op in self.ops if buffer in op.outputs), None)

    def consumers(self, buffer: str) -> tuple[Op, ...]:
        """The ops that read ``buffer``."""
        return tuple(op for op in self.ops if buffer in op.inputs)
