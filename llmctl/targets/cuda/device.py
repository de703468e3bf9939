"""The NVIDIA device and driver of this machine, asked through the driver's own libraries; no torch, no cupy."""

from __future__ import annotations

import ctypes
import functools
import uuid
from dataclasses import dataclass

from llmctl.targets.cuda.compile import PTX_FALLBACK
from llmctl.targets.cuda.errors import of_code


@dataclass(frozen=True)
class CudaDevice:
    """The first NVIDIA device: compute capability, newest CUDA version the driver supports, memory in bytes.

    ``identity``: its UUID as NVML spells it, without its prefix; "" when unknown.
    """

    capability: tuple[int, int]
    driver: tuple[int, int]
    memory: int
    identity: str = ""

    @property
    def arch(self) -> str:
        """``sm_90``."""
        return f"sm_{self.capability[0]}{self.capability[1]}"


def cuda_device() -> CudaDevice | None:
    """The first NVIDIA device; None without a driver or device."""
    found = _probe()
    return found if isinstance(found, CudaDevice) else None


def why_no_device() -> str:
    """What stands between this machine and an NVIDIA device; "" when there is one."""
    found = _probe()
    return found if isinstance(found, str) else ""


@functools.cache
def _probe() -> CudaDevice | str:
    """The first device, or why there is none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver on this machine"
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
    for call in calls:
        if (code := call()) != 0:
            return of_code(code).message
    release = (version.value // 1000, version.value % 1000 // 10)
    return CudaDevice((major.value, minor.value), release, memory.value, _uuid(driver, device))


def held_bytes(device: CudaDevice) -> int:
    """Bytes of a device's memory that processes hold now; 0 where NVML does not tell.

    Needs no context of its own, which would take memory itself.
    """
    free = _free_bytes(device.identity) if device.identity else None
    return 0 if free is None else max(0, device.memory - free)


class _NvmlMemory(ctypes.Structure):
    """nvmlMemory_t, bytes."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def _free_bytes(identity: str) -> int | None:
    """What NVML says is free on a GPU or on a part of one (MIG)."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    if nvml.nvmlInit_v2() != 0:
        return None
    try:
        handle, memory = ctypes.c_void_p(), _NvmlMemory()
        names = (f"{prefix}-{identity}".encode() for prefix in ("GPU", "MIG"))
        if all(nvml.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle)) != 0 for name in names):
            return None
        return int(memory.free) if nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) == 0 else None
    finally:
        nvml.nvmlShutdown()


def _uuid(driver: ctypes.CDLL, device: ctypes.c_int) -> str:
    """``00112233-4455-6677-8899-aabbccddeeff``; "" from a driver that does not tell."""
    raw = (ctypes.c_ubyte * 16)()
    ask = getattr(driver, "cuDeviceGetUuid_v2", None)
    if ask is None or ask(raw, device) != 0:
        return ""
    return str(uuid.UUID(bytes=bytes(raw)))


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
