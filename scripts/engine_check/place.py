"""Where models are run: a device, how a runtime is opened there, how time is measured there."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from llmctl.graph.graph import Graph
from llmctl.targets.base import BuildOptions, RuntimeSizes


class Place(Protocol):
    """A device. ``graphs``: whether decode steps are replayed there; ``real``: whether its times mean anything."""

    device: str
    graphs: bool
    real: bool

    def open(self, graph: Graph, options: BuildOptions, planes: Mapping[str, Any], sizes: RuntimeSizes) -> Any:
        """A runtime over planes that lie on the device."""
        ...

    def synchronize(self) -> None:
        """Wait for all that was queued."""
        ...

    def free(self) -> None:
        """Give back the memory of what was dropped."""
        ...

    def facts(self) -> dict[str, Any]:
        """What the report says of the device."""
        ...


def wall_ms(place: Place, run: Callable[[], Any], count: int) -> float:
    """Milliseconds of one of ``count`` runs, started back to back and waited for together.

    By the wall, for a runtime has a stream of its own; what starting the first and waiting for the last costs, some 30
    us, is shared by all.
    """
    place.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        run()
    place.synchronize()
    return (time.perf_counter() - start) * 1e3 / count


def median_ms(measure: Callable[[], float], rounds: int) -> tuple[float, float]:
    """(median milliseconds over rounds, half the rounds' range over it)."""
    found = [measure() for _ in range(rounds)]
    median = statistics.median(found)
    return median, (max(found) - min(found)) / 2 / median if median else 0.0


class CudaPlace:
    """This machine's GPU."""

    device = "cuda"
    graphs = True
    real = True

    def open(self, graph: Graph, options: BuildOptions, planes: Mapping[str, Any], sizes: RuntimeSizes) -> Any:
        """The product's CUDA runtime; kernels are compiled here the first time."""
        from llmctl.checkpoint.resolve import cache_dir
        from llmctl.targets.cuda.launch import compiled_machine
        from llmctl.targets.cuda.registry import choose_all, sources_of
        from llmctl.targets.cuda.runtime import CudaRuntime

        chosen = choose_all(graph, options.dtype, options.kv_cache_dtype, options.block_size)
        machine = compiled_machine(sources_of(chosen), cache_dir() / "kernels")
        return CudaRuntime(graph, options, planes, sizes, machine, device=self.device)

    def synchronize(self) -> None:
        """Wait; raises what a kernel did wrong."""
        import torch

        torch.cuda.synchronize()

    def free(self) -> None:
        """torch keeps what it allocated for the next tensors, until it is asked."""
        import torch

        gc.collect()
        torch.cuda.empty_cache()

    def facts(self) -> dict[str, Any]:
        """Card, driver, versions."""
        import cupy
        import torch

        from llmctl.targets.cuda.device import cuda_device

        device = cuda_device()
        return {
            "card": torch.cuda.get_device_name(),
            "driver": _driver_version() or (device and "CUDA {}.{}".format(*device.driver)),
            "CUDA": torch.version.cuda,
            "torch": torch.__version__,
            "cupy": cupy.__version__,
        }


def _driver_version() -> str | None:
    """The driver's own version, as the kernel's module tells it."""
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8") as file:
            words = file.readline().split()
    except OSError:
        return None
    return next((word for word in words if word[:1].isdigit() and "." in word), None)


class HostPlace:
    """The CPU, for checks of everything but speed.

    Args:
        opener: makes the runtime. graphs: whether that one has something to replay.
    """

    device = "cpu"
    real = False

    def __init__(self, opener: Callable[..., Any], graphs: bool = False) -> None:
        self._opener, self.graphs = opener, graphs

    def open(self, graph: Graph, options: BuildOptions, planes: Mapping[str, Any], sizes: RuntimeSizes) -> Any:
        """Whatever the opener makes."""
        return self._opener(graph, options, planes, sizes)

    def synchronize(self) -> None:
        """Nothing is queued."""

    def free(self) -> None:
        """Nothing is kept."""

    def facts(self) -> dict[str, Any]:
        """No device."""
        import torch

        return {"card": "none: a dry run on the CPU, no figure of which means anything", "torch": torch.__version__}
