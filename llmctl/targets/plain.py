"""How a Graph's weights lie in an engine as plain planes: dense tensors, and quantized ones code by code.

A dense Weight ``W`` is one tensor ``W``. A quantized one is ``W.codes`` (u8 [N, bytes of a row]; a row has the codes'
fields of 8, 4, 2 and 1 bits, of those that the width is the sum of, one kind after the other, the lowest bits in the
widest; the first column in a byte's lowest bits), ``W.scales`` (F32, F16 or BF16 [B, G], a row for every block of
rows), ``W.zeros`` (u8 [N, G]; only where the scheme has them), ``W.minimums`` (as the scales; likewise) and ``W.g_idx``
(I32 [K]; only with act-order). Nested scales are ``W.scale_codes`` (u8 [N, bytes of a row], fields as of the codes) and
``W.scale_supers`` (F16 [N, G / nested]), in place of ``W.scales``; minimums likewise. Those of a code book are
``W.scale_codes`` (u8 [N, G]), ``W.scale_supers`` and ``W.scale_offsets`` (F32 [S], the last ones unused) and
``W.scale_starts`` (I32 [N]), as ``checkpoint.nested.MappedFloats`` says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmctl.checkpoint.nested import MappedFloats, NestedFloats, NestedParts, mapped_supers, usual_values
from llmctl.graph.dtypes import BY_SAFETENSORS
from llmctl.graph.graph import Graph, QuantScheme, Weight
from llmctl.targets.base import PlaneContent, Read
from llmctl.targets.fields import field_widths, fields, joined
from llmctl.targets.planes import Describe, Plane

if TYPE_CHECKING:
    from torch import Tensor

    from llmctl.checkpoint.quantized import QuantizedWeight

_SCALES = ("F32", "F16", "BF16")
_NESTED = ("scale", "minimum")


def plain_planes(graph: Graph, dense: tuple[str, ...], describe: Describe | None) -> dict[str, tuple[Plane, ...]]:
    """Planes by weight name.

    Args:
        dense: the safetensors dtypes a dense weight may have. Of several the checkpoint's own is taken; float64 and
            mixed parts become F32.
        describe: the checkpoint's tensors; None: every dtype that a plane may have.
    """
    if describe is None:
        return {name: weight_planes(weight, dense, _SCALES) for name, weight in graph.weights.items()}
    planes = {}
    for name, weight in graph.weights.items():
        stored = {describe(part.tensor).dtype for part in weight.parts}
        planes[name] = weight_planes(weight, _settled(dense, stored), _settled(_SCALES, stored))
    return planes


def weight_planes(weight: Weight, dense: tuple[str, ...], scales: tuple[str, ...]) -> tuple[Plane, ...]:
    """The planes of one weight; ``dense`` and ``scales``: the dtypes those may have."""
    if weight.quant is None:
        return (Plane(weight.name, weight.shape, dense),)
    rows, columns = weight.shape
    scheme, groups = weight.quant, weight.quant.groups(columns)
    planes = [Plane(f"{weight.name}.codes", (rows, code_bytes(scheme, columns)), ("U8",))]
    if scheme.nested:
        return (*planes, *_nested_planes(weight, scheme))
    planes.append(Plane(f"{weight.name}.scales", (scheme.row_blocks(rows), groups), scales))
    if scheme.has_zeros:
        planes.append(Plane(f"{weight.name}.zeros", (rows, groups), ("U8",)))
    if scheme.minimum:
        planes.append(Plane(f"{weight.name}.minimums", (rows, groups), scales))
    if scheme.act_order:
        planes.append(Plane(f"{weight.name}.g_idx", (columns,), ("I32",)))
    return tuple(planes)


def _nested_planes(weight: Weight, scheme: QuantScheme) -> Iterator[Plane]:
    rows, groups = weight.shape[0], scheme.groups(weight.shape[1])
    if scheme.book:
        supers = (mapped_supers(rows, groups, scheme.nested, len(weight.parts)),)
        yield Plane(f"{weight.name}.scale_codes", (rows, groups), ("U8",))
        yield Plane(f"{weight.name}.scale_supers", supers, ("F32",))
        yield Plane(f"{weight.name}.scale_offsets", supers, ("F32",))
        yield Plane(f"{weight.name}.scale_starts", (rows,), ("I32",))
        return
    for kind in _kinds(scheme):
        yield Plane(f"{weight.name}.{kind}_codes", (rows, field_bytes(scheme.nested_bits, groups)), ("U8",))
        yield Plane(f"{weight.name}.{kind}_supers", (rows, groups // scheme.nested), ("F16",))


def _kinds(scheme: QuantScheme) -> tuple[str, ...]:
    """What of a weight is nested: nothing, scales, or minimums too."""
    return _NESTED[: 1 + scheme.minimum] if scheme.nested else ()


def plain_code_bits(weight: Weight) -> int | None:
    """``Target.code_bits`` of a weight that is stored so."""
    return None if weight.quant is None else weight.quant.bits


def code_bytes(scheme: QuantScheme, columns: int) -> int:
    """Bytes of one row of codes."""
    return field_bytes(scheme.bits, columns)


def field_bytes(bits: int, count: int) -> int:
    """Bytes of so many codes of one row, by their bits."""
    return sum(-(-count * width // 8) for width in field_widths(bits))


def pack_plain(weight: Weight, read: Read, planes: Sequence[Plane]) -> dict[str, PlaneContent]:
    """One weight's planes by plane name; a dense one is read when its turn to be written comes."""
    if weight.quant is None:
        (plane,) = planes
        return {plane.name: lambda: _dense(read, plane.dtype)}
    dtypes = {plane.name.removeprefix(f"{weight.name}."): plane.dtype for plane in planes}
    quantized: Any = read()
    packed = pack_codes(quantized, dtypes)
    return {p.name: _filled(packed[p.name.removeprefix(f"{weight.name}.")], p.shape) for p in planes}


