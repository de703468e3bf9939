"""From a kernel's signature and tensors to a checked launch: plain data that a GPU or the emulator carries out.

A ``Signature`` says what an entry point takes; ``bind`` holds tensors and numbers against it and refuses what the
kernel could not take, in words, before anything is launched. Nothing here imports torch or cupy, or knows a device.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from llmctl.graph.dtypes import BY_TAG

Sizes = Mapping[str, int]

_SIGNED = {"u32": "int32", "u64": "int64"}  # older torch makes no unsigned tensors of these
_SCALARS: dict[str, type[np.generic]] = {"i32": np.int32, "f32": np.float32}
MAX_GRID = (2**31 - 1, 65535, 65535)
"""Blocks of a launch in x, y and z."""


@dataclass(frozen=True)
class Array:
    """A pointer parameter.

    Attributes:
        dtype: a tag of ``graph.dtypes`` (f16, s8, …).
        shape: sizes, each a number, a name, or a formula of names: ``heads*head_dim``, ``k/2`` (whole), ``vocab/+32``
            (rounded up), ``rows+1``. A name stands for the same size wherever it is used, scalars included.
        use: ``read``; ``write``, every element; or ``update``.
        align: bytes that the pointer must be a multiple of.
        stride: name of the scalar that is the distance of rows, in elements; "" means contiguous.
        optional: may be None.
    """

    name: str
    dtype: str
    shape: tuple[str, ...]
    use: str = "read"
    align: int = 16
    stride: str = ""
    optional: bool = False


@dataclass(frozen=True)
class Number:
    """A scalar parameter: i32 or f32. One that names a size or stride need not be given."""

    name: str
    dtype: str


@dataclass(frozen=True)
class Geometry:
    """Blocks in three dimensions, threads a block, dynamic shared memory in bytes."""

    grid: tuple[int, int, int]
    threads: int
    shared: int = 0


@dataclass(frozen=True)
class Signature:
    """An entry point.

    Attributes:
        source: its file. parameters: in the order of the entry's.
        multiples: size -> what it must be a multiple of. limits: size -> its largest value, or the size that is.
        needs: size -> arguments that may not be None unless that size is 0.
        geometry: the launch for the sizes; None when the caller plans it.
    """

    entry: str
    source: str
    parameters: tuple[Array | Number, ...]
    multiples: Mapping[str, int] = field(default_factory=dict)
    limits: Mapping[str, int | str] = field(default_factory=dict)
    needs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    geometry: Callable[[Sizes], Geometry] | None = None


@dataclass(frozen=True)
class Pointer:
    """A tensor argument and how the kernel uses it: read, write or update."""

    tensor: Any
    use: str


@dataclass(frozen=True)
class Call:
    """A launch that passed the checks. ``arguments`` are Pointers, None for null, and exact-width numpy scalars."""

    entry: str
    source: str
    geometry: Geometry
    arguments: tuple[Pointer | np.generic | None, ...]

    @property
    def empty(self) -> bool:
        """There are no blocks, and so nothing to launch."""
        return 0 in self.geometry.grid


class Machine(Protocol):
    """Something that carries out calls, in order: a GPU, the emulator, or a list that is run later."""

    def launch(self, call: Call) -> None:
        """Start a call; results may come later."""
        ...

    def call_torch(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> None:
        """Start one of torch's own operators on tensors; its results go where ``out`` and the like say."""
        ...


def bind(signature: Signature, arguments: Mapping[str, Any], geometry: Geometry | None = None) -> Call:
    """Check arguments against a signature.

    What holds for shapes, strides, dtypes and numbers holds for all tensors that have them, and is remembered: the
    layers of a model cost one full check and then a look-up each.

    Args:
        arguments: parameter name -> tensor (of torch, or anything with its dtype, shape, stride(), device and
            data_ptr()) or number. Sizes that a tensor tells need not be given.
        geometry: the launch, of a signature that has none of its own.

    Raises:
        ValueError: an argument of another dtype, shape, layout, alignment, device or range than the kernel takes,
            missing, or unknown; the message names the entry and the argument.
    """
    key = _shape_key(signature, arguments, geometry)
    checked = _CHECKED.get(key)
    if checked is None:
        checked = _checked(signature, arguments, geometry)
        if len(_CHECKED) >= _MAX_CHECKED:
            _CHECKED.clear()
        _CHECKED[key] = checked
    device = None
    values: list[Pointer | np.generic | None] = []
    for p, number in zip(signature.parameters, checked.numbers, strict=True):
        if not isinstance(p, Array):
            values.append(number)
            continue
        tensor = arguments.get(p.name)
        if tensor is None:
            values.append(None)
            continue
        device = device or tensor.device
        if tensor.device != device or tensor.data_ptr() % p.align:
            _refuse_place(signature, p, tensor, arguments)
        values.append(Pointer(tensor, p.use))
    return Call(signature.entry, signature.source, checked.geometry, tuple(values))


