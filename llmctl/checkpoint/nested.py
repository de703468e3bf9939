"""Scales, or minimums, as a file stores those whose scheme is ``nested``: codes times floats that they share."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llmctl.graph.graph import QuantScheme

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class NestedFloats:
    """Of GGUF's K types: ``(code - zero) * super``, integers times a float that groups of a row share.

    Attributes:
        codes: uint8 [N, G]. supers: float16 [N, G / nested].
        zero: ``QuantScheme.nested_zero``, 0 with minimums, else the middle of their codes.
    """

    codes: Tensor
    supers: Tensor
    zero: int

    def floats(self) -> Tensor:
        """float32 [N, G], exact: 11 bits by 8."""
        shared = self.codes.shape[1] // self.supers.shape[1]
        return self.supers.float().repeat_interleave(shared, 1) * (self.codes.float() - self.zero)

    def rows(self, rows: slice | Tensor) -> NestedFloats:
        """Some rows, in any order."""
        return replace(self, codes=self.codes[rows], supers=self.supers[rows])

    def fault(self, shape: tuple[int, int], scheme: QuantScheme) -> str | None:
        """Why they are not those of ``shape`` [N, G]; None where they are."""
        found = (tuple(self.codes.shape), str(self.codes.dtype), tuple(self.supers.shape), str(self.supers.dtype))
        wanted = (shape, "torch.uint8", (shape[0], shape[1] // scheme.nested), "torch.float16")
        ok = (*found, self.zero) == (*wanted, scheme.nested_zero) and shape[1] % scheme.nested == 0
        return (
            None
            if ok
            else f"expected codes, supers and zero {(*wanted, scheme.nested_zero)}, found {(*found, self.zero)}"
        )


@dataclass(frozen=True, eq=False)
class MappedFloats:
    """Of bitsandbytes' double quantization: ``values[code] * super + offset``.

    A super and its offset are those of ``shared`` codes that follow one another in a file's tensor, whatever its rows.

    Attributes:
        codes: uint8 [N, G]. supers, offsets: float32 [S].
        starts: int32 [N], the number of a row's first code, as supers count them: the super of its group ``g`` is
            ``(start + g) // shared``.
        shared: codes of a super.
        values: float32 [256], what the codes stand for; of a scheme that is ``nested``, those of ``nested_map()``.
    """

    codes: Tensor
    supers: Tensor
    offsets: Tensor
    starts: Tensor
    shared: int
    values: Tensor

    def floats(self) -> Tensor:
        """float32 [N, G], by bitsandbytes' own operations in its order."""
        at = self._supers()
        return self.values.to(self.codes.device)[self.codes.int()] * self.supers[at] + self.offsets[at]

    def rows(self, rows: slice | Tensor) -> MappedFloats:
        """Some rows, in any order, with no supers but theirs."""
        some = replace(self, codes=self.codes[rows], starts=self.starts[rows])
        used = some._supers().unique()
        before = some.starts // self.shared - _places(used, len(self.supers))[some.starts.long() // self.shared]
        starts = some.starts - self.shared * before
        return replace(some, supers=self.supers[used], offsets=self.offsets[used], starts=starts.int())

    def fault(self, shape: tuple[int, int], scheme: QuantScheme) -> str | None:
        """Why they are not those of ``shape`` [N, G]; None where they are."""
        found = (tuple(self.codes.shape), str(self.codes.dtype), tuple(self.starts.shape), self.shared)
        wanted = (shape, "torch.uint8", shape[:1], scheme.nested)
        if found != wanted:
            return f"expected codes, starts and shared {wanted}, found {found}"
        return None if is_usual(self.values) else "expected codes of the usual map, found those of another"

    def _supers(self) -> Tensor:
        """Each code's super, int64 [N, G]."""
        import torch

        groups = torch.arange(self.codes.shape[1], device=self.codes.device)
        return (self.starts.long().unsqueeze(1) + groups) // self.shared


def of_tensor(codes: Tensor, supers: Tensor, offsets: Tensor, shared: int, values: Tensor) -> MappedFloats:
    """Of one file's tensor, whose rows follow one another; see MappedFloats."""
    import torch

    starts = torch.arange(codes.shape[0], dtype=torch.int32) * codes.shape[1]
    return MappedFloats(codes, supers, offsets, starts, shared, values)


