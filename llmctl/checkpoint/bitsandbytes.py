"""bitsandbytes: NF4 and FP4 in blocks, and LLM.int8()'s rows.

4 bits, of a weight [N, K]: ``weight`` holds the codes in row-major order, two a byte, the first in the high nibble, in
uint8 or (``bnb_4bit_quant_storage``) any other dtype's bytes; ``weight.absmax`` float32, one a block of codes;
``weight.quant_map`` float32 [16], the code book; ``weight.quant_state.bitsandbytes__nf4`` (or fp4), JSON in bytes.
``w = quant_map[code] * absmax``. Doubly quantized, ``weight.absmax`` is uint8 and stands for
``nested_quant_map[absmax] * nested_absmax + nested_offset``, with a ``weight.nested_absmax`` for ``nested_blocksize``
of them.

8 bits: ``weight`` int8 [N, K], ``SCB`` float32 [N], ``weight_format`` 0 (rows). ``w = code * SCB / 127``.

Source: bitsandbytes.functional (QuantState, dequantize_4bit, int8_vectorwise_dequant) and nn.modules, version 0.50.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from llmctl.checkpoint.layout import Load, Modules, find_modules, total_bytes
from llmctl.checkpoint.nested import MappedFloats, is_usual, of_tensor
from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.checkpoint.tensor_info import TensorInfo
from llmctl.graph.code_books import CODE_BOOKS
from llmctl.graph.graph import QuantScheme

if TYPE_CHECKING:
    from torch import Tensor

METHOD = "bitsandbytes"
BOOKS = ("nf4", "fp4")
INT8_SCHEME = QuantScheme(8, -1, True)
STATE = "weight.quant_state.bitsandbytes__"
ABSMAX, MAP = "weight.absmax", "weight.quant_map"
NESTED_BLOCK = 256
"""Scales that share a float where they are doubly quantized, as bitsandbytes writes them."""
_MOST = 3.4028234663852886e38  # a finite float32
NESTED, NESTED_MAP = "weight.nested_absmax", "weight.nested_quant_map"


@dataclass(frozen=True)
class _State:
    """A ``quant_state``: shape (N, K), code book and block size; ``nested_block`` is 0 without double quantization."""

    shape: tuple[int, int]
    scheme: QuantScheme
    nested_block: int
    offset: float

    def described(self, stored_map: Tensor | None) -> QuantScheme:
        """The scheme, whose scales are kept as they are stored if that is by the usual map in the usual blocks."""
        if stored_map is None or self.nested_block != NESTED_BLOCK:
            return self.scheme
        return replace(self.scheme, nested=NESTED_BLOCK) if is_usual(stored_map) else self.scheme

    @property
    def blocks(self) -> int:
        """Scales in all."""
        return self.shape[0] * self.shape[1] // self.scheme.group_size


class FourBitLayout:
    """NF4 and FP4; each weight's own ``quant_state`` says which, and its blocks."""

    def modules(self, stored: Mapping[str, TensorInfo]) -> Modules:
        """Those with a ``quant_state``."""
        found: Modules = {}
        for book in BOOKS:
            state = STATE + book
            found |= find_modules(stored, state, ("weight", ABSMAX, MAP, NESTED, NESTED_MAP, state))
        return found

    def describe(self, module: str, planes: Mapping[str, TensorInfo], load: Load) -> TensorInfo:  # noqa: ARG002
        """From the ``quant_state``."""
        suffix = _state_name(planes)
        if planes[suffix].dtype != "U8":
            raise ValueError(f"{suffix}: expected dtype U8, found {planes[suffix].dtype}")
        state = _read_state(suffix, load(suffix))
        _check_planes(planes, state)
        scheme = state.described(load(NESTED_MAP) if state.nested_block else None)
        return TensorInfo(state.shape, "F32", scheme, total_bytes(planes))

    def unpack(self, module: str, planes: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedWeight:  # noqa: ARG002
        """Codes one a byte; scales of double quantization multiplied out, in float32, beside what is stored of them."""
        import torch

        suffix = _state_name(planes)
        state = _read_state(suffix, planes[suffix])
        _check_book(planes[MAP], scheme.book)
        octets = planes["weight"].reshape(-1).view(torch.uint8)
        codes = torch.stack((octets >> 4, octets & 15), dim=-1).flatten()[: math.prod(state.shape)]
        mapped = _mapped(planes, state) if state.nested_block else None
        scales = planes[ABSMAX].reshape(state.shape[0], -1) if mapped is None else mapped.floats()
        zeros = torch.zeros(scales.shape, dtype=torch.uint8)
        nested = (mapped,) if mapped is not None and scheme.nested else None
        return QuantizedWeight(codes.reshape(state.shape), scales, zeros, scheme, nested=nested)


class EightBitLayout:
    """LLM.int8()'s weights. What it does to activations is no part of a checkpoint."""

    def modules(self, stored: Mapping[str, TensorInfo]) -> Modules:
        """Those with an ``SCB``."""
        return find_modules(stored, "SCB", ("weight", "SCB", "weight_format"))

    def describe(self, module: str, planes: Mapping[str, TensorInfo], load: Load) -> TensorInfo:  # noqa: ARG002
        """From shapes, and ``weight_format``."""
        weight = planes.get("weight")
        if weight is None or weight.dtype != "I8" or len(weight.shape) != 2:
            raise ValueError(f"weight: expected a matrix of I8 beside its SCB, found {_found(weight)}")
        _expect("SCB", planes, "F32", weight.shape[0])
        if "weight_format" in planes:
            _expect("weight_format", planes, "U8", 1)
            order = int(load("weight_format"))
            if order != 0:
                raise ValueError(f"weight_format: expected 0 (rows), found {order}, a layout of one kind of GPU")
        return TensorInfo((weight.shape[0], weight.shape[1]), "F32", INT8_SCHEME, total_bytes(planes))

    def unpack(self, module: str, planes: Mapping[str, Tensor], scheme: QuantScheme) -> QuantizedWeight:  # noqa: ARG002
        """Codes from 0 on."""
        import torch

        scales = planes["SCB"].reshape(-1, 1) * torch.tensor(1 / 127)
        zeros = torch.full(scales.shape, 128, dtype=torch.uint8)
        return QuantizedWeight(planes["weight"].view(torch.uint8) ^ 0x80, scales, zeros, scheme)


def _state_name(suffixes: Iterable[str]) -> str:
    return next(suffix for suffix in suffixes if suffix.startswith(STATE))


def _read_state(suffix: str, stored: Tensor) -> _State:
    book = suffix.removeprefix(STATE)
    try:
        found = json.loads(bytes(stored.reshape(-1).numpy()))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{suffix}: expected a JSON object: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{suffix}: expected a JSON object, found {type(found).__name__}")
    if found.get("quant_type") != book:
        raise ValueError(f"{suffix}: quant_type: expected '{book}', found {found.get('quant_type')!r:.80}")
    shape = found.get("shape")
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)):
        raise ValueError(f"{suffix}: shape: expected two positive integers, found {shape!r:.80}")
    block = _positive(found, "blocksize", suffix)
    if shape[1] % block:
        raise ValueError(
            f"blocks of {block} values do not divide rows of {shape[1]}, so a row shares scales with the next: not "
            "read; quantize the 16-bit checkpoint it was made from (llmctl quantize)"
        )
    nested = "nested_blocksize" in found
    offset = found.get("nested_offset") if nested else 0.0
    if type(offset) is not float or not abs(offset) <= _MOST:
        raise ValueError(f"{suffix}: nested_offset: expected a finite float of 32 bits, found {offset!r:.80}")
    nested_block = _positive(found, "nested_blocksize", suffix) if nested else 0
    return _State((shape[0], shape[1]), QuantScheme(4, block, True, book=book), nested_block, offset)


