"""safetensors files on numpy alone: checked headers, memory-mapped planes, deterministic writing.

The format: u64 little-endian header length, JSON header ``{name: {dtype, shape, data_offsets}}``, data without holes.
Written files are byte-identical to what the ``safetensors`` library writes with metadata ``{"format": "pt"}``: tensors
ordered by dtype (widest first, so that every plane is aligned) and then by name. Torch is imported by ``map_tensor``,
``as_tensor`` and ``plane_of`` only.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import reprlib
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from llmctl.errors import CheckpointError
from llmctl.graph.dtypes import BY_SAFETENSORS, BY_TORCH

if TYPE_CHECKING:
    from torch import Tensor

# Narrowest first; the writer sorts by it, descending.
_RANK = {code: rank for rank, code in enumerate(BY_SAFETENSORS)}
_MAX_HEADER = 100_000_000
_MAX_AXES = 64  # torch's and numpy's own limit
_MAX_COUNT = 2**63 - 1

Plane = Any
"""What can be written: bytes-like, a numpy array, a torch tensor, or a function without arguments that returns one of
them (called once, when its turn comes, so that not every tensor need be in memory)."""
TensorSpec = tuple[str, tuple[int, ...], Plane]
"""(dtype string, shape, Plane)."""


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """The numpy dtype a plane of safetensors dtype ``dtype`` is mapped as (BF16 as uint16, F8 as uint8).

    Raises:
        CheckpointError: a dtype this version does not know.
    """
    try:
        return np.dtype(BY_SAFETENSORS[dtype].numpy)
    except KeyError:
        raise CheckpointError(f"unknown safetensors dtype '{dtype}'; known: {', '.join(BY_SAFETENSORS)}") from None


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file: dtype string, shape, absolute byte offset in the file, size in bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header: tensors by name in file order, string metadata."""

    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """Read and check a header: offsets contiguous, sizes as dtype and shape say, file length exact.

    Numbers must be JSON integers: neither 1.5 nor 1e999 is read as one.

    Raises:
        CheckpointError: not a safetensors file, damaged, or truncated (expected and found sizes are named).
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            raw = _raw_header(path, file, size)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    start = 8 + len(raw)
    try:
        document = json.loads(raw, object_pairs_hook=_unique)
        metadata = _metadata(document.pop("__metadata__", None))
        entries = {_printable(name): _entry(fields, start) for name, fields in document.items()}
    except RecursionError as error:
        raise CheckpointError(f"{path}: damaged safetensors header: nested too deeply") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged safetensors header: {' '.join(str(error).split())}") from error
    end = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != end:
            raise CheckpointError(f"{path}: tensor '{name}' expected at byte {end}, its header says {entry.offset}")
        end += entry.nbytes
    if end != size:
        kind = "truncated" if size < end else "trailing bytes"
        raise CheckpointError(
            f"{path}: {kind}: expected {end} bytes, found {size}", fix="fetch or write the file again"
        )
    return Header(entries, metadata)


def _raw_header(path: Path, file: BinaryIO, size: int) -> bytes:
    head = file.read(8)
    if head == b"version ":
        raise CheckpointError(f"{path}: a Git LFS pointer, not the tensors", fix="run git lfs pull")
    if len(head) < 8:
        raise CheckpointError(f"{path}: truncated: expected at least 8 bytes, found {size}")
    length = int.from_bytes(head, "little")
    if length > _MAX_HEADER:
        raise CheckpointError(f"{path}: not a safetensors file (header length {length})")
    if 8 + length > size:
        raise CheckpointError(f"{path}: truncated: header needs {8 + length} bytes, found {size}")
    return file.read(length)


def _metadata(found: Any) -> dict[str, str]:
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ValueError("__metadata__: expected an object of strings")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose names are told apart: of two tensors of one name the last would win."""
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice[:80]!a} is there twice")
    return made


def _printable(name: str) -> str:
    """A tensor's name, which messages show on one line and other files must be able to hold."""
    if not name.isprintable():
        raise ValueError(f"tensor name {name[:80]!a} has characters that cannot be printed")
    return name