def _filled(content: PlaneContent, shape: tuple[int, ...]) -> PlaneContent:
    """With zeros behind it, where a plane is longer than what is in it."""
    import torch

    missing = shape[0] - len(content)
    return torch.nn.functional.pad(content, (0, missing)) if missing else content


def pack_codes(weight: QuantizedWeight, dtypes: Mapping[str, str]) -> dict[str, PlaneContent]:
    """A quantized weight's planes by suffix.

    Args:
        dtypes: suffix -> safetensors dtype of the planes wanted.
    """
    codes = weight.codes.contiguous().numpy()
    planes: dict[str, PlaneContent] = {"codes": pack_fields(codes, weight.scheme.bits)}
    for kind, part in zip(_kinds(weight.scheme), weight.nested or (), strict=True):
        stored = pack_fields(part.codes.contiguous().numpy(), weight.scheme.nested_bits)
        planes |= {f"{kind}_codes": stored, f"{kind}_supers": part.supers.contiguous()}
        if isinstance(part, MappedFloats):
            planes |= {"scale_offsets": part.offsets, "scale_starts": part.starts.contiguous()}
    for suffix in dtypes.keys() - planes.keys():
        planes[suffix] = _cast(getattr(weight, suffix).contiguous(), dtypes[suffix])
    return {suffix: planes[suffix] for suffix in dtypes}


def unpack_codes(weight: Weight, planes: Mapping[str, Tensor]) -> QuantizedWeight:
    """The inverse of ``pack_codes``: a quantized weight from its planes by suffix, on their device."""
    import torch

    from llmctl.checkpoint.awq import widened
    from llmctl.checkpoint.quantized import QuantizedWeight

    scheme = weight.quant
    assert scheme is not None
    codes = unpack_fields(planes["codes"], scheme.bits, weight.shape[1])
    nested = _unpack_nested(scheme, planes, scheme.groups(weight.shape[1])) if scheme.nested else None
    for kind, part in zip(_kinds(scheme), nested or (), strict=True):
        planes = {**planes, f"{kind}s": part.floats()}
    scales, minimums = widened(planes["scales"]), planes.get("minimums")
    zeros = planes.get("zeros")
    if zeros is None:
        middle = 0 if scheme.book or scheme.minimum else 2 ** (scheme.bits - 1)
        zeros = torch.full(scales.shape, middle, dtype=torch.uint8, device=scales.device)
    return QuantizedWeight(
        codes, scales, zeros, scheme, planes.get("g_idx"), None if minimums is None else widened(minimums), nested
    )


def _unpack_nested(scheme: QuantScheme, planes: Mapping[str, Tensor], groups: int) -> NestedParts:
    if scheme.book:
        names = ("codes", "supers", "offsets", "starts")
        codes, supers, offsets, starts = (planes[f"scale_{name}"] for name in names)
        return (MappedFloats(codes, supers, offsets, starts, scheme.nested, usual_values()),)
    codes = {k: unpack_fields(planes[f"{k}_codes"], scheme.nested_bits, groups) for k in _kinds(scheme)}
    return tuple(NestedFloats(codes[k], planes[f"{k}_supers"], scheme.nested_zero) for k in codes)


def pack_fields(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Codes of so many bits [N, K] as a row's bytes have them, u8 [N, bytes]."""
    if bits == 8:
        return codes
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % 8)))
    parts = []
    for width, field in fields(padded, bits):
        packed = joined(field.reshape(len(codes), -1, 8 // width, 1), width)[..., 0]
        parts.append(packed[:, : -(-codes.shape[1] * width // 8)])
    return np.concatenate(parts, axis=1)


def unpack_fields(stored: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of ``pack_fields``, on the same device."""
    import torch

    if bits == 8:
        return stored
    codes, at, start = torch.zeros((), dtype=torch.uint8, device=stored.device), 0, 0
    for width in field_widths(bits):
        end = start + -(-columns * width // 8)
        part = stored[:, start:end]
        field = torch.stack([part >> shift & (1 << width) - 1 for shift in range(0, 8, width)], dim=-1)
        codes = field.flatten(1)[:, :columns] << at | codes
        at, start = at + width, end
    return codes.contiguous()


def _dense(read: Read, dtype: str) -> Tensor:
    import torch

    tensor = read()
    assert isinstance(tensor, torch.Tensor)
    return _cast(tensor, dtype)


def _cast(tensor: Tensor, dtype: str) -> Tensor:
    import torch

    return tensor.to(getattr(torch, BY_SAFETENSORS[dtype].torch))


def _settled(dense: tuple[str, ...], stored: set[str]) -> tuple[str, ...]:
    if len(dense) == 1:
        return dense
    only = next(iter(stored)) if len(stored) == 1 else ""
    return (only if only in dense else "F32",)
