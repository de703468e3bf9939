"""Where models are run: a device, how a runtime is opened there, how time is measured there."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import fields
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

    def milliseconds(self, run: Callable[[], Any], count: int) -> float:
        """Time of one of ``count`` runs, back to back."""
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


def runtime_sizes(blocks: int, block_size: int, length: int, tokens: int, seqs: int, **more: Any) -> RuntimeSizes:
    """RuntimeSizes; ``more``: fields that came later.

    Raises:
        NotImplementedError: this version's RuntimeSizes has no such field.
    """
    known = {field.name for field in fields(RuntimeSizes)}
    for name in more:
        if name not in known:
            raise NotImplementedError(f"this version's RuntimeSizes has no {name}")
    return RuntimeSizes(blocks, block_size, length, tokens, seqs, **more)


def median_ms(place: Place, run: Callable[[], Any], count: int, rounds: int = 3) -> tuple[float, float]:
    """(median milliseconds of a run over rounds, half the rounds' range over it)."""
    found = [place.milliseconds(run, count) for _ in range(rounds)]
    median = statistics.median(found)
    return median, (max(found) - min(found)) / 2 / median if median else 0.0


class CudaPlace:
    """This machine's GPU."""

    device = "cuda"
    graphs = True
    real = True

    def open(self, graph: Graph, options: BuildOptions, planes: Mapping[str, Any], sizes: RuntimeSizes) -> Any:
        """The product's CUDA runtime; kernels are compiled here the first time."""
        from llmctl.targets.cuda.runtime import CudaRuntime

        from llmctl.checkpoint.resolve import cache_dir
        from llmctl.targets.cuda.launch import compiled_machine
        from llmctl.targets.cuda.registry import choose_all, sources_of

        chosen = choose_all(graph, options.dtype, options.kv_cache_dtype, options.block_size)
        machine = compiled_machine(sources_of(chosen), cache_dir() / "kernels")
        return CudaRuntime(graph, options, planes, sizes, machine, device=self.device)

    def milliseconds(self, run: Callable[[], Any], count: int) -> float:
        """By events on the device."""
        import torch

        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            run()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / count

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


def arch() -> str:
    """This GPU's, as ``sm_90``."""
    import torch

    return "sm_{}{}".format(*torch.cuda.get_device_capability())


def _driver_version() -> str | None:
    """The driver's own version, as the kernel's module tells it."""
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8") as file:
            words = file.readline().split()
    except OSError:
        return None
    return next((word for word in words if word[:1].isdigit() and "." in word), None)


class HostPlace:
    """The CPU, for checks of everything but speed. ``opener``: makes the runtime."""

    device = "cpu"
    graphs = False
    real = False

    def __init__(self, opener: Callable[..., Any]) -> None:
        self._opener = opener

    def open(self, graph: Graph, options: BuildOptions, planes: Mapping[str, Any], sizes: RuntimeSizes) -> Any:
        """Whatever the opener makes."""
        return self._opener(graph, options, planes, sizes)

    def milliseconds(self, run: Callable[[], Any], count: int) -> float:
        """By the wall."""
        start = time.perf_counter()
        for _ in range(count):
            run()
        return (time.perf_counter() - start) * 1e3 / count

    def synchronize(self) -> None:
        """Nothing is queued."""

    def free(self) -> None:
        """Nothing is kept."""

    def facts(self) -> dict[str, Any]:
        """No device."""
        import torch

        return {"card": "none: a dry run on the CPU, no figure of which means anything", "torch": torch.__version__}
