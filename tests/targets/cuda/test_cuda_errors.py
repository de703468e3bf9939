"""What fails on a GPU is one line of llmctl's own, by type and code; faked: no GPU is needed."""

from __future__ import annotations

import pytest
import torch

from llmctl.errors import DeviceError, DeviceLostError, DeviceMemoryError, EngineLoadError, ExitCode
from llmctl.targets.cuda.errors import device_errors, of_code, translated


class CUDARuntimeError(RuntimeError):
    """As cupy's, which knows its code."""

    def __init__(self, status: int, text: str = "") -> None:
        super().__init__(text)
        self.status = status


class CUDADriverError(CUDARuntimeError):
    """As cupy's."""


class AcceleratorError(RuntimeError):
    """As torch's of 2.9 and later."""

    def __init__(self, text: str, code: int | None) -> None:
        super().__init__(text)
        self.error_code = code


def cupy_out_of_memory() -> Exception:
    from cupy.cuda.memory import OutOfMemoryError

    return OutOfMemoryError(8, 0, 0)


ILLEGAL = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be asynchronously reported"


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has"), DeviceMemoryError,
         "the GPU is out of memory: CUDA out of memory"),
        (AcceleratorError(ILLEGAL, 700), DeviceLostError, "a kernel read or wrote memory that is not its own"),
        (AcceleratorError(ILLEGAL, None), DeviceLostError, "a kernel read or wrote memory that is not its own"),
        (AcceleratorError("CUDA error: x", 719), DeviceLostError, "a kernel failed, and the GPU with it"),
        (RuntimeError(ILLEGAL), DeviceLostError, "a kernel read or wrote memory that is not its own"),
        (RuntimeError("CUDA error: out of memory"), DeviceMemoryError, "the GPU is out of memory"),
        (RuntimeError("CUDA driver error: a text of tomorrow"), DeviceLostError, "the driver reports an unknown error"),
        (CUDARuntimeError(35, "cudaErrorInsufficientDriver"), DeviceError, "the NVIDIA driver is too old"),
        (CUDARuntimeError(100), DeviceError, "no NVIDIA GPU"),
        (CUDADriverError(2, "CUDA_ERROR_OUT_OF_MEMORY"), DeviceMemoryError, "the GPU is out of memory"),
        (CUDADriverError(209, "CUDA_ERROR_NO_BINARY_FOR_GPU"), DeviceError, "no kernel for this GPU's architecture"),
        (CUDADriverError(12345), DeviceError, "CUDA failed with code 12345"),
        (ModuleNotFoundError("No module named 'cupy'", name="cupy"), DeviceError, "cupy cannot be imported"),
        (ImportError("libcudart.so.13: cannot open", name="cupy_backends.cuda"), DeviceError, "cupy cannot be"),
        (ImportError("no torch", name="torch"), DeviceError, "torch cannot be imported"),
    ],
)  # fmt: skip
def test_a_device_error_is_named(error: Exception, kind: type[DeviceError], said: str) -> None:
    found = translated(error)
    assert type(found) is kind
    assert str(found).startswith(said)
    assert "\n" not in str(found)
    assert found.fix
    assert found.exit_code == ExitCode.RUNTIME


def test_cupys_own_memory_error() -> None:
    pytest.importorskip("cupy")
    assert type(translated(cupy_out_of_memory())) is DeviceMemoryError


@pytest.mark.parametrize(
    "error",
    [
        ValueError("CUDA error: only a text"),
        RuntimeError("a shape is wrong"),
        MemoryError("of the host"),
        ModuleNotFoundError("No module named 'yaml'", name="yaml"),
        EngineLoadError("as it is"),
        DeviceLostError("once is enough"),
    ],
)
def test_other_errors_stay_as_they_are(error: Exception) -> None:
    assert translated(error) is error
    with pytest.raises(type(error)) as caught, device_errors():
        raise error
    assert caught.value is error


def test_what_was_raised_stays_the_cause() -> None:
    raised = RuntimeError(ILLEGAL)
    with pytest.raises(DeviceLostError, match="Xid") as caught, device_errors():
        raise raised
    assert caught.value.__cause__ is raised


def test_a_lost_device_says_what_to_do() -> None:
    assert str(of_code(700)).endswith("(restart the server; nvidia-smi and dmesg (lines with Xid) say whether the GPU "
                                      "is at fault)")  # fmt: skip
