"""Scales, or minimums, as a file stores those whose scheme is ``nested``: codes times floats that they share."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class NestedFloats:
    """Of GGUF's K types: integers times a float that groups of a row share.

    Attributes:
        codes: uint8 [N, G]. supers: float16 [N, G / nested].
    """

    codes: Tensor
    supers: Tensor

    def floats(self) -> Tensor:
        """float32 [N, G], exact: 11 bits by 8."""
        shared = self.codes.shape[1] // self.supers.shape[1]
        return self.supers.float().repeat_interleave(shared, 1) * self.codes.float()

    def rows(self, rows: slice | Tensor) -> NestedFloats:
        """Some rows, in any order."""
        return NestedFloats(self.codes[rows], self.supers[rows])

    def fault(self, shape: tuple[int, int], nested: int) -> str | None:
        """Why they are not those of ``shape`` [N, G]; None where they are."""
        found = (tuple(self.codes.shape), str(self.codes.dtype), tuple(self.supers.shape), str(self.supers.dtype))
        wanted = (shape, "torch.uint8", (shape[0], shape[1] // nested), "torch.float16")
        ok = found == wanted and shape[1] % nested == 0
        return None if ok else f"expected codes and supers {wanted}, found {found}"


@dataclass(frozen=True, eq=False)
class MappedFloats:
    """Of bitsandbytes' double quantization: ``nested_map()[code] * super + offset``.

    A super and its offset are those of ``shared`` codes that follow one another in a file's tensor, whatever its rows.

    Attributes:
        codes: uint8 [N, G]. supers, offsets: float32 [S].
        starts: int32 [N], the number of a row's first code, as supers count them: the super of its group ``g`` is
            ``(start + g) // shared``.
        shared: codes of a super.
    """

    codes: Tensor
    supers: Tensor
    offsets: Tensor
    starts: Tensor
    shared: int

    def floats(self) -> Tensor:
        """float32 [N, G], by bitsandbytes' own operations in its order."""
        at = self._supers()
        return nested_map().to(self.codes.device)[self.codes.int()] * self.supers[at] + self.offsets[at]

    def rows(self, rows: slice | Tensor) -> MappedFloats:
        """Some rows, in any order, with no supers but theirs."""
        some = replace(self, codes=self.codes[rows], starts=self.starts[rows])
        used = some._supers().unique()
        before = some.starts // self.shared - _places(used, len(self.supers))[some.starts.long() // self.shared]
        starts = some.starts - self.shared * before
        return replace(some, supers=self.supers[used], offsets=self.offsets[used], starts=starts.int())

    def fault(self, shape: tuple[int, int], nested: int) -> str | None:
        """Why they are not those of ``shape`` [N, G]; None where they are."""
        found = (tuple(self.codes.shape), str(self.codes.dtype), tuple(self.starts.shape), self.shared)
        wanted = (shape, "torch.uint8", shape[:1], nested)
        return None if found == wanted else f"expected codes, starts and shared {wanted}, found {found}"

    def _supers(self) -> Tensor:
        """Each code's super, int64 [N, G]."""
        import torch

        groups = torch.arange(self.codes.shape[1], device=self.codes.device)
        return (self.starts.long().unsqueeze(1) + groups) // self.shared


Nested = tuple[NestedFloats | MappedFloats, ...]
"""Of the scales, and of the minimums where there are any."""


def take_nested(nested: Nested, rows: slice | Tensor) -> Nested:
    """Some rows of each."""
    return tuple(part.rows(rows) for part in nested)


def stack_nested(parts: Sequence[Nested]) -> Nested:
    """Of weights one below the other, all of one scheme."""
    return tuple(_stack(kind) for kind in zip(*parts, strict=True))


def _stack(kind: Sequence[NestedFloats | MappedFloats]) -> NestedFloats | MappedFloats:
    import torch

    mapped = [part for part in kind if isinstance(part, MappedFloats)]
    if mapped:
        return _stack_mapped(mapped)
    return NestedFloats(torch.cat([part.codes for part in kind]), torch.cat([part.supers for part in kind]))


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
def nested_map() -> Tensor:
    """float32 [256], ascending: 0, 1, and of both signs 2**i values between 10**(i-7) and 10**(i-6), i = 0 … 6.

    Source: bitsandbytes.functional.create_dynamic_map, version 0.50.
    """
    import torch

    values = [0.0, 1.0]
    for power in range(7):
        bounds = torch.linspace(0.1, 1, 2**power + 1, dtype=torch.float32)
        middles = 10.0 ** (power - 6) * ((bounds[:-1] + bounds[1:]) / 2)
        values += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(values), dtype=torch.float32)
