"""The CUDA runtime on torch's meta device: every size, address and order of a real one, and no contents.

Whatever on the host would have to wait for the device's contents fails there (``item``, ``tolist``, ``numpy``), and
what takes device memory can be told from what takes the host's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llmctl.graph.dtypes import BY_SAFETENSORS
from llmctl.graph.graph import Graph
from llmctl.targets.base import BuildOptions, RuntimeSizes
from llmctl.targets.cuda import runtime as cuda_runtime
from llmctl.targets.cuda.call import Call
from llmctl.targets.cuda.packing import cuda_planes
from llmctl.targets.cuda.queue import HostMark, HostQueue
from llmctl.targets.cuda.runtime import CudaRuntime


class NullMachine:
    """Starts nothing but torch's operators; notes what was started, and counts what was made ready."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.made_ready = 0

    def launch(self, call: Call) -> None:
        """Note the call."""
        self.started.append(call.entry)

    def call_torch(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> None:
        """Run an operator of torch."""
        function(*arguments, **named)

    def prepared(self, call: Call) -> Callable[[], None]:
        """What notes the call."""
        self.made_ready += 1
        return lambda: self.launch(call)


class WatchedMark(HostMark):
    """Notes that it was waited for."""

    def __init__(self, number: int, waits: list[int]) -> None:
        super().__init__(0.0)
        self._number, self._waits = number, waits

    def wait(self) -> None:
        """Note it."""
        self._waits.append(self._number)


class MetaQueue(HostQueue):
    """A queue whose device is torch's meta device.

    Attributes:
        marks: how many have been set. waits: which of them were waited for, in order.
    """

    def __init__(self, machine: Any, sms: int = 132) -> None:
        super().__init__(machine, sms)
        self.device = "meta"
        self.marks, self.waits = 0, list[int]()

    def upload(self, array: NDArray[Any]) -> Tensor:
        """Memory for a copy."""
        return torch.from_numpy(array.copy()).to("meta")

    def active(self) -> Any:
        """Copies that the host does not wait for may leave the device."""
        return _CopiesOut()

    def download(self, tensor: Tensor) -> Tensor:
        """Zeros."""
        return torch.zeros(tensor.shape, dtype=tensor.dtype)

    def mark(self) -> WatchedMark:
        """The next."""
        self.marks += 1
        return WatchedMark(self.marks, self.waits)


class _CopiesOut(TorchDispatchMode):
    """While it is active, a copy to the host that nobody waits for fills it with zeros; torch makes an error of it, and
    should of one that is waited for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See the class."""
        copies_out = func is torch.ops.aten.copy_.default and args[1].is_meta and not args[0].is_meta
        if copies_out and (kwargs or {}).get("non_blocking", len(args) > 2 and args[2]):
            return args[0].zero_()
        return func(*args, **(kwargs or {}))


class MetaRuntime(CudaRuntime):
    """A CudaRuntime that knows its queue."""

    queue: MetaQueue


def meta_runtime(
    monkeypatch: pytest.MonkeyPatch,
    graph: Graph,
    dtype: str = "float16",
    *,
    num_blocks: int = 64,
    block_size: int = 16,
    max_num_batched_tokens: int = 512,
    max_num_seqs: int = 8,
    kv_cache_dtype: str | None = None,
    sms: int = 132,
    **options: Any,
) -> MetaRuntime:
    """A runtime of a graph; weights are as large as they would be."""
    monkeypatch.setattr(cuda_runtime, "HostQueue", partial(MetaQueue, sms=sms))
    built = BuildOptions(dtype, graph.max_position, block_size, kv_cache_dtype or dtype, graph.passes)
    length = min(graph.max_position, num_blocks * block_size)
    sizes = RuntimeSizes(num_blocks, block_size, length, max_num_batched_tokens, max_num_seqs)
    runtime = MetaRuntime(graph, built, meta_planes(graph, built), sizes, NullMachine(), device="meta", **options)
    assert isinstance(runtime._queue, MetaQueue)
    runtime.queue = runtime._queue
    return runtime


def meta_planes(graph: Graph, options: BuildOptions) -> dict[str, Tensor]:
    """Planes by name."""
    return {
        plane.name: torch.empty(
            plane.shape, dtype=getattr(torch, BY_SAFETENSORS[plane.dtypes[0]].torch), device="meta"
        )
        for planes in cuda_planes(graph, options, None).values()
        for plane in planes
    }  # fmt: skip


class DeviceAllocations(TorchDispatchMode):
    """While it is active, notes each of torch's operators whose result is on the meta device, in memory that none of
    its arguments has."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See the class."""
        result = func(*args, **(kwargs or {}))
        known = {_storage(t) for t in _tensors((args, kwargs or {}))}
        if any(t.is_meta and _storage(t) not in known for t in _tensors(result)):
            self.found.append(str(func))
        return result


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    return [t for item in value for t in _tensors(item)] if isinstance(value, (tuple, list, type({}.values()))) else []
