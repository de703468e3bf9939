"""What the driver's libraries say about a device, and what stands in for it when they say nothing: libraries faked."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import pytest

from llmctl.targets.cuda import device
from llmctl.targets.cuda.device import CudaDevice, best_arch, cuda_device, held_bytes, why_no_device

IDENTITY = "00112233-4455-6677-8899-aabbccddeeff"
GIB = 2**30


class Driver:
    """libcuda: an H100 of 80 GiB under CUDA 13.1, unless ``fails`` names a call and its code."""

    def __init__(self, fails: dict[str, int] | None = None) -> None:
        self.fails = fails or {}

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)
        return lambda *arguments: self.fails.get(name, 0) or self._answer(name, arguments)

    def _answer(self, name: str, arguments: tuple[Any, ...]) -> int:
        out = getattr(arguments[0], "_obj", arguments[0]) if arguments else None
        if name == "cuDriverGetVersion":
            out.value = 13010
        elif name == "cuDeviceTotalMem_v2":
            out.value = 80 * GIB
        elif name == "cuDeviceGetAttribute":
            out.value = {75: 9, 76: 0}[arguments[1]]
        elif name == "cuDeviceGetUuid_v2":
            out[:] = UUID(IDENTITY).bytes
        return 0


class Nvml:
    """libnvidia-ml: a device of a name that has ``free`` bytes."""

    def __init__(self, name: str, free: int) -> None:
        self.name, self.free, self.open = name.encode(), free, 0

    def nvmlInit_v2(self) -> int:
        self.open += 1
        return 0

    def nvmlShutdown(self) -> int:
        self.open -= 1
        return 0

    def nvmlDeviceGetHandleByUUID(self, name: bytes, _: Any) -> int:
        return 0 if name == self.name else 6

    def nvmlDeviceGetMemoryInfo(self, _: Any, memory: Any) -> int:
        memory._obj.free = self.free
        return 0


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    device._probe.cache_clear()
    yield
    device._probe.cache_clear()


def libraries(monkeypatch: pytest.MonkeyPatch, **found: Any) -> None:
    def load(name: str) -> Any:
        key = {"libcuda.so.1": "driver", "libnvidia-ml.so.1": "nvml"}[name]
        if key not in found:
            raise OSError(f"{name}: cannot open shared object file")
        return found[key]

    monkeypatch.setattr(ctypes, "CDLL", load)


def test_a_device_as_the_driver_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    libraries(monkeypatch, driver=Driver())
    assert cuda_device() == CudaDevice((9, 0), (13, 1), 80 * GIB, IDENTITY)
    assert why_no_device() == ""


@pytest.mark.parametrize(
    ("fails", "said"),
    [
        ({"cuInit": 100}, "no NVIDIA GPU"),
        ({"cuInit": 803}, "the NVIDIA driver's library and kernel module are of different versions"),
        ({"cuDeviceGet": 101}, "no such GPU"),
    ],
)
def test_why_there_is_no_device(monkeypatch: pytest.MonkeyPatch, fails: dict[str, int], said: str) -> None:
    libraries(monkeypatch, driver=Driver(fails))
    assert cuda_device() is None
    assert why_no_device() == said


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    libraries(monkeypatch)
    assert cuda_device() is None
    assert why_no_device() == "no NVIDIA driver on this machine"


@pytest.mark.parametrize("prefix", ["GPU", "MIG"])
def test_memory_that_is_held(monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
    nvml = Nvml(f"{prefix}-{IDENTITY}", 70 * GIB)
    libraries(monkeypatch, driver=Driver(), nvml=nvml)
    found = cuda_device()
    assert found is not None
    assert held_bytes(found) == 10 * GIB
    nvml.free = 81 * GIB  # NVML counts what the driver keeps for itself
    assert held_bytes(found) == 0
    assert nvml.open == 0


@pytest.mark.parametrize("nvml", [None, Nvml("GPU-another", 0)])
def test_memory_that_nobody_tells_of(monkeypatch: pytest.MonkeyPatch, nvml: Nvml | None) -> None:
    libraries(monkeypatch, **({} if nvml is None else {"nvml": nvml}))
    assert held_bytes(CudaDevice((9, 0), (13, 0), GIB, IDENTITY)) == 0
    libraries(monkeypatch, nvml=Nvml("GPU-", 0))
    assert held_bytes(CudaDevice((9, 0), (13, 0), GIB)) == 0


def test_a_driver_without_identities(monkeypatch: pytest.MonkeyPatch) -> None:
    libraries(monkeypatch, driver=Driver({"cuDeviceGetUuid_v2": 1}))
    assert cuda_device() == CudaDevice((9, 0), (13, 1), 80 * GIB)


@pytest.mark.parametrize(
    ("capability", "best"), [((8, 7), "sm_86"), ((9, 0), "sm_90"), ((8, 9), "sm_86"), ((7, 5), None), ((10, 3), None)]
)
def test_a_cubin_serves_later_minors(capability: tuple[int, int], best: str | None) -> None:
    assert best_arch(("sm_80", "sm_86", "sm_90"), capability) == best
