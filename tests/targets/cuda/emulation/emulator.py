"""Runs the CUDA kernels of ``llmctl/targets/cuda/native`` without a GPU, and checks what they do on the way.

The very same ``.cu`` file is compiled as C++ (``-DLLMCTL_EMULATE``) and its kernels are launched on host memory: blocks
one after another, the threads of a block as fibres. Every launch runs twice, threads and blocks forwards and backwards,
and must give the same bits.

Reported as ``EmulationError``, with kernel, source line, block and thread:
  out-of-bounds and misaligned accesses, writes to inputs, reads of memory never written (shared, or an output), data
  races in shared and global memory, accesses to the target of a ``cp.async`` not yet waited for, divergent barriers and
  warp operations, indices beyond a local or shared array of known size, oversized shifts, division by zero; output
  bytes left unwritten; results that depend on the schedule; arguments of the wrong width; too many threads.
All loads and stores are covered, raw pointers included: the compiler's thread-sanitizer instrumentation calls the
checker.
Not covered: a raw (not load16) 16-byte access that the compiler splits is checked for 4-byte alignment only; an overrun
of one static ``__shared__`` array into the next one through a raw pointer shows only as a race or an uninitialised
read; uses of uninitialised registers (they hold a pattern); the order of sums inside ``mma.sync``; approximate
instructions' errors; occupancy, bank conflicts, and everything about speed.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from emulator_build import EmulationError, build_kernels, build_runtime, missing, shared_variables

from llmctl.targets.cuda.compile import SOURCE_DIR

__all__ = ["Buffer", "EmulationError", "Kernels", "kernels", "kernels_from_text", "missing", "read", "update", "write"]

GUARD = 256  # bytes kept around every buffer, and the alignment of buffers (cudaMalloc's)


@dataclass(frozen=True)
class Buffer:
    """A device buffer argument: a tensor or array, contiguous, and how the kernel uses it.

    ``offset`` bytes are added to the pointer that the kernel gets. Arguments with the same ``data`` are one buffer; the
    first says how it is used.
    """

    data: Any
    writable: bool
    initialised: bool
    offset: int = 0


def read(data: Any, offset: int = 0) -> Buffer:
    """An input: the kernel must not write it."""
    return Buffer(data, False, True, offset)


def write(data: Any, offset: int = 0) -> Buffer:
    """An output: the kernel must write every byte before it reads it; the result is copied into ``data``."""
    return Buffer(data, True, False, offset)


def update(data: Any, offset: int = 0) -> Buffer:
    """Read and written, in part or whole; the result is copied into ``data``."""
    return Buffer(data, True, True, offset)


@dataclass(frozen=True)
class _Entry:
    name: str
    parameters: tuple[str, ...]
    bound: int
    kinds: tuple[int, ...]  # see Kind above; one a parameter


class Kernels:
    """The kernels of one source file."""

    def __init__(self, library: Path, entries: dict[str, tuple[str, ...]]) -> None:
        self._runtime = _runtime()
        self._path = library
        self._library = ctypes.CDLL(str(library))
        self._entries = {name: self._describe(name, parameters) for name, parameters in entries.items()}
        self._base = self._runtime.emulator_base(self._function(f"emulator_call_{next(iter(entries))}"))
        self._shared = shared_variables(library)

    @property
    def names(self) -> tuple[str, ...]:
        """Entry points."""
        return tuple(self._entries)

    def launch(
        self, name: str, grid: int | tuple[int, ...], threads: int, args: Sequence[Any], shared: int = 0,
        once: bool = False,
    ) -> None:  # fmt: skip
        """Run a kernel in both schedules.

        Args:
            grid: blocks, up to three dimensions. threads: a block's, a multiple of 32.
            args: ``Buffer``s, None for a null pointer, exact-width numpy scalars, bytes for a struct.
            shared: dynamic shared memory, bytes. once: forwards only.

        Raises:
            EmulationError: what the kernel did wrong; no output is changed then.
        """
        entry = self._entries[name]
        if threads % 32 or not 0 < threads <= entry.bound:
            raise EmulationError(f"{name}: {threads} threads; a multiple of 32 up to its bound {entry.bound} is needed")
        if len(args) != len(entry.kinds):
            raise EmulationError(f"{name}: {len(args)} arguments for {len(entry.kinds)} parameters")
        dims = (*((grid,) if isinstance(grid, int) else grid), 1, 1)[:3]
        first = self._run(entry, dims, threads, args, shared, reverse=False)
        second = first if once else self._run(entry, dims, threads, args, shared, reverse=True)
        for i, result in first.items():
            if not np.array_equal(result, second[i]):
                at = int(np.flatnonzero(result != second[i])[0])
                raise EmulationError(f"{name}: byte {at} of '{entry.parameters[i]}' depends on the order of threads")
        for i, result in first.items():
            _bytes(args[i].data)[:] = result

    def _run(
        self, entry: _Entry, grid: tuple[int, ...], threads: int, args: Sequence[Any], shared: int, *, reverse: bool
    ) -> dict[int, np.ndarray]:
        runtime = self._runtime
        runtime.emulator_reset()
        guarded: dict[int, np.ndarray] = {}
        first_use: dict[int, int] = {}  # of each buffer's data: the argument that brought it first
        values = []
        for i, argument in enumerate(args):
            if isinstance(argument, Buffer) and id(argument.data) in first_use:
                pointer = guarded[first_use[id(argument.data)]].ctypes.data + GUARD
                values.append(ctypes.c_uint64(pointer + argument.offset))
            elif isinstance(argument, Buffer):
                first_use[id(argument.data)] = i
                guarded[i] = _guarded(argument, 0x35 if reverse else 0xCB)
                pointer = guarded[i].ctypes.data + GUARD
                runtime.emulator_add_region(
                    entry.parameters[i].encode(), pointer, len(guarded[i]) - 2 * GUARD, 0,
                    argument.writable, argument.initialised,
                )  # fmt: skip
                values.append(ctypes.c_uint64(pointer + argument.offset))
            else:
                values.append(_scalar(entry, i, argument))
            self._check_kind(entry, i, argument)
        for variable, offset, size in self._shared:
            function, _, short = variable.rpartition("::")
            owner = function.partition("(")[0]
            if owner == entry.name or owner not in self._entries:
                runtime.emulator_add_region(short.encode(), self._base + offset, size, 1, 1, 0)
        if not runtime.emulator_set_dynamic_shared(shared):
            raise EmulationError(
                f"{entry.name}: {shared} bytes of dynamic shared memory are more than a block can have"
            )
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        message, site = ctypes.create_string_buffer(1024), ctypes.c_void_p()
        failed = runtime.emulator_launch(
            self._function(f"emulator_call_{entry.name}"), pointers, (ctypes.c_int * 3)(*grid), threads, reverse,
            message, len(message), ctypes.byref(site),
        )  # fmt: skip
        if failed:
            raise EmulationError(f"{entry.name}: {message.value.decode()}{self._where(site.value)}")
        return self._results(entry, args, guarded)

    def _results(self, entry: _Entry, args: Sequence[Any], guarded: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
        results = {}
        for region, (i, memory) in enumerate(guarded.items()):
            name = entry.parameters[i]
            if (memory[:GUARD] != 0xA5).any() or (memory[-GUARD:] != 0xA5).any():
                raise EmulationError(f"{entry.name}: wrote outside '{name}'")
            first = ctypes.c_size_t()
            count = self._runtime.emulator_unwritten(region, ctypes.byref(first))
            if args[i].writable and count:
                raise EmulationError(
                    f"{entry.name}: {count} bytes of '{name}' were not written, byte {first.value} first"
                )
            if args[i].writable:
                results[i] = memory[GUARD:-GUARD].copy()
        return results

    def _describe(self, name: str, parameters: tuple[str, ...]) -> _Entry:
        kind = getattr(self._library, f"emulator_kind_{name}")
        bound = getattr(self._library, f"emulator_bound_{name}")()
        return _Entry(name, parameters, bound, tuple(kind(i) for i in range(len(parameters))))

    def _check_kind(self, entry: _Entry, i: int, argument: Any) -> None:
        group, width = divmod(entry.kinds[i], 100)
        if argument is None or isinstance(argument, Buffer):
            right = group == 0
        elif isinstance(argument, bytes):
            right = group == 3 and len(argument) == width
        else:
            right = group == (1 if isinstance(argument, np.floating) else 2) and argument.itemsize == width
        if not right:
            wanted = (
                "a buffer",
                f"a {8 * width}-bit float",
                f"a {8 * width}-bit integer",
                f"a struct of {width} bytes",
            )
            raise EmulationError(f"{entry.name}: '{entry.parameters[i]}' needs {wanted[group]}, got {argument!r}")

    def _function(self, name: str) -> ctypes.c_void_p:
        return ctypes.cast(getattr(self._library, name), ctypes.c_void_p)

    def _where(self, site: int | None) -> str:
        """Source position of a return address: the line, and the lines it was inlined into."""
        if not site:
            return ""
        command = ["addr2line", "-i", "-s", "-e", str(self._path), hex(site - self._base - 1)]
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split("\n")
        lines = [
            line.split(" ")[0] for line in found if line and "emulation.h" not in line and not line.startswith("?")
        ]
        return f"; at {' < '.join(lines)}" if lines else ""


def _scalar(entry: _Entry, i: int, value: Any) -> Any:
    if value is None:
        return ctypes.c_uint64(0)
    if isinstance(value, np.generic):
        value = value.tobytes()
    if isinstance(value, bytes):
        return ctypes.create_string_buffer(value, len(value))
    raise EmulationError(f"{entry.name}: '{entry.parameters[i]}' needs a numpy scalar of exact width, got {value!r}")


def _bytes(data: Any) -> np.ndarray:
    """A writable byte view of a contiguous tensor or array."""
    if isinstance(data, torch.Tensor):
        if not data.is_contiguous():
            raise ValueError("a buffer must be contiguous; pass its storage and strides to the kernel")
        return data.detach().view(-1).view(torch.uint8).numpy()
    return data.reshape(-1).view(np.uint8)


def _guarded(argument: Buffer, poison: int) -> np.ndarray:
    """A copy of the buffer with guard bytes around it; the contents of an output are ``poison``."""
    content = _bytes(argument.data)
    memory = np.full(len(content) + 3 * GUARD, 0xA5, np.uint8)
    start = -memory.ctypes.data % GUARD
    memory = memory[start : start + len(content) + 2 * GUARD]
    memory[GUARD:-GUARD] = content if argument.initialised else poison
    return memory


@functools.cache
def _runtime() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build_runtime()))
    size, pointer, integer = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int
    library.emulator_add_region.argtypes = [ctypes.c_char_p, pointer, size, integer, integer, integer]
    library.emulator_set_dynamic_shared.argtypes = [size]
    library.emulator_unwritten.argtypes = [integer, pointer]
    library.emulator_unwritten.restype = size
    library.emulator_launch.argtypes = [pointer, pointer, pointer, integer, integer, ctypes.c_char_p, size, pointer]
    library.emulator_base.argtypes = [pointer]
    library.emulator_base.restype = ctypes.c_size_t
    return library


@functools.cache
def kernels_from_text(text: str, name: str = "kernel.cu") -> Kernels:
    """Kernels of a source text that may include the headers of ``llmctl/targets/cuda/native``."""
    return Kernels(*build_kernels(text, name))


def kernels(source: str) -> Kernels:
    """Kernels of a file of ``llmctl/targets/cuda/native``."""
    return kernels_from_text((SOURCE_DIR / source).read_text(), source)
