"""What this machine is: CPU features, and the NVIDIA device and driver. Asks the system directly; no torch, no cupy."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from dataclasses import dataclass
from pathlib import Path

from llmctl.targets.cuda.compile import PTX_FALLBACK

NO_CUDA_RUNTIME = "this version builds cuda engines but has no runtime for them yet"


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
def cpu_features() -> frozenset[str]:
    """Instruction-set features as Linux names them (avx2, avx512_bf16, …) and the machine name (x86_64)."""
    features = {platform.machine().lower()}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                features.update(value.split())
                break
    except OSError:
        pass
    return frozenset(features)


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def cuda_device() -> CudaDevice | None:
    """The first NVIDIA device, through the driver's own library; None without a driver or device."""
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