def _entry(fields: Mapping[str, Any], start: int) -> TensorEntry:
    dtype, shape, offsets = fields["dtype"], _counts(fields["shape"], "shape"), _counts(fields["data_offsets"], "data")
    if not isinstance(dtype, str) or len(offsets) != 2:
        raise ValueError("expected a dtype, and data_offsets of two numbers")
    if len(shape) > _MAX_AXES or math.prod(max(1, n) for n in shape) > _MAX_COUNT:
        raise ValueError(f"{dtype}: a shape of {len(shape)} axes that no tensor can have")
    begin, end = offsets
    nbytes = math.prod(shape) * numpy_dtype(dtype).itemsize
    if end - begin != nbytes:
        raise ValueError(f"{dtype} {list(shape)} needs {nbytes} bytes, data_offsets give {end - begin}")
    return TensorEntry(dtype, shape, start + begin, nbytes)


def _counts(found: Any, what: str) -> tuple[int, ...]:
    """A JSON array of whole numbers from 0."""
    whole = isinstance(found, list) and all(type(n) is int and 0 <= n <= _MAX_COUNT for n in found)
    if not whole:
        raise ValueError(f"{what}: expected whole numbers, found {reprlib.repr(found)}")
    return tuple(found)


class SafetensorsFile:
    """A memory-mapped safetensors file. The mapping lives as long as this object or any array made from it."""

    def __init__(self, path: Path) -> None:
        """Map ``path``.

        Raises:
            CheckpointError: as ``read_header``.
        """
        self.path = path
        self.header = read_header(path)
        with path.open("rb") as file:
            # Copy-on-write: an accidental in-place operation on a tensor can neither fault nor reach the file.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def release(self) -> None:
        """As ``release_map`` of the whole file."""
        release_map(self._map)

    @property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """Entries by name."""
        return self.header.tensors

    def entry(self, name: str) -> TensorEntry:
        """The entry of tensor ``name``.

        Raises:
            CheckpointError: no such tensor.
        """
        try:
            return self.header.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.path}: no tensor '{name}'") from None

    def plane(self, name: str) -> NDArray[Any]:
        """Tensor ``name`` as a read-only array over the mapping, in ``numpy_dtype`` of its dtype.

        Raises:
            CheckpointError: no such tensor.
        """
        entry = self.entry(name)
        dtype = numpy_dtype(entry.dtype)
        array = np.frombuffer(self._map, dtype, math.prod(entry.shape), entry.offset).reshape(entry.shape)
        array.flags.writeable = False
        return array


def release_map(mapping: mmap.mmap) -> None:
    """Give back the memory of what was read of a mapped file; arrays over it stay valid and are read again.

    What was written to a copy-on-write mapping is lost. On Linux; elsewhere pages stay until the system wants them.
    """
    if sys.platform == "linux":
        mapping.madvise(mmap.MADV_DONTNEED)


def map_tensor(file: SafetensorsFile, name: str) -> Tensor:
    """Tensor ``name`` of ``file`` as a torch tensor over the mapping (no copy; copy-on-write if modified).

    Raises:
        CheckpointError: no such tensor.
    """
    entry = file.entry(name)
    return as_tensor(np.frombuffer(file._map, np.uint8, entry.nbytes, entry.offset), entry.dtype, entry.shape)


def as_tensor(plane: NDArray[Any], dtype: str, shape: tuple[int, ...]) -> Tensor:
    """An array's bytes as a torch tensor of safetensors dtype ``dtype``; shares memory where it is writable."""
    import torch

    target = getattr(torch, BY_SAFETENSORS[dtype].torch)
    if plane.nbytes == 0:
        return torch.empty(shape, dtype=target)
    raw = np.ascontiguousarray(plane).reshape(-1).view(np.uint8)
    if not raw.flags.writeable or raw.ctypes.data % target.itemsize:
        raw = raw.copy()
    return torch.from_numpy(raw).view(target).reshape(shape)


