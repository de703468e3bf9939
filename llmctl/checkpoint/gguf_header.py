"""GGUF headers (versions 2 and 3, little-endian): metadata and tensor table, bounds-checked.

Format: the GGUF specification in ggml's documentation. Parsed here rather than by ``gguf.GGUFReader`` because that one
takes 2.7 s on a 49,000-token vocabulary (0.1 s here) and reports a truncated file as a numpy reshape error.
"""

from __future__ import annotations

import mmap
import reprlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmctl.checkpoint.safetensors_io import release_map
from llmctl.errors import CheckpointError, UnsupportedModelError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor: its ggml type, shape with the fastest axis last (as numpy has it), byte offset in the file, bytes."""

    qtype: Any
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def shown(value: Any) -> str:
    """A metadata value for a message: short, and on one line whatever it is."""
    return "an array" if isinstance(value, np.ndarray) else reprlib.repr(value)


class GgufFile:
    """A memory-mapped GGUF file.

    Attributes:
        path: the file.
        metadata: key -> int, float, bool, str, list of str, or numpy array.
        tensors: GGUF name -> entry, in file order.
    """

    def __init__(self, path: Path) -> None:
        """Map ``path`` and parse its header.

        Raises:
            CheckpointError: not GGUF, damaged, or truncated (expected and found sizes are named).
            UnsupportedModelError: a version, byte order or tensor type that is not read.
        """
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except ValueError as error:
            raise CheckpointError(f"{path}: an empty file, not GGUF", fix="fetch it again") from error
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
        self._at = 0
        tensor_count, field_count = self._open()
        try:
            self.metadata: Mapping[str, Any] = dict(self._field() for _ in range(field_count))
            self.tensors: Mapping[str, GgufTensor] = self._tensor_table(tensor_count)
        except (UnicodeDecodeError, ArithmeticError) as error:
            raise CheckpointError(f"{path}: damaged GGUF header near byte {self._at}: {error}") from error

    def raw(self, name: str) -> NDArray[np.uint8]:
        """A tensor's stored bytes, mapped copy-on-write."""
        entry = self.tensors[name]
        return np.frombuffer(self._map, np.uint8, entry.nbytes, entry.offset)

    def release(self) -> None:
        """As ``release_map`` of the whole file."""
        release_map(self._map)

    def _open(self) -> tuple[int, int]:
        if self._map[:4] != b"GGUF":
            raise CheckpointError(f"{self.path}: not a GGUF file")
        self._at = 4
        (version,) = self._unpack("I")
        if version not in (2, 3):
            raise UnsupportedModelError(f"{self.path}: GGUF version {version} is not read; known: 2, 3 (little-endian)")
        tensor_count, field_count = self._unpack("QQ")
        if max(tensor_count, field_count) > len(self._map):
            raise CheckpointError(f"{self.path}: damaged GGUF header: {tensor_count} tensors, {field_count} fields")
        return tensor_count, field_count

    def _take(self, size: int) -> int:
        start = self._at
        if start + size > len(self._map):
            raise CheckpointError(
                f"{self.path}: truncated: header needs at least {start + size} bytes, found {len(self._map)}",
                fix="fetch it again",
            )
        self._at += size
        return start

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        layout = f"<{layout}"
        return struct.unpack_from(layout, self._map, self._take(struct.calcsize(layout)))

    def _string(self) -> str:
        (length,) = self._unpack("Q")
        start = self._take(length)
        return self._map[start : start + length].decode()

    def _field(self) -> tuple[str, Any]:
        key = self._string()
        (kind,) = self._unpack("I")
        return key, self._value(kind)

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._unpack(_SCALARS[kind])[0]
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            inner, count = self._unpack("IQ")
            if inner == _STRING:
                return [self._string() for _ in range(count)]
            if inner in _SCALARS:
                dtype = np.dtype(f"<{_SCALARS[inner]}" if _SCALARS[inner] != "?" else "?")
                return np.frombuffer(self._map, dtype, count, self._take(count * dtype.itemsize))
        raise CheckpointError(f"{self.path}: damaged GGUF header: value of unknown type {kind} near byte {self._at}")

    def _tensor_table(self, count: int) -> dict[str, GgufTensor]:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        rows: list[tuple[str, Any, tuple[int, ...], int, int]] = []
        for _ in range(count):
            name = self._string()
            (axes,) = self._unpack("I")
            shape = tuple(reversed(self._unpack(f"{axes}Q")))
            kind, offset = self._unpack("IQ")
            try:
                qtype = GGMLQuantizationType(kind)
            except ValueError:
                raise UnsupportedModelError(f"{self.path}: tensor '{name}' has unknown ggml type {kind}") from None
            block, size = GGML_QUANT_SIZES[qtype]
            elements = int(np.prod(shape, dtype=object)) if shape else 1
            if shape and shape[-1] % block:
                raise CheckpointError(
                    f"{self.path}: tensor '{name}': width {shape[-1]} is not whole {qtype.name} blocks"
                )
            rows.append((name, qtype, shape, offset, elements // block * size))
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment <= 0:
            raise CheckpointError(
                f"{self.path}: metadata general.alignment: expected a positive integer, found {shown(alignment)}"
            )
        start = -(-self._at // alignment) * alignment
        tensors = {name: GgufTensor(qtype, shape, start + offset, size) for name, qtype, shape, offset, size in rows}
        self._check_extent(tensors, count)
        return tensors

    def _check_extent(self, tensors: Mapping[str, GgufTensor], count: int) -> None:
        if len(tensors) != count:
            raise CheckpointError(f"{self.path}: damaged GGUF header: a tensor name occurs twice")
        end = 0
        for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
            if tensor.offset < end:
                raise CheckpointError(f"{self.path}: damaged GGUF header: '{name}' overlaps the tensor before it")
            end = tensor.offset + tensor.nbytes
        if end > len(self._map):
            raise CheckpointError(
                f"{self.path}: truncated: expected at least {end} bytes, found {len(self._map)}", fix="fetch it again"
            )
