"""An engine's weights on the device: planes copied through page-locked memory, put together as kernels take them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmctl.graph.dtypes import BY_SAFETENSORS
from llmctl.graph.graph import Graph
from llmctl.targets.cuda.ops import PackedWeight
from llmctl.targets.cuda.packing import cuda_formats
from llmctl.targets.planes import WeightPlane

_STAGE_BYTES = 64 * 2**20
"""Of one page-locked buffer; two alternate, so that one fills from the mapped file while the other is copied."""
_READERS = 8
"""Threads that fill a buffer. 5.76 GB in the page cache took 0.51 s with eight (11 GB/s), beside an H100 whose link
takes 55 GB/s of page-locked memory: filling is what takes the time."""


def load_planes(planes: Mapping[str, WeightPlane]) -> dict[str, Tensor]:
    """Copy mapped planes to the current CUDA device.

    Returns a tensor by plane name, of the plane's shape and dtype.
    """
    made = {name: _empty(plane) for name, plane in planes.items()}
    stages = [torch.empty(_STAGE_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    copied = [torch.cuda.Event() for _ in stages]
    stream = torch.cuda.current_stream()
    with ThreadPoolExecutor(_READERS) as readers:
        for turn, portion in enumerate(_portions(planes)):
            stage, event = stages[turn % 2], copied[turn % 2]
            event.synchronize()
            at, jobs = 0, []
            for name, start, size in portion:
                source = _bytes(planes[name])[start : start + size]
                jobs += _fill(readers, stage.numpy()[at : at + size], source)
                at += size
            for job in jobs:
                job.result()
            at = 0
            for name, start, size in portion:
                made[name].view(-1).view(torch.uint8)[start : start + size].copy_(
                    stage[at : at + size], non_blocking=True
                )
                at += size
            event.record(stream)
    stream.synchronize()
    return made


def device_weights(graph: Graph, planes: Mapping[str, Tensor]) -> dict[str, Tensor | PackedWeight | None]:
    """A graph's weights by name; "" is None. Those of formats that no kernel takes are left out."""
    formats = cuda_formats(graph)
    found: dict[str, Tensor | PackedWeight | None] = {"": None}
    for name, weight in graph.weights.items():
        if name in formats:
            fmt = formats[name]
            found[name] = PackedWeight(fmt, {suffix: planes[f"{name}.{suffix}"] for suffix in fmt.planes()})
        elif weight.quant is None:
            found[name] = planes[name]
    return found


def _empty(plane: WeightPlane) -> Tensor:
    dtype = getattr(torch, BY_SAFETENSORS[plane.dtype].torch)
    return torch.empty(plane.shape, dtype=dtype, device="cuda")


def _bytes(plane: WeightPlane) -> NDArray[np.uint8]:
    return np.asarray(plane.data).reshape(-1).view(np.uint8)


def _portions(planes: Mapping[str, WeightPlane]) -> Iterator[list[tuple[str, int, int]]]:
    """(plane, start, bytes) of whatever fits one buffer together."""
    portion: list[tuple[str, int, int]] = []
    room = _STAGE_BYTES
    for name, plane in planes.items():
        total, start = _bytes(plane).nbytes, 0
        while start < total:
            size = min(room, total - start)
            portion.append((name, start, size))
            start += size
            room -= size
            if room < 2**12:
                yield portion
                portion, room = [], _STAGE_BYTES
    if portion:
        yield portion


def _fill(readers: ThreadPoolExecutor, to: NDArray[np.uint8], source: NDArray[np.uint8]) -> list:
    part = max(2**20, -(-len(to) // _READERS))
    return [readers.submit(np.copyto, to[i : i + part], source[i : i + part]) for i in range(0, len(to), part)]
