"""Whether this machine runs cuda engines: the device, and what drives it from Python. One line says what is missing.

``cuda_device`` is asked first and alone on most machines; torch and cupy are imported only where there is a device.
"""

from __future__ import annotations

from llmctl.extras import install_command
from llmctl.targets.base import Offer
from llmctl.targets.cuda.compile import ARCHITECTURES
from llmctl.targets.cuda.device import CudaDevice, best_arch, cuda_device, why_no_device

GIB = 2**30


def missing_here(device: CudaDevice | None, *, build: bool = False) -> str | None:
    """What this machine lacks to run cuda engines; None for nothing.

    That is a device; or what drives it from Python: a torch with CUDA, a driver new enough for it, cupy.

    Args:
        build: an engine is to be built first, for which NVRTC is needed as well.
    """
    if device is None:
        return why_no_device() or "no NVIDIA GPU"
    try:
        import torch
    except ImportError:
        return f"torch is not installed: {install_command('cuda')}"
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA: install a CUDA build of it"
    if not torch.cuda.is_available():
        driver = "CUDA {}.{}".format(*device.driver)
        return f"torch is built for CUDA {torch.version.cuda} and cannot use the device; the driver is for {driver}"
    from llmctl.targets.cuda.launch import missing_device, missing_launcher

    return missing_device() if build else missing_launcher()


def arch_here(device: CudaDevice) -> str | None:
    """The architecture to build for on a device: of those that the kernels are compiled for, the one it runs best."""
    return best_arch(ARCHITECTURES, device.capability)


def unknown_arch(device: CudaDevice) -> str:
    """Why there are no kernels for a device."""
    return f"expected a GPU of {', '.join(ARCHITECTURES)} (or a later minor of one), found {device.arch}"


def offer() -> Offer | None:
    """To build for this machine's GPU; with what is missing where it cannot be used; None without a GPU."""
    device = cuda_device()
    if device is None:
        return None
    found = f"{device.arch}, {device.memory / GIB:.1f} GiB"
    missing = unknown_arch(device) if arch_here(device) is None else missing_here(device, build=True)
    if missing is not None:
        return Offer("cuda", missing=f"the GPU ({found}) is not used: {missing}")
    return Offer("cuda", said=f"using the GPU ({found}); --target cpu would use the CPU")
