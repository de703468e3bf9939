"""Parts ``rates``, ``decode`` and ``prefill``: what the device can do, and what share of it steps get.

Decode steps are timed as replays of the runtime's captured graphs, back to back; prompts from ``execute`` to the token.
Bytes and operations are counted on paper (``models.py``).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from engine_check.models import BLOCK, Model, planes_on
from engine_check.place import Place, median_ms, wall_ms
from engine_check.steps import greedy, one_slice, prompt
from llmctl.targets.base import RuntimeSizes

DECODES = ((1, 512), (64, 512), (32, 512), (16, 512), (8, 512), (128, 512), (1, 4096), (64, 4096))
"""(sequences, positions of each); the most telling first."""
PREFILLS = (8192, 2048, 512)
_SERVED_TOKENS = 64 * (512 + 256 + BLOCK)


def device_rates(nbytes: int = 2**30, matrix: int = 8192, device: str = "cuda") -> dict[str, float]:
    """Copy, read and bf16 matmul rates as the trial measures them, and pinned memory to the device, GB/s and TFLOP/s.

    Args:
        nbytes: of the copied buffer; reads are of twice as many. matrix: rows and columns of the product.
    """
    import torch

    a = torch.empty(nbytes, dtype=torch.uint8, device=device).random_()
    b = torch.empty_like(a)
    copy = _by_events(lambda: (b.copy_(a), a.copy_(b)), 4, 5)
    big = torch.rand(nbytes // 2, device=device)
    reads = min(_by_events(run, 4, 5) for run in (big.sum, big.max))
    x, y = (torch.randn(matrix, matrix, device=device, dtype=torch.bfloat16) for _ in range(2))
    z = torch.empty_like(x)
    torch.mm(x, y, out=z)
    product = _by_events(lambda: torch.mm(x, y, out=z), 5, 3)
    host = torch.empty(nbytes // 4, dtype=torch.uint8).pin_memory()
    part = a[: nbytes // 4]
    up = _by_events(lambda: part.copy_(host, non_blocking=True), 2, 3)
    return {
        "copy GB/s": 2 * nbytes / (copy / 2) / 1e6,
        "read GB/s": 2 * nbytes / reads / 1e6,
        "matmul TFLOP/s": 2 * matrix**3 / product / 1e9,
        "host to device GB/s": nbytes / 4 / up / 1e6,
        "memory GB": torch.cuda.mem_get_info()[1] / 1e9,
    }


def _by_events(run: Callable[[], Any], count: int, rounds: int) -> float:
    """Median milliseconds of what goes to torch's current stream, over rounds of so many, by events there."""
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def once() -> float:
        start.record()
        for _ in range(count):
            run()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / count

    return median_ms(once, rounds)[0]


class Opened:
    """A model with random weights on a device and its runtime, sized for everything that is measured of it."""

    def __init__(self, place: Place, model: Model, *, seqs: int = 128, room: int | None = None) -> None:
        """``room``: bytes that weights and KV cache may take; None: four fifths of what is free."""
        began = time.perf_counter()
        self.place, self.model = place, model
        self.planes = planes_on(model, place.device)
        place.synchronize()
        self.planes_seconds = time.perf_counter() - began
        length = model.graph.max_position
        wanted = max([b * (c + BLOCK) for b, c in DECODES if b <= seqs] + [_SERVED_TOKENS if seqs >= 64 else 0, length])
        blocks = -(-wanted // BLOCK)
        if room is None:
            room = _free_bytes(place)
        if room is not None:
            blocks = min(blocks, int(room * 0.8) // model.kv_bytes(BLOCK))
        began = time.perf_counter()
        sizes = RuntimeSizes(blocks, BLOCK, length, length - length % 512, seqs)
        self.runtime = place.open(model.graph, model.options, self.planes, sizes)
        place.synchronize()
        self.open_seconds = time.perf_counter() - began
        self.blocks = blocks

    def close(self) -> None:
        """Free everything."""
        self.runtime.close()
        del self.runtime
        self.planes.clear()
        self.place.free()


def _free_bytes(place: Place) -> int | None:
    if not place.real:
        return None
    import torch

    return int(torch.cuda.mem_get_info()[0])


def decode_case(opened: Opened, batch: int, context: int) -> dict[str, Any]:
    """One decode step of ``batch`` sequences of ``context`` positions, replayed.

    Raises:
        MemoryError: the KV cache does not hold them.
    """
    place, model = opened.place, opened.model
    if batch * -(-context // BLOCK) > opened.blocks:
        raise MemoryError(f"{batch} × {context} positions do not fit {opened.blocks} blocks")
    replay: Callable[[], Any] = opened.runtime.decode_replay(batch, context)
    count = 1
    if place.real:
        wall_ms(place, replay, 3)
        count = max(4, min(32, int(120 / wall_ms(place, replay, 2))))
    ms, spread = median_ms(lambda: wall_ms(place, replay, count), 5 if place.real else 1)
    nbytes = model.decode_bytes(batch, context)
    found = {"batch": batch, "context": context, "ms": ms, "spread": spread, "tok/s": batch / ms * 1e3}
    return {**found, "GB": nbytes / 1e9, "GB/s": nbytes / ms / 1e6}


def prefill_case(opened: Opened, tokens: int) -> dict[str, Any]:
    """One prompt in one step, from ``execute`` to its token."""
    place, model, runtime = opened.place, opened.model, opened.runtime
    plan = one_slice(prompt(tokens, model.graph.vocab_size), BLOCK)
    rounds = (2 if tokens > 4096 else 4) if place.real else 1
    found, hosts = [], []
    for i in range(rounds + (1 if place.real else 0)):
        place.synchronize()
        began = time.perf_counter()
        pending = runtime.execute(plan, greedy(1))
        host = time.perf_counter() - began
        pending.result()
        if i or rounds == 1:  # the first warms up
            found.append((time.perf_counter() - began) * 1e3)
            hosts.append(host * 1e3)
    ms = statistics.median(found)
    rate = model.prefill_flops(tokens) / ms / 1e9
    result = {"tokens": tokens, "ms": ms, "spread": (max(found) - min(found)) / 2 / ms, "tok/s": tokens / ms * 1e3}
    return {**result, "TFLOP/s": rate, "host ms": statistics.median(hosts)}


def launch_cost(opened: Opened, tokens: int = 48) -> dict[str, Any]:
    """Host microseconds a launch, of a step that no graph replays: a prompt, up to where ``execute`` returns."""
    runtime, place = opened.runtime, opened.place
    launches = list(runtime.step_launches(tokens, 1))
    plan = one_slice(prompt(tokens, opened.model.graph.vocab_size), BLOCK)
    found = []
    for _ in range(6 if place.real else 1):
        place.synchronize()
        began = time.perf_counter()
        pending = runtime.execute(plan, greedy(1))
        found.append((time.perf_counter() - began) * 1e6)
        pending.result()
    us = statistics.median(found[1:] or found)
    return {"tokens": tokens, "launches": len(launches), "host us": us, "host us a launch": us / max(1, len(launches))}


def launches_of_a_step(opened: Opened, batch: int) -> dict[str, Any]:
    """What a decode step launches: how often each entry."""
    names = list(opened.runtime.step_launches(batch, batch))
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return {"launches": len(names), "entries": counts}