@dataclass(frozen=True)
class _Checked:
    """What a check found that depends on shapes and numbers alone; ``numbers``: None at arrays.

    ``signature`` is held so that its identity, which stands in the key, is nobody else's.
    """

    signature: Signature
    geometry: Geometry
    numbers: tuple[np.generic | None, ...]


_CHECKED: dict[tuple[Any, ...], _Checked] = {}
_MAX_CHECKED = 2**15


def _shape_key(signature: Signature, arguments: Mapping[str, Any], geometry: Geometry | None) -> tuple[Any, ...]:
    parts: list[Any] = [id(signature), geometry]
    for name, a in arguments.items():
        parts.append(name)
        if hasattr(a, "data_ptr"):
            parts += (a.dtype, a.shape, a.stride())
        else:
            parts += (type(a), a)
    return tuple(parts)


def _checked(signature: Signature, arguments: Mapping[str, Any], geometry: Geometry | None) -> _Checked:
    check = _Check(signature, arguments)
    check.names()
    check.arrays()
    check.sizes_allowed()
    numbers = tuple(None if isinstance(p, Array) else check.value(p) for p in signature.parameters)
    planned = signature.geometry(check.sizes) if signature.geometry else geometry
    if planned is None:
        raise ValueError(f"{signature.entry}: the launch geometry is the caller's to give")
    if any(not 0 <= n <= most for n, most in zip(planned.grid, MAX_GRID, strict=True)):
        raise ValueError(f"{signature.entry}: a grid of {planned.grid} blocks is beyond {MAX_GRID}")
    return _Checked(signature, planned, numbers)


def _refuse_place(signature: Signature, p: Array, tensor: Any, arguments: Mapping[str, Any]) -> None:
    """Raise what is wrong with where a tensor lies."""
    tensors = ((q.name, arguments.get(q.name)) for q in signature.parameters if isinstance(q, Array))
    first, other = next((name, t) for name, t in tensors if t is not None)
    where = f"{signature.entry}: {p.name}: expected"
    if tensor.device != other.device:
        raise ValueError(f"{where} a tensor on {other.device} like '{first}', found {tensor.device}")
    beyond = tensor.data_ptr() % p.align
    raise ValueError(f"{where} an address that is a multiple of {p.align}, found {beyond} beyond one")


