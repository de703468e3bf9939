"""Kernels on a real GPU behind the emulator's interface, so that the emulated tests run on the device as they are."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from emulator import GUARD, Buffer, _bytes

from llmctl.checkpoint.resolve import cache_dir
from llmctl.targets.cuda.call import Call, Geometry, Machine, Pointer
from llmctl.targets.cuda.compile import SOURCE_DIR, compile_module
from llmctl.targets.cuda.launch import CudaMachine

_FILL = 0xA5


class DeviceKernels:
    """The kernels of one source file. A launch runs twice and must give the same bits; bytes around buffers, and
    inputs, must stay as they are."""

    def __init__(self, source: str, machine: Machine, device: str = "cuda") -> None:
        self._source = source
        self._machine = machine
        self._device = device

    def launch(
        self, name: str, grid: int | tuple[int, ...], threads: int, args: Sequence[Any], shared: int = 0,
        once: bool = False,
    ) -> None:  # fmt: skip
        """As ``emulator.Kernels.launch``; faults of the device are raised as they come."""
        dims = (*((grid,) if isinstance(grid, int) else grid), 1, 1)[:3]
        geometry = Geometry(dims, threads, shared)
        first = self._run(name, geometry, args, 0xCB)
        second = first if once else self._run(name, geometry, args, 0x35)
        for i, result in first.items():
            assert np.array_equal(result, second[i]), f"{name}: argument {i} differs from run to run"
        for i, result in first.items():
            _bytes(args[i].data)[:] = result

    def _run(self, name: str, geometry: Geometry, args: Sequence[Any], poison: int) -> dict[int, np.ndarray]:
        guarded: dict[int, torch.Tensor] = {}
        values: list[Any] = []
        owner: dict[int, int] = {}
        for i, argument in enumerate(args):
            if not isinstance(argument, Buffer):
                values.append(argument)
                continue
            at = owner.setdefault(id(argument.data), i)
            if at == i:
                guarded[i] = _guarded(argument, poison, self._device)
            values.append(Pointer(guarded[at][GUARD + argument.offset :], "update"))
        self._machine.launch(Call(name, self._source, geometry, tuple(values)))
        return {
            i: content for i in guarded if (content := _checked(name, args[i], guarded[i].cpu().numpy())) is not None
        }


def _checked(name: str, argument: Buffer, memory: np.ndarray) -> np.ndarray | None:
    assert (memory[:GUARD] == _FILL).all(), f"{name}: wrote before a buffer"
    assert (memory[-GUARD:] == _FILL).all(), f"{name}: wrote behind a buffer"
    content = memory[GUARD:-GUARD]
    if argument.writable:
        return content
    assert np.array_equal(content, _bytes(argument.data)), f"{name}: wrote an input"
    return None


def _guarded(argument: Buffer, poison: int, device: str) -> torch.Tensor:
    content = _bytes(argument.data)
    memory = torch.full((len(content) + 2 * GUARD,), _FILL, dtype=torch.uint8, device=device)
    if argument.initialised:
        memory[GUARD:-GUARD] = torch.from_numpy(content.copy())
    else:
        memory[GUARD:-GUARD] = poison
    return memory


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="llmctl-gpu-")


@functools.cache
def kernels_from_text(text: str, name: str = "kernel.cu") -> DeviceKernels:
    """As ``emulator.kernels_from_text``, compiled for this device."""
    folder = Path(tempfile.mkdtemp(dir=_folder().name))
    for header in SOURCE_DIR.glob("*.cuh"):
        (folder / header.name).write_text(header.read_text())
    (folder / name).write_text(text)
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
    module = compile_module(name, arch, cache=cache_dir() / "kernels", source_dir=folder)
    path = folder / "module.cubin"
    path.write_bytes(module.code)
    return DeviceKernels(name, CudaMachine({name: path}))


def kernels(source: str) -> DeviceKernels:
    """As ``emulator.kernels``."""
    return kernels_from_text((SOURCE_DIR / source).read_text(), source)
