"""The order in which a runtime's work reaches its device: one stream, page-locked host memory, marks in the stream.

``HostQueue`` does at once, in host memory, what ``CudaQueue`` starts on a GPU: the emulator behind the same interface.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

from llmctl.targets.cuda.program import LaunchMachine


class Mark(Protocol):
    """A point in the stream."""

    def wait(self) -> None:
        """Block until everything before it is done."""
        ...

    def seconds_since(self, earlier: Any) -> float:
        """Time between two marks that are both passed."""
        ...


class Queue(Protocol):
    """What a runtime asks of its device besides launches.

    Attributes:
        device: torch's name. machine: carries out calls. sms: multiprocessors.
    """

    device: str
    machine: LaunchMachine
    sms: int

    def active(self) -> AbstractContextManager[Any]:
        """Within it, launches and torch's operators go to this queue."""
        ...

    def host_memory(self, nbytes: int) -> Tensor:
        """u8, page-locked where that helps."""
        ...

    def upload(self, array: NDArray[Any]) -> Tensor:
        """A copy on the device; the array may change at once."""
        ...

    def download(self, tensor: Tensor) -> Tensor:
        """A copy on the host, complete once a later mark is passed."""
        ...

    def mark(self) -> Mark:
        """Mark the end of what has been started."""
        ...

    def capture(self, run: Callable[[], None]) -> Callable[[], Any]:
        """What ``run`` starts, to be started again as a whole; ``run`` was run before."""
        ...


class CudaQueue:
    """A ``Queue`` on the current CUDA device."""

    def __init__(self, machine: LaunchMachine) -> None:
        self.device, self.machine = "cuda", machine
        self.sms = torch.cuda.get_device_properties(0).multi_processor_count
        self.stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()

    def active(self) -> AbstractContextManager[Any]:
        """See ``Queue``."""
        return torch.cuda.stream(self.stream)

    def host_memory(self, nbytes: int) -> Tensor:
        """See ``Queue``."""
        return torch.zeros(nbytes, dtype=torch.uint8).pin_memory()

    def upload(self, array: NDArray[Any]) -> Tensor:
        """See ``Queue``: torch keeps the page-locked copy until the transfer is done."""
        return torch.from_numpy(array).pin_memory().to(self.device, non_blocking=True)

    def download(self, tensor: Tensor) -> Tensor:
        """See ``Queue``."""
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    def mark(self) -> Mark:
        """See ``Queue``."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(self.stream)
        return CudaMark(event)

    def capture(self, run: Callable[[], None]) -> Callable[[], Any]:
        """See ``Queue``: a CUDA graph; all of a queue's share one memory pool."""
        graph = torch.cuda.CUDAGraph()
        gc.disable()  # nothing may be freed on the device while a stream captures
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self.stream, capture_error_mode="thread_local"):
                run()
        finally:
            gc.enable()
        return graph.replay


class CudaMark:
    """An event on a stream."""

    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        """See ``Mark``."""
        self._event.synchronize()

    def seconds_since(self, earlier: CudaMark) -> float:
        """See ``Mark``."""
        return earlier._event.elapsed_time(self._event) / 1e3


class HostQueue:
    """A ``Queue`` over a machine that works in host memory and is done when a call returns."""

    def __init__(self, machine: LaunchMachine, sms: int = 2) -> None:
        self.device, self.machine, self.sms = "cpu", machine, sms

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """See ``Queue``."""
        yield

    def host_memory(self, nbytes: int) -> Tensor:
        """See ``Queue``."""
        return torch.zeros(nbytes, dtype=torch.uint8)

    def upload(self, array: NDArray[Any]) -> Tensor:
        """See ``Queue``."""
        return torch.from_numpy(array.copy())

    def download(self, tensor: Tensor) -> Tensor:
        """See ``Queue``."""
        return tensor.clone()

    def mark(self) -> Mark:
        """See ``Queue``."""
        return HostMark(time.perf_counter())

    def capture(self, run: Callable[[], None]) -> Callable[[], Any]:
        """See ``Queue``: the run itself, whose addresses and launches are as fixed as a graph's."""
        return run


class HostMark:
    """A moment."""

    def __init__(self, moment: float) -> None:
        self._moment = moment

    def wait(self) -> None:
        """See ``Mark``."""

    def seconds_since(self, earlier: HostMark) -> float:
        """See ``Mark``."""
        return self._moment - earlier._moment