class _Check:
    """One binding: the sizes found so far, and every refusal."""

    def __init__(self, signature: Signature, arguments: Mapping[str, Any]) -> None:
        self.signature = signature
        self.arguments = arguments
        self.tensors = [
            (p, arguments[p.name])
            for p in signature.parameters
            if isinstance(p, Array) and arguments.get(p.name) is not None
        ]
        numbers = [p for p in signature.parameters if isinstance(p, Number)]
        self.sizes: dict[str, int] = {
            p.name: arguments[p.name] for p in numbers if p.dtype == "i32" and p.name in arguments
        }

    def refuse(self, name: str, expected: object, found: object) -> None:
        raise ValueError(f"{self.signature.entry}: {name}: expected {expected}, found {found}")

    def names(self) -> None:
        known = {p.name for p in self.signature.parameters}
        for name in self.arguments:
            if name not in known:
                self.refuse("arguments", f"some of {', '.join(sorted(known))}", f"'{name}'")
        for p in self.signature.parameters:
            if isinstance(p, Array) and not p.optional and self.arguments.get(p.name) is None:
                self.refuse(p.name, f"a tensor of {p.dtype}", "none")
        for name, value in self.sizes.items():
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
                self.refuse(name, "an integer", repr(value))

    def arrays(self) -> None:
        for p, tensor in self.tensors:
            self._array(p, tensor)
        for p, tensor in self.tensors:
            expected = tuple(evaluate(size, self.sizes) for size in p.shape)
            if tuple(tensor.shape) != expected:
                self.refuse(p.name, f"[{', '.join(p.shape)}] = {list(expected)}", list(tensor.shape))
            if p.use != "read" and any(s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True)):
                self.refuse(p.name, "elements of its own", "an expanded tensor")

    def _array(self, p: Array, tensor: Any) -> None:
        wanted, found = BY_TAG[p.dtype].torch, str(tensor.dtype).removeprefix("torch.")
        if found not in (wanted, _SIGNED.get(p.dtype)):
            self.refuse(p.name, wanted, found)
        if len(tensor.shape) != len(p.shape):
            self.refuse(p.name, f"[{', '.join(p.shape)}]", f"{len(tensor.shape)} dimensions")
        for size, found in zip(p.shape, tensor.shape, strict=True):
            if size.isidentifier():
                self.sizes.setdefault(size, int(found))
        if p.stride:
            if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
                self.refuse(p.name, "rows whose elements lie side by side", f"strides {tuple(tensor.stride())}")
            self.sizes[p.stride] = int(tensor.stride(0)) if tensor.shape[0] > 1 else int(tensor.shape[-1])
        elif not tensor.is_contiguous():
            self.refuse(p.name, "a contiguous tensor", f"strides {tuple(tensor.stride())}")

    def sizes_allowed(self) -> None:
        signature = self.signature
        for name, factor in signature.multiples.items():
            if self.sizes.get(name, 0) % factor:
                self.refuse(name, f"a multiple of {factor}", self.sizes[name])
        for name, most in signature.limits.items():
            limit = self.sizes.get(most, 0) if isinstance(most, str) else most
            if self.sizes.get(name, 0) > limit:
                self.refuse(name, f"at most {limit}", self.sizes[name])
        for name, wanted in signature.needs.items():
            for argument in wanted if self.sizes.get(name, 0) else ():
                if self.arguments.get(argument) is None:
                    self.refuse(argument, f"a tensor, because {name} is {self.sizes[name]}", "none")

    def value(self, p: Number) -> np.generic:
        strides = {a.stride for a in self.signature.parameters if isinstance(a, Array)}
        value = self.sizes.get(p.name, 0 if p.name in strides else None) if p.dtype == "i32" else None
        value = self.arguments.get(p.name) if value is None else value
        if value is None:
            self.refuse(p.name, f"a number ({p.dtype})", "none")
        if p.dtype == "i32" and not -(2**31) <= int(value) < 2**31:  # type: ignore[arg-type]
            self.refuse(p.name, "an integer of 32 bits", value)
        if p.dtype == "f32" and not isinstance(value, (int, float, np.floating)):
            self.refuse(p.name, "a number", repr(value))
        return _SCALARS[p.dtype](value)


def evaluate(formula: str, sizes: Sizes) -> int:
    """The value of a size's formula (see ``Array.shape``); -1 when it is no whole number.

    Raises:
        ValueError: a name that nothing tells.
    """
    base, divisor, extra = _parse(formula)
    for name in (*base, divisor):
        if not name.isdigit() and name not in sizes:
            raise ValueError(f"size '{name}' in '{formula}' is not given")

    def number(text: str) -> int:
        return int(text) if text.isdigit() else int(sizes[text])

    value, by = math.prod(number(name) for name in base), number(divisor)
    if by == 0:
        return -1
    if "/+" in formula:
        value = -(-value // by) * by
    return -1 if value % by else value // by + extra


@functools.cache
def _parse(formula: str) -> tuple[tuple[str, ...], str, int]:
    """Factors, divisor, and what is added."""
    found = re.fullmatch(r"(?P<base>\w+(?:\*\w+)*)(?:/\+?(?P<by>\w+))?(?:\+(?P<extra>\d+))?", formula)
    if found is None:
        raise ValueError(f"not a size: '{formula}'")
    return tuple(found["base"].split("*")), found["by"] or "1", int(found["extra"] or 0)
