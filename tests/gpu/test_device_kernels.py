"""The adapter that runs emulated tests on a device, itself run on the emulator: it must pass what is right and report
what is wrong."""

from __future__ import annotations

import emulator
import machine
import numpy as np
import pytest
import torch
from device_kernels import DeviceKernels
from emulator import missing, read, update, write
from machine import EmulatedMachine

from llmctl.targets.cuda.call import Call, Pointer

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


def _add(kernels: DeviceKernels, x: torch.Tensor, z: torch.Tensor, offset: int = 0) -> None:
    arguments = [read(x, offset), read(x, offset), write(z), np.int32(len(z)), np.int32(z.shape[1])]
    kernels.launch("add_f16", 1, 256, arguments)


def test_results_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "kernels", emulator.kernels)
    kernels = DeviceKernels("elementwise.cu", EmulatedMachine(), "cpu")
    x, z = torch.randn(4, 8).half(), torch.empty(2, 8, dtype=torch.float16)
    _add(kernels, x, z, offset=2 * 8 * 2)
    assert torch.equal(z, x[2:] * 2)
    both = update(x)
    kernels.launch("add_f16", 1, 256, [both, both, both, np.int32(4), np.int32(8)])
    assert torch.equal(x[2:], z)


class Faulty:
    """Does something wrong to one argument."""

    def __init__(self, argument: int, shift: int, noise: bool = False) -> None:
        self.argument, self.shift, self.noise, self.calls = argument, shift, noise, 0

    def launch(self, call: Call) -> None:
        """Write one byte."""
        self.calls += 1
        pointer = call.arguments[self.argument]
        assert isinstance(pointer, Pointer)
        whole = torch.empty(0, dtype=torch.uint8).set_(pointer.tensor.untyped_storage())
        for i, argument in enumerate(call.arguments):
            if isinstance(argument, Pointer) and i == 2:
                argument.tensor[:32] = 0
        whole[pointer.tensor.storage_offset() + self.shift] = self.calls if self.noise else 1


@pytest.mark.parametrize(
    ("faulty", "message"),
    [
        (Faulty(2, -1), "wrote before a buffer"),
        (Faulty(2, 32), "wrote behind a buffer"),
        (Faulty(0, 3), "wrote an input"),
        (Faulty(2, 3, noise=True), "differs from run to run"),
    ],
)
def test_faults_are_reported(faulty: Faulty, message: str) -> None:
    x, z = torch.full((2, 8), 7.0).half(), torch.empty(2, 8, dtype=torch.float16)
    with pytest.raises(AssertionError, match=message):
        _add(DeviceKernels("elementwise.cu", faulty, "cpu"), x, z)