def torch_dtype_name(dtype: Any) -> str:
    """The safetensors dtype string of a torch dtype.

    Raises:
        ValueError: a dtype safetensors has no name for.
    """
    try:
        return BY_TORCH[str(dtype).removeprefix("torch.")].safetensors
    except KeyError:
        raise ValueError(f"{dtype} has no safetensors dtype") from None


def tensor_spec(tensor: Tensor) -> TensorSpec:
    """A torch tensor as something ``write_safetensors`` takes."""
    return (torch_dtype_name(tensor.dtype), tuple(tensor.shape), tensor)


def write_safetensors(
    path: Path, tensors: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None = None, *, align: int = 8
) -> None:
    """Write a file beside ``path``, fsync it and rename it into place; the same input gives the same bytes.

    Args:
        tensors: name -> (dtype string, shape, data); see ``Plane`` for the kinds of data.
        metadata: the header's ``__metadata__``; None writes ``{"format": "pt"}``.
        align: bytes; tensors whose sizes are multiples of it come first and start at multiples of it. With 8 the bytes
            are those of the safetensors library.

    Raises:
        ValueError: data whose size is not what dtype and shape say.
    """
    names = sorted(
        tensors, key=lambda n: (spec_nbytes(tensors[n]) % align != 0 and align > 8, -_RANK[tensors[n][0]], n)
    )
    header: dict[str, Any] = {"__metadata__": dict(sorted((metadata or {"format": "pt"}).items()))}
    offset = 0
    for name in names:
        dtype, shape, _ = tensors[name]
        end = offset + spec_nbytes(tensors[name])
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-(len(raw) + 8) % align)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            for name in names:
                file.write(_checked_bytes(name, tensors[name]))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def spec_nbytes(spec: TensorSpec) -> int:
    """Size in bytes of a tensor to be written."""
    return math.prod(spec[1]) * numpy_dtype(spec[0]).itemsize


def _checked_bytes(name: str, spec: TensorSpec) -> memoryview:
    view = plane_bytes(spec[2])
    if view.nbytes != spec_nbytes(spec):
        raise ValueError(
            f"tensor '{name}': {spec[0]} {list(spec[1])} needs {spec_nbytes(spec)} bytes, found {view.nbytes}"
        )
    return view


def plane_bytes(data: Plane) -> memoryview:
    """What a Plane is written as."""
    if isinstance(data, np.ndarray):
        return np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
    if isinstance(data, bytes | bytearray | memoryview):
        return memoryview(data).cast("B")
    if isinstance(data, Callable):  # type: ignore[arg-type]
        return plane_bytes(data())
    return plane_bytes(_tensor_bytes(data))


def _tensor_bytes(tensor: Tensor) -> NDArray[np.uint8]:
    import torch

    flat: NDArray[np.uint8] = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat


def shard_names(stem: str, count: int) -> list[str]:
    """Conventional file names of ``count`` shards: ``stem.safetensors``, or ``stem-00001-of-0000N.safetensors``."""
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def write_sharded(
    folder: Path, tensors: Mapping[str, TensorSpec], *, stem: str = "model", max_shard_bytes: int = 5 * 10**9
) -> list[Path]:
    """Write tensors in mapping order into as few shards as fit, with ``{stem}.safetensors.index.json`` when several.

    Returns:
        The safetensors files written.
    """
    shards: list[dict[str, TensorSpec]] = [{}]
    filled = 0
    for name, spec in tensors.items():
        size = spec_nbytes(spec)
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = spec
        filled += size
    paths = [folder / name for name in shard_names(stem, len(shards))]
    for path, shard in zip(paths, shards, strict=True):
        write_safetensors(path, shard)
    if len(shards) > 1:
        _write_index(folder / f"{stem}.safetensors.index.json", paths, shards)
    return paths


def _write_index(path: Path, files: Iterable[Path], shards: Iterable[Mapping[str, TensorSpec]]) -> None:
    weight_map = {name: file.name for file, shard in zip(files, shards, strict=True) for name in shard}
    total = sum(spec_nbytes(spec) for shard in shards for spec in shard.values())
    document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
