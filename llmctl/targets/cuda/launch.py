"""Carries out checked calls on an NVIDIA GPU: CuPy loads the modules and launches on torch's current stream.

Nothing is allocated and nothing is waited for, so that a step of calls can be captured in a CUDA graph; run a call
once before capturing it, for its module is loaded at the first launch.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llmctl.errors import CompileError
from llmctl.targets.cuda.call import Call, Pointer
from llmctl.targets.cuda.compile import compile_modules

_STATIC_LIMIT = 48 * 1024
"""Dynamic shared memory that a kernel may have without asking for more."""


class CudaMachine:
    """A ``call.Machine``: kernels from compiled modules, on the current device."""

    def __init__(self, modules: Mapping[str, Path]) -> None:
        """Load nothing yet.

        Args:
            modules: kernel source (``norm.cu``) -> its cubin or PTX file for this device.
        """
        self._modules = dict(modules)
        self._kernels: dict[str, Any] = {}
        self._shared: dict[str, int] = {}

    def launch(self, call: Call) -> None:
        """Queue a call on torch's current stream.

        Raises:
            ValueError: a tensor that is not on a CUDA device, or a kernel whose module is not among the machine's.
        """
        if call.empty:
            return
        kernel = self._kernel(call)
        with _current_stream():
            kernel(call.geometry.grid, (call.geometry.threads, 1, 1), device_arguments(call),
                   shared_mem=call.geometry.shared)  # fmt: skip

    def _kernel(self, call: Call) -> Any:
        if call.entry not in self._kernels:
            if call.source not in self._modules:
                raise ValueError(f"{call.entry}: no module of {call.source} is loaded")
            self._kernels[call.entry] = _raw_module(str(self._modules[call.source])).get_function(call.entry)
        kernel = self._kernels[call.entry]
        if call.geometry.shared > max(_STATIC_LIMIT, self._shared.get(call.entry, 0)):
            kernel.max_dynamic_shared_size_bytes = call.geometry.shared
            self._shared[call.entry] = call.geometry.shared
        return kernel


def device_arguments(call: Call) -> tuple[np.generic, ...]:
    """A call's arguments as CuPy takes them: addresses as 64-bit numbers, null as zero, scalars as they are.

    Raises:
        ValueError: a tensor that is not on a CUDA device.
    """
    return tuple(_address(call.entry, a) if a is None or isinstance(a, Pointer) else a for a in call.arguments)


def compiled_machine(sources: tuple[str, ...], cache: Path) -> CudaMachine:
    """A machine for the current device, its modules compiled now (or long ago: ``cache`` keeps them).

    Raises:
        CompileError: NVRTC is missing or does not know this device.
    """
    import torch

    arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
    modules = {}
    for module in compile_modules(sources, [arch], cache=cache):
        path = cache / "loadable" / module.digest / module.filename
        if not path.exists() or path.read_bytes() != module.code:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{id(module)}")
            temporary.write_bytes(module.code)
            temporary.replace(path)
        modules[module.source] = path
    return CudaMachine(modules)


def missing_device() -> str | None:
    """Why nothing can be launched here; None when it can."""
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    if not torch.cuda.is_available():
        return "no CUDA device, or a torch without CUDA"
    try:
        import cupy  # noqa: F401
    except ImportError:
        return "cupy is not installed: pip install 'llmctl[cuda]'"
    try:
        from llmctl.targets.cuda.nvrtc import load_nvrtc

        load_nvrtc()
    except CompileError as error:
        return str(error)
    return None


def _address(entry: str, argument: Pointer | None) -> np.uint64:
    if argument is None:
        return np.uint64(0)
    if not argument.tensor.is_cuda:
        raise ValueError(f"{entry}: expected tensors on a CUDA device, found one on {argument.tensor.device}")
    return np.uint64(argument.tensor.data_ptr())


@functools.cache
def _raw_module(path: str) -> Any:
    import cupy

    return cupy.RawModule(path=path)


class _TorchStream:
    """A torch stream in the CUDA stream protocol, which older torch does not speak itself."""

    def __init__(self, pointer: int) -> None:
        self._pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._pointer


@functools.cache
def _stream(pointer: int) -> Any:
    import cupy

    return cupy.cuda.Stream.from_external(_TorchStream(pointer))


def _current_stream() -> Any:
    import torch

    return _stream(torch.cuda.current_stream().cuda_stream)
