"""What this machine has for cuda engines, for ``llmctl doctor``."""

from __future__ import annotations

from collections.abc import Iterator

from llmctl.errors import CompileError
from llmctl.targets.base import Finding
from llmctl.targets.cuda.device import cuda_device, held_bytes, why_no_device
from llmctl.targets.cuda.nvrtc import load_nvrtc
from llmctl.targets.cuda.readiness import GIB, arch_here, missing_here, unknown_arch


def findings() -> tuple[Finding, ...]:
    """The GPU and its driver, and what drives it from Python. Without a GPU nothing is missed."""
    return tuple(_findings())


def _findings() -> Iterator[Finding]:
    device = cuda_device()
    if device is None:
        yield Finding("GPU", f"none: {why_no_device()}")
        yield Finding("NVRTC", _nvrtc())
        return
    held = held_bytes(device)
    yield Finding("GPU", f"{device.arch}, {device.memory / GIB:.1f} GiB, of which others hold {held / GIB:.1f} GiB")
    yield Finding("driver", "for CUDA {}.{}".format(*device.driver))
    yield Finding("NVRTC", _nvrtc())
    missing = unknown_arch(device) if arch_here(device) is None else missing_here(device, build=True)
    if missing is not None:
        yield Finding("cuda engines", "do not run here", missing, "mend that, or --target cpu")
    else:
        yield Finding("cuda engines", "can be built and run")


def _nvrtc() -> str:
    try:
        return load_nvrtc().version
    except CompileError:
        return "not installed: no engines for GPUs are built here"