def _positive(state: Mapping[str, Any], key: str, where: str) -> int:
    value = state.get(key)
    if type(value) is not int or value <= 0:
        raise ValueError(f"{where}: {key}: expected a positive integer, found {value!r:.80}")
    return value


def _check_planes(planes: Mapping[str, TensorInfo], state: _State) -> None:
    size, weight = -(-math.prod(state.shape) // 2), planes.get("weight")
    if weight is None or weight.nbytes != size:
        found = "none" if weight is None else str(weight.nbytes)
        raise ValueError(f"weight: expected {size} bytes, two codes each, of shape {list(state.shape)}, found {found}")
    _expect(MAP, planes, "F32", 16)
    _expect(ABSMAX, planes, "U8" if state.nested_block else "F32", state.blocks)
    if state.nested_block:
        _expect(NESTED, planes, "F32", -(-state.blocks // state.nested_block))
        _expect(NESTED_MAP, planes, "F32", 256)


def _expect(suffix: str, planes: Mapping[str, TensorInfo], dtype: str, count: int) -> None:
    plane = planes.get(suffix)
    if plane is None or plane.dtype != dtype or math.prod(plane.shape) != count:
        raise ValueError(f"{suffix}: expected {count} values of {dtype}, found {_found(plane)}")


def _found(plane: TensorInfo | None) -> str:
    return "none" if plane is None else f"{plane.dtype} {list(plane.shape)}"


def _check_book(stored: Tensor, book: str) -> None:
    """Refuse codes that stand for something else than the book's values."""
    import torch

    if not torch.equal(stored.reshape(-1), torch.tensor(CODE_BOOKS[book].values)):
        raise ValueError(f"{MAP}: not the values of {book}")


def _mapped(planes: Mapping[str, Tensor], state: _State) -> MappedFloats:
    import torch

    largest = planes[NESTED].reshape(-1)
    return of_tensor(
        planes[ABSMAX].reshape(state.shape[0], -1),
        largest,
        torch.full_like(largest, state.offset),
        min(state.nested_block, max(state.blocks, NESTED_BLOCK)),  # a file may say any size beyond all blocks
        planes[NESTED_MAP].reshape(-1),
    )