def mapped_supers(rows: int, groups: int, shared: int, parts: int) -> int:
    """At most so many supers have codes [rows, groups] of ``parts`` files' tensors, or some rows of those.

    A part begins and ends within a super: one more than it has whole ones, and another.
    """
    return rows * groups // shared + 2 * parts


def is_usual(values: Tensor) -> bool:
    """Whether codes that stand for ``values``, float32 of 256, stand for those of ``nested_map()``."""
    return bool((values.reshape(-1).cpu() == usual_values()).all())


NestedParts = tuple[NestedFloats | MappedFloats, ...]
"""Of the scales, and of the minimums where there are any."""


def nested_fault(parts: NestedParts, floats: Sequence[Tensor], scheme: QuantScheme) -> str | None:
    """Why parts are not those of a scheme, or floats [N, G] not what they multiply out to; None where all is well."""
    kind = MappedFloats if scheme.book else NestedFloats
    if len(parts) != len(floats) or not all(isinstance(part, kind) for part in parts):
        return f"expected {len(floats)} of {kind.__name__}, found {', '.join(type(part).__name__ for part in parts)}"
    for part, of in zip(parts, floats, strict=True):
        fault = part.fault((of.shape[0], of.shape[1]), scheme)
        if fault is None and not _same_bits(part.floats(), of):
            fault = "expected scales and minimums to be what the codes multiply out to, found others"
        if fault is not None:
            return fault
    return None


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """NaN is like NaN: a file may have some, which is refused by another name."""
    import torch

    return one.dtype == other.dtype and torch.equal(one.view(torch.int32), other.view(torch.int32))


def take_nested(nested: NestedParts, rows: slice | Tensor) -> NestedParts:
    """Some rows of each."""
    return tuple(part.rows(rows) for part in nested)


def stack_nested(parts: Sequence[NestedParts]) -> NestedParts:
    """Of weights one below the other, all of one scheme."""
    return tuple(_stack(kind) for kind in zip(*parts, strict=True))


def _stack(kind: Sequence[NestedFloats | MappedFloats]) -> NestedFloats | MappedFloats:
    import torch

    mapped = [part for part in kind if isinstance(part, MappedFloats)]
    if mapped:
        return _stack_mapped(mapped)
    codes, supers = torch.cat([part.codes for part in kind]), torch.cat([part.supers for part in kind])
    return replace(kind[0], codes=codes, supers=supers)


def _stack_mapped(parts: Sequence[MappedFloats]) -> MappedFloats:
    import torch

    starts, supers = [], 0
    for part in parts:
        starts.append(part.starts + supers * part.shared)
        supers += len(part.supers)
    planes = {name: torch.cat([getattr(part, name) for part in parts]) for name in ("codes", "supers", "offsets")}
    return replace(parts[0], **planes, starts=torch.cat(starts))


def _places(used: Tensor, count: int) -> Tensor:
    """The place among ``used`` of each of ``count`` supers, int32; of those that are not used, 0."""
    import torch

    places = torch.zeros(count, dtype=torch.int32, device=used.device)
    places[used] = torch.arange(len(used), dtype=torch.int32, device=used.device)
    return places


@functools.cache
def usual_values() -> Tensor:
    """``nested_map()`` as a tensor."""
    import torch

    return torch.from_numpy(nested_map())


@functools.cache
def nested_map() -> NDArray[np.float32]:
    """float32 [256], ascending: 0, 1, and of both signs 2**i values between 10**(i-7) and 10**(i-6), i = 0 … 6.

    Source: bitsandbytes.functional.create_dynamic_map, version 0.50.
    """
    values = [0.0, 1.0]
    for power in range(7):
        bounds = _evenly(2**power + 1)
        middles = np.float32(10.0 ** (power - 6)) * ((bounds[:-1] + bounds[1:]) / np.float32(2))
        values += [*middles.tolist(), *(-middles).tolist()]
    return np.array(sorted(values), np.float32)


def _evenly(count: int) -> NDArray[np.float32]:
    """``torch.linspace(0.1, 1, count)`` to the bit: float32, from either end, a step's product and sum rounded once."""
    first, last, places = np.float32(0.1), np.float32(1), np.arange(count)
    step = float((last - first) / np.float32(count - 1))
    sums = np.where(places < count // 2, float(first) + step * places, float(last) - step * places[::-1])
    return sums.astype(np.float32)
