"""What a family's graph is written with: ops, buffers and weights in execution order, held to the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from llmctl.errors import CheckpointError, UnsupportedModelError
from llmctl.graph.graph import INPUT_IDS, POSITIONS, Attr, Buffer, Op, QuantScheme, Weight, WeightPart


class TensorInfo(Protocol):
    """What a checkpoint says about one tensor without reading it; shape is ``[out, in]`` for a quantized linear."""

    @property
    def shape(self) -> Sequence[int]: ...

    @property
    def quant(self) -> QuantScheme | None: ...


Lookup = Callable[[str], TensorInfo | None]


class GraphWriter:
    """Accumulates ops, buffers and weights.

    Attributes:
        layer: of the ops to come.
    """

    def __init__(self, family: str, lookup: Lookup | None) -> None:
        self.family, self.lookup = family, lookup
        self.layer = -1
        self.ops: list[Op] = []
        self.buffers: dict[str, Buffer] = {INPUT_IDS: Buffer(INPUT_IDS, 1), POSITIONS: Buffer(POSITIONS, 1)}
        self.weights: dict[str, Weight] = {}

    def _op(
        self,
        kind: str,
        name: str,
        inputs: Sequence[str],
        width: int,
        weights: Sequence[str] = (),
        attrs: Mapping[str, Attr] | None = None,
    ) -> str:
        return self._ops(kind, name, inputs, (width,), weights, attrs or {})[0]

    def _ops(
        self,
        kind: str,
        name: str,
        inputs: Sequence[str],
        widths: Sequence[int],
        weights: Sequence[str],
        attrs: Mapping[str, Attr],
    ) -> tuple[str, ...]:
        """Append an op; a single output is named after the op, several are numbered. Returns their names."""
        outputs = (name,) if len(widths) == 1 else tuple(f"{name}.{i}" for i in range(len(widths)))
        for output, width in zip(outputs, widths, strict=True):
            self.buffers[output] = Buffer(output, width)
        self._append(kind, name, inputs, outputs, weights, attrs)
        return outputs

    def _append(
        self,
        kind: str,
        name: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        weights: Sequence[str],
        attrs: Mapping[str, Attr],
    ) -> None:
        self.ops.append(Op(kind, name, tuple(inputs), tuple(outputs), tuple(weights), dict(attrs), self.layer))

    def _weight(
        self,
        name: str,
        shape: tuple[int, ...],
        tensor: str,
        rows: Sequence[tuple[int, int]] = (),
        total: int | None = None,
        conv1d: bool = False,
    ) -> str:
        """Register a weight supplied by ``tensor``, or by its ``rows`` out of ``total`` (after the transpose)."""
        info = self._describe(tensor)
        quant = info.quant if info is not None else None
        if quant is not None and rows:  # the slice may cut a block
            quant = replace(quant, block_rows=1)
        transpose = conv1d and quant is None
        parts = tuple(WeightPart(tensor, transpose, taken) for taken in rows or (None,))
        if info is not None:
            stored = (shape[0] if total is None else total, *shape[1:])
            _check_shape(tensor, stored[::-1] if transpose else stored, tuple(info.shape))
        self.weights[name] = Weight(name, shape, parts, quant)
        return name

    def _describe(self, tensor: str) -> TensorInfo | None:
        if self.lookup is None:
            return None
        info = self.lookup(tensor)
        if info is None:
            raise CheckpointError(
                f"checkpoint: tensor '{tensor}' is missing",
                fix=f"family '{self.family}' needs it; check that config.json belongs to these weights",
            )
        return info

    def _stacked_weight(self, name: str, shape: tuple[int, int], tensors: Sequence[str]) -> str:
        """Register a weight made of tensors ``[out, in]`` of equal shape, one below the other.

        Raises:
            UnsupportedModelError: they are quantized in ways that no one stack has.
        """
        infos = [self._describe(tensor) for tensor in tensors]
        schemes = {tensor: info.quant for tensor, info in zip(tensors, infos, strict=True) if info is not None}
        for tensor, info in zip(tensors, infos, strict=True):
            if info is not None:
                _check_shape(tensor, shape, tuple(info.shape))
        first = schemes.get(tensors[0])
        odd = next((tensor for tensor, scheme in schemes.items() if scheme != first), None)
        if odd is not None:
            raise UnsupportedModelError(
                f"checkpoint: '{odd}' is stored as {_shown(schemes[odd])}, '{tensors[0]}' as {_shown(first)}: the "
                "experts of a layer are read where they are alike",
                fix="quantize it again, without --override for some of the experts",
            )
        if first is not None and first.act_order:
            raise UnsupportedModelError(
                f"checkpoint: '{tensors[0]}': experts with act-order groups are not read",
                fix="quantize it again, with --static-groups or --no-act-order",
            )
        quant = first and first.stacked(shape[0])
        parts = tuple(WeightPart(tensor) for tensor in tensors)
        self.weights[name] = Weight(name, (len(tensors) * shape[0], shape[1]), parts, quant)
        return name


def _shown(scheme: QuantScheme | None) -> str:
    if scheme is None:
        return "a dense weight"
    return f"{scheme.bits} bits in groups of {scheme.group_size}" + (f" ({scheme.book})" if scheme.book else "")


def _check_shape(tensor: str, expected: tuple[int, ...], found: tuple[int, ...]) -> None:
    if expected != found:
        raise CheckpointError(f"checkpoint: tensor '{tensor}': expected shape {list(expected)}, found {list(found)}")
