"""The NVIDIA device and driver of this machine, asked through the driver's own library; no torch, no cupy."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

from llmctl.targets.cuda.compile import PTX_FALLBACK


@dataclass(frozen=True)
class CudaDevice:
    """The first NVIDIA device: compute capability, newest CUDA version the driver supports, memory in bytes."""

    capability: tuple[int, int]
    driver: tuple[int, int]
    memory: int

    @property
    def arch(self) -> str:
        """``sm_90``."""
        return f"sm_{self.capability[0]}{self.capability[1]}"


@functools.cache
def cuda_device() -> CudaDevice | None:
    """The first NVIDIA device; None without a driver or device."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version, device, major, minor = (ctypes.c_int() for _ in range(4))
    memory = ctypes.c_size_t()
    compute_major, compute_minor = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
    calls = (
        lambda: driver.cuInit(0),
        lambda: driver.cuDriverGetVersion(ctypes.byref(version)),
        lambda: driver.cuDeviceGet(ctypes.byref(device), 0),
        lambda: driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device),
        lambda: driver.cuDeviceGetAttribute(ctypes.byref(major), compute_major, device),
        lambda: driver.cuDeviceGetAttribute(ctypes.byref(minor), compute_minor, device),
    )
    if any(call() != 0 for call in calls):
        return None
    return CudaDevice((major.value, minor.value), (version.value // 1000, version.value % 1000 // 10), memory.value)


def arch_number(arch: str) -> tuple[int, int]:
    """``sm_90`` or ``compute_80`` -> (9, 0)."""
    number = int(arch.rpartition("_")[2])
    return divmod(number, 10)


def best_arch(archs: tuple[str, ...], capability: tuple[int, int]) -> str | None:
    """The one of ``archs`` to load on a device: a cubin of its major version and at most its minor, else the PTX."""
    cubins = [
        arch
        for arch in archs
        if arch.startswith("sm_") and arch_number(arch)[0] == capability[0] and arch_number(arch)[1] <= capability[1]
    ]
    if cubins:
        return max(cubins, key=arch_number)
    if PTX_FALLBACK in archs and arch_number(PTX_FALLBACK) <= capability:
        return PTX_FALLBACK
    return None
