"""Part ``gaps``: when the device is idle, from traces of its kernels.

The profiler's library must be up before the graphs that it is to see are captured, so a worker of its own does this,
after everything was timed without it. What kernels take in a trace is held against a step's time untraced, for tracing
makes the gaps longer; those between steps come from a trace of the engine at work.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Span = tuple[float, float, str]
"""Start and duration in microseconds, name."""
_KINDS = ("kernel", "gpu_memcpy", "gpu_memset")


def warm_up() -> None:
    """Bring the profiler up."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]):
        torch.zeros(8, device="cuda").add_(1)
        torch.cuda.synchronize()


def trace(run: Callable[[], Any]) -> list[Span]:
    """Everything that the device did meanwhile, in order of time."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        prof.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return sorted(
        (float(e["ts"]), float(e["dur"]), str(e["name"]))
        for e in events
        if e.get("ph") == "X" and e.get("cat") in _KINDS
    )


def gaps(spans: Sequence[Span]) -> list[float]:
    """Microseconds in which nothing ran, between the first start and the last end; overlaps have none."""
    found, end = [], None
    for start, duration, _ in spans:
        if end is not None:
            found.append(max(0.0, start - end))
        end = start + duration if end is None else max(end, start + duration)
    return found


def busy(spans: Sequence[Span]) -> float:
    """Microseconds in which something ran."""
    return span(spans) - sum(gaps(spans)) if spans else 0.0


def span(spans: Sequence[Span]) -> float:
    """Microseconds from the first start to the last end."""
    return max(s + d for s, d, _ in spans) - spans[0][0] if spans else 0.0


def replay_gaps(spans: Sequence[Span], replays: int) -> dict[str, Any]:
    """Of a trace of replays that were waited for one by one.

    Raises:
        ValueError: no kernels, or not as many in each replay.
    """
    if not spans or len(spans) % replays:
        raise ValueError(f"{len(spans)} kernels traced in {replays} replays")
    each = len(spans) // replays
    steps = [spans[i * each : (i + 1) * each] for i in range(replays)]
    run = sum(busy(step) for step in steps) / replays
    inside = sum(sum(gaps(step)) for step in steps) / replays
    found = {"kernels": each, "busy us": run, "gap us in the trace": inside}
    return {**found, "us by kernel": by_name(spans, replays)}


def by_name(spans: Sequence[Span], steps: int, most: int = 14) -> dict[str, float]:
    """Microseconds a step by kernel, the longest first."""
    total: dict[str, float] = {}
    for _, duration, name in spans:
        short = name.split("<")[0].split("(")[0].removeprefix("void ")[:56]
        total[short] = total.get(short, 0.0) + duration
    ordered = sorted(total.items(), key=lambda item: -item[1])
    return {name: round(us / steps, 2) for name, us in ordered[:most]}


def engine_gaps(spans: Sequence[Span], steps: int) -> dict[str, Any]:
    """Of a trace of ``steps`` decode steps of the engine.

    Where one step ends and the next begins the trace does not tell: the largest gaps, one fewer than the steps, are
    taken for those between steps, which no other choice of as many exceeds.
    """
    if not spans:
        raise ValueError("no kernels traced")
    found, whole = gaps(spans), span(spans)
    between = sum(sorted(found, reverse=True)[: steps - 1])
    return {
        "steps": steps, "us a step": whole / steps, "idle share": sum(found) / whole, "between steps": between / whole,
        "longest gap us": max(found, default=0.0),
    }  # fmt: skip
