"""What went wrong on an NVIDIA GPU, in one line: exceptions of torch and cupy, and the driver's own result codes.

Judged by type and code; by text only for a torch that gives no code. Imports neither library.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from llmctl.errors import DeviceError, DeviceLostError, DeviceMemoryError, LlmctlError
from llmctl.extras import install_command

OUT_OF_MEMORY = 2

_DRIVER_FIX = "install an NVIDIA driver for the CUDA version of torch, or a torch for the driver's; nvidia-smi names it"
_MEMORY_FIX = "end what else runs on the GPU (nvidia-smi lists it), or lower --max-model-len or --max-num-seqs"
_LOST_FIX = "restart the server; nvidia-smi and dmesg (lines with Xid) say whether the GPU is at fault"
_REBUILD_FIX = "build the engine again on this machine, with --target cuda"


@dataclass(frozen=True)
class _Kind:
    """What one result code means: the error's class, what is wrong, what to do."""

    error: type[DeviceError]
    what: str
    fix: str


def _lost(what: str) -> _Kind:
    return _Kind(DeviceLostError, what, _LOST_FIX)


_KINDS: Mapping[int, _Kind] = {
    OUT_OF_MEMORY: _Kind(DeviceMemoryError, "the GPU is out of memory", _MEMORY_FIX),
    3: _Kind(DeviceError, "CUDA could not be started", "nvidia-smi says whether the driver works"),
    34: _Kind(DeviceError, "a stub stands where the NVIDIA driver should be", _DRIVER_FIX),
    35: _Kind(DeviceError, "the NVIDIA driver is too old for this CUDA", _DRIVER_FIX),
    46: _Kind(DeviceError, "the GPU is busy or unavailable", "nvidia-smi says who holds it, and in which compute mode"),
    100: _Kind(DeviceError, "no NVIDIA GPU", "--target cpu, or check CUDA_VISIBLE_DEVICES and nvidia-smi"),
    101: _Kind(DeviceError, "no such GPU", "check CUDA_VISIBLE_DEVICES and nvidia-smi"),
    200: _Kind(DeviceError, "a kernel module that the driver does not take", _REBUILD_FIX),
    209: _Kind(DeviceError, "no kernel for this GPU's architecture in a module", _REBUILD_FIX),
    214: _lost("the GPU's memory has an uncorrectable ECC error"),
    218: _Kind(DeviceError, "PTX that the driver cannot compile", _REBUILD_FIX),
    220: _lost("an NVLink failed"),
    222: _Kind(DeviceError, "the NVIDIA driver is too old for the engine's PTX", _DRIVER_FIX),
    700: _lost("a kernel read or wrote memory that is not its own"),
    702: _lost("a kernel ran into the GPU's time limit"),
    710: _lost("an assertion failed on the GPU"),
    714: _lost("the GPU's stack failed"),
    715: _lost("a kernel held an illegal instruction"),
    716: _lost("a kernel read or wrote a misaligned address"),
    717: _lost("a kernel used an address of the wrong space"),
    718: _lost("a kernel jumped to an invalid address"),
    719: _lost("a kernel failed, and the GPU with it"),
    721: _lost("a device outside the GPU failed"),
    802: _Kind(DeviceError, "the GPU's system is not ready yet", "wait for the fabric manager; nvidia-smi shows it"),
    803: _Kind(DeviceError, "the NVIDIA driver's library and kernel module are of different versions",
               "reboot, or mount the library of the driver that runs"),
    804: _Kind(DeviceError, "this GPU does not run under a CUDA newer than its driver", _DRIVER_FIX),
    999: _lost("the driver reports an unknown error"),
}  # fmt: skip
"""By result code. Runtime and driver API share these numbers."""

_TEXTS: Mapping[str, int] = {
    "out of memory": OUT_OF_MEMORY,
    "initialization error": 3,
    "driver version is insufficient": 35,
    "busy or unavailable": 46,
    "no CUDA-capable device": 100,
    "invalid device ordinal": 101,
    "no kernel image": 209,
    "uncorrectable ECC error": 214,
    "uncorrectable NVLink error": 220,
    "an illegal memory access": 700,
    "the launch timed out": 702,
    "device-side assert": 710,
    "an illegal instruction": 715,
    "misaligned address": 716,
    "unspecified launch failure": 719,
    "unknown error": 999,
}
"""Words of cudaGetErrorString, for a torch whose errors bring no code."""

_CUPY_ERRORS = frozenset({"CUDARuntimeError", "CUDADriverError"})
_MEMORY_ERRORS = frozenset({"OutOfMemoryError"})


def translated(error: BaseException) -> BaseException:
    """An error as llmctl says it: a DeviceError for what a GPU, torch or cupy raised, anything else as it is."""
    if isinstance(error, LlmctlError):
        return error
    code = _code(error)
    if code is not None:
        return of_code(code, _first_line(error))
    if isinstance(error, ImportError) and _missing_module(error) in ("cupy", "cupy_backends", "torch"):
        name = "torch" if _missing_module(error) == "torch" else "cupy"
        return DeviceError(f"{name} cannot be imported: {_first_line(error)}", fix=install_command("cuda"))
    return error


@contextmanager
def device_errors() -> Iterator[None]:
    """Around loading and stepping: what fails on the device is raised as ``translated`` says it.

    Raises:
        DeviceError: DeviceMemoryError for spent memory, DeviceLostError for a device that cannot go on.
    """
    try:
        yield
    except Exception as error:
        said = translated(error)
        if said is error:
            raise
        raise said from error


def of_code(code: int, detail: str = "") -> DeviceError:
    """The error of a driver's or runtime's result code.

    Args:
        detail: what the library says of it, one line.
    """
    kind = _KINDS.get(code, _Kind(DeviceError, f"CUDA failed with code {code}", _LOST_FIX))
    return kind.error(f"{kind.what}: {detail}" if detail else kind.what, fix=kind.fix)


def _code(error: BaseException) -> int | None:
    """The CUDA result code that an exception stands for; None for an exception that is no device's."""
    names = {cls.__name__ for cls in type(error).__mro__}
    rooms = {cls.__module__.partition(".")[0] for cls in type(error).__mro__}
    if names & _MEMORY_ERRORS and rooms & {"torch", "cupy"}:
        return OUT_OF_MEMORY
    if names & _CUPY_ERRORS:
        return int(getattr(error, "status", 999))
    if "AcceleratorError" in names:
        found = getattr(error, "error_code", None)
        return int(found) if found is not None else _code_in(str(error), 999)
    if isinstance(error, RuntimeError) and str(error).startswith(("CUDA error", "CUDA driver error")):
        return _code_in(str(error), 999)
    return None


def _code_in(text: str, default: int) -> int:
    return next((code for words, code in _TEXTS.items() if words in text), default)


def _first_line(error: BaseException) -> str:
    """What an exception says, less the advice that torch writes below it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def _missing_module(error: ImportError) -> str:
    return (error.name or "").partition(".")[0]
