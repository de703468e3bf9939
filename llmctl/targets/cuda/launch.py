"""Carries out checked calls on an NVIDIA GPU: CuPy loads the modules, the driver launches on torch's current stream.

A call is made ready once (module loaded, limits raised, arguments laid out as the driver takes them) and then started
any number of times, without CuPy's own call, which takes 10 us of Python a launch. Nothing is allocated and nothing is
waited for, so that launches can be captured in a CUDA graph.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from llmctl.errors import CompileError
from llmctl.extras import install_command
from llmctl.targets.cuda.call import Call, Pointer
from llmctl.targets.cuda.compile import compile_modules
from llmctl.targets.cuda.errors import of_code

_FLOAT, _FLOAT_BITS = struct.Struct("<f"), struct.Struct("<I")
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
            DeviceError: the driver refuses the launch, or a kernel before it has failed.
        """
        if not call.empty:
            self.prepared(call)()

    def call_torch(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> None:
        """Queue an operator of torch on its current stream."""
        function(*arguments, **named)

    def prepared(self, call: Call) -> Callable[[], None]:
        """What queues a call, as often as it is called, on the stream that is torch's current one now.

        Raises:
            ValueError: as ``launch``; what it returns raises its DeviceError.
        """
        words = argument_words(call)
        values = (ctypes.c_uint64 * len(words))(*words)
        first = ctypes.addressof(values)
        addresses = (ctypes.c_void_p * len(words))(*range(first, first + 8 * len(words), 8))
        g = call.geometry
        config = _LaunchConfig(*g.grid, g.threads, 1, 1, g.shared, _stream(), None, 0)
        start = _driver().cuLaunchKernelEx
        arguments = ctypes.byref(config), ctypes.c_void_p(self._kernel(call)), addresses, None
        kept = call, values  # tensors and numbers that the addresses point to

        def run() -> None:
            code = start(*arguments)
            if code:
                raise_driver_error(code, kept[0].entry)

        return run

    def _kernel(self, call: Call) -> int:
        """The driver's handle of a call's kernel, which may have the shared memory that the call asks for."""
        if call.entry not in self._kernels:
            if call.source not in self._modules:
                raise ValueError(f"{call.entry}: no module of {call.source} is loaded")
            self._kernels[call.entry] = _raw_module(str(self._modules[call.source])).get_function(call.entry)
        kernel = self._kernels[call.entry]
        if call.geometry.shared > max(_STATIC_LIMIT, self._shared.get(call.entry, 0)):
            kernel.max_dynamic_shared_size_bytes = call.geometry.shared
            self._shared[call.entry] = call.geometry.shared
        return int(kernel.kernel.ptr)


class _LaunchConfig(ctypes.Structure):
    """The driver's ``CUlaunchConfig``: four arguments to convert per launch, where ``cuLaunchKernel`` has eleven."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("num_attributes", ctypes.c_uint),
    )


def argument_words(call: Call) -> list[int]:
    """A call's arguments, each in the low bytes of 64 bits: addresses (null is 0), integers, floats' bits.

    Raises:
        ValueError: a tensor that is not on a CUDA device.
    """
    words = []
    for argument in call.arguments:
        if argument is None:
            words.append(0)
        elif isinstance(argument, Pointer):
            if not argument.tensor.is_cuda:
                where = argument.tensor.device
                raise ValueError(f"{call.entry}: expected tensors on a CUDA device, found one on {where}")
            words.append(argument.tensor.data_ptr())
        elif isinstance(argument, np.integer):
            words.append(int(argument) & 0xFFFF_FFFF)
        else:
            words.append(_FLOAT_BITS.unpack(_FLOAT.pack(argument))[0])
    return words


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


def missing_launcher() -> str | None:
    """Why nothing can be launched here; None when it can."""
    try:
        import torch
    except ImportError:
        return f"torch is not installed: {install_command('cuda')}"
    if not torch.cuda.is_available():
        return "no CUDA device, or a torch without CUDA"
    if importlib.util.find_spec("cupy") is None:  # importing it takes most of a second
        return f"cupy is not installed: {install_command('cuda')}"
    return None


def missing_device() -> str | None:
    """Why kernels can be neither launched nor compiled here; None when they can."""
    missing = missing_launcher()
    if missing is not None:
        return missing
    try:
        from llmctl.targets.cuda.nvrtc import load_nvrtc

        load_nvrtc()
    except CompileError as error:
        return str(error)
    return None


@functools.cache
def _raw_module(path: str) -> Any:
    import cupy

    return cupy.RawModule(path=path)


def _stream() -> ctypes.c_void_p:
    import torch

    return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def raise_driver_error(code: int, what: str) -> NoReturn:
    """Raise what a result of the CUDA driver stands for.

    Args:
        what: was to be done; an entry point.

    Raises:
        DeviceError: always, as ``of_code`` has it, with the driver's own name and description.
    """
    texts = []
    for function in ("cuGetErrorName", "cuGetErrorString"):
        text = ctypes.c_char_p()
        getattr(_driver(), function)(code, ctypes.byref(text))
        texts.append((text.value or b"?").decode())
    raise of_code(code, f"{what}: {texts[0]}: {texts[1]}")
