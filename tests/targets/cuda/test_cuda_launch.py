"""What the launcher makes of a driver's refusals, by a stand-in for the driver: no GPU is needed."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from llmctl.errors import DeviceError, DeviceLostError, DeviceMemoryError
from llmctl.targets.cuda import launch
from llmctl.targets.cuda.call import Call, Geometry
from llmctl.targets.cuda.launch import CudaMachine

CALL = Call("embed_bf16", "elementwise.cu", Geometry((1, 1, 1), 32), (np.int32(1),))


class Driver:
    """Every launch ends with one result code."""

    def __init__(self, code: int) -> None:
        self.code = code

    def cuLaunchKernelEx(self, *_: Any) -> int:
        """Launch nothing."""
        return self.code

    def cuGetErrorName(self, code: int, text: Any) -> int:
        """A name of the code, as the driver writes it through a pointer."""
        text._obj.value = f"CUDA_ERROR_{code}".encode()
        return 0

    def cuGetErrorString(self, code: int, _: Any) -> int:
        """No description."""
        return code


def started(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    driver = Driver(code)
    monkeypatch.setattr(launch, "_driver", lambda: driver)
    monkeypatch.setattr(launch, "_stream", lambda: ctypes.c_void_p(0))
    machine = CudaMachine({})
    monkeypatch.setattr(machine, "_kernel", lambda _: 1)
    machine.launch(CALL)


def test_a_launch_that_the_driver_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    started(monkeypatch, 0)


@pytest.mark.parametrize(
    ("code", "kind", "said"),
    [
        (2, DeviceMemoryError, "the GPU is out of memory"),
        (700, DeviceLostError, "a kernel read or wrote memory that is not its own"),
        (701, DeviceError, "CUDA failed with code 701"),
    ],
)
def test_a_launch_that_fails_is_a_device_error(
    monkeypatch: pytest.MonkeyPatch, code: int, kind: type[DeviceError], said: str
) -> None:
    with pytest.raises(DeviceError) as caught:
        started(monkeypatch, code)
    assert type(caught.value) is kind
    assert caught.value.message == f"{said}: embed_bf16: CUDA_ERROR_{code}: ?"
    assert caught.value.fix
