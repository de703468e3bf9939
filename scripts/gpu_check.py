"""``scripts/gpu_check.sh``: the CUDA kernels on this machine's GPU, first their results, then their speed."""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

NO_GPU = 3
REPOSITORY = Path(__file__).parent.parent
_ROUNDS = 9
_LAUNCHES = 24
"""Launches in one captured graph, at least: the clock's own cost is then far below a launch's."""
_TOLERANCE = 0.02
"""Largest error over the largest value: bfloat16 rounds at 0.004, and sums of thousands wander."""


@dataclass(frozen=True)
class Timing:
    """Microseconds a launch: the median of the rounds, and half the distance of their extremes over it."""

    us: float
    spread: float


@dataclass
class Row:
    """One line of the table; see gpu_cases.Case."""

    kernel: str
    shape: str
    rows: int
    us: float
    spread: float
    gb_s: float
    copy_share: float
    tflop_s: float
    matmul_share: float
    error: float | None = None
    others: dict[str, float] = field(default_factory=dict)  # baseline -> microseconds


def time_launches(run: Callable[[int], Any], copies: int) -> Timing:
    """Time ``run(0)``, ``run(1)``, … back to back, as one CUDA graph where they can be captured.

    Two launches of one copy are at least ``copies`` apart, so that nothing is found in L2 that a model would not find.
    """
    import torch

    launches = -(-max(_LAUNCHES, copies) // copies) * copies
    for i in range(copies):
        run(i)
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run(0)
    end.record()
    torch.cuda.synchronize()
    if start.elapsed_time(end) > 4.0:
        launches = max(copies, 4) if copies < 8 else copies
    replay = _captured(run, copies, launches)
    replay()
    found = []
    for _ in range(_ROUNDS):
        start.record()
        replay()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) * 1000 / launches)
    median = statistics.median(found)
    return Timing(median, (max(found) - min(found)) / 2 / median)


def _captured(run: Callable[[int], Any], copies: int, launches: int) -> Callable[[], None]:
    import torch

    def eager() -> None:
        for i in range(launches):
            run(i % copies)

    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            eager()
    except RuntimeError:  # an op that synchronises; timed as it is
        torch.cuda.synchronize()
        return eager
    return graph.replay


def device_rates() -> tuple[float, float]:
    """This device's copy bandwidth, GB/s of reads and writes, and bf16 matmul rate, TFLOP/s."""
    import torch

    source = [torch.empty(2**30, dtype=torch.uint8, device="cuda") for _ in range(2)]
    target = torch.empty_like(source[0])
    copied = time_launches(lambda i: target.copy_(source[i]), 2)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    product = time_launches(lambda _: torch.mm(a, b, out=out), 1)
    return 2 * 2**30 / copied.us / 1000, 2 * 8192**3 / product.us / 1e6


def measure(case: Any, machine: Any, copy: float, matmul: float) -> Row:
    """Check and time one case and what it is compared to."""
    from gpu_cases import nothing_lost

    prepared = case.make(machine, "cuda")
    error = None
    if prepared.result and prepared.expected:
        prepared.run(0)
        error = nothing_lost(prepared.result(), prepared.expected(0))
    timing = time_launches(prepared.run, prepared.copies)
    gb_s, tflop_s = case.nbytes / timing.us / 1000, case.flops / timing.us / 1e6
    others = {name: time_launches(run, prepared.copies).us for name, run in prepared.baselines.items()}
    return Row(
        case.kernel, case.shape, case.rows, timing.us, timing.spread, gb_s, gb_s / copy, tflop_s, tflop_s / matmul,
        error, others,
    )  # fmt: skip


def markdown(rows: list[Row], facts: dict[str, Any]) -> str:
    """The report."""
    lines = ["# CUDA kernels", ""]
    lines += [f"* {name}: {value}" for name, value in facts.items()]
    from gpu_targets import judge

    verdicts = {True: "reached", False: "MISSED", None: "unknown"}
    lines += ["", "| target (H200) | found | | expected on paper |", "|---|---|---|---|"]
    lines += [f"| {v.target.name} | {v.found} | {verdicts[v.reached]} | {v.target.expected} |" for v in judge(rows)]
    lines += [
        "",
        "Microseconds are medians over rounds of launches in a CUDA graph over rotating inputs; ± is half the rounds'"
        " range. A ratio above 1 means that the kernel is faster.",
        "",
        "| kernel | shape | rows | µs | ± | GB/s | of copy | TFLOP/s | of matmul | error | compared to |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        ratios = ", ".join(f"{us / row.us:.2f}× {name} ({us:.1f})" for name, us in row.others.items())
        error = "" if row.error is None else f"{row.error:.1e}"
        lines.append(
            f"| {row.kernel} | {row.shape} | {row.rows} | {row.us:.2f} | {row.spread:.1%} | {row.gb_s:.0f} |"
            f" {row.copy_share:.0%} | {row.tflop_s:.1f} | {row.matmul_share:.0%} | {error} | {ratios} |"
        )
    return "\n".join(lines) + "\n"


def run_tests(seconds: float) -> str:
    """tests/gpu, or why it did not run; "passed" and "failed" begin the answer."""
    if importlib.util.find_spec("pytest") is None:
        return "not run: pytest is not installed (the results in the table were checked all the same)"
    command = [
        sys.executable, "-m", "pytest", "-q", "-c", "/dev/null", "--rootdir", str(REPOSITORY), "-m", "not slow", "-o",
        f"pythonpath={REPOSITORY / 'tests'}", "-p", "no:cacheprovider", "--tb=short", str(REPOSITORY / "tests" / "gpu"),
    ]  # fmt: skip
    try:
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return f"not finished in {seconds:.0f} s"
    tail = [line for line in done.stdout.splitlines() if line.strip()]
    if done.returncode:
        print("\n".join(tail[-40:]), done.stderr[-2000:], file=sys.stderr)
    return f"{'failed' if done.returncode else 'passed'}: {tail[-1] if tail else done.stderr[-200:]}"


def main(argv: list[str] | None = None) -> int:
    """See ``gpu_check.sh``."""
    parser = argparse.ArgumentParser(prog="gpu_check.sh", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("."), help="folder for gpu_check.json and gpu_check.md")
    parser.add_argument("--seconds", type=float, default=500.0, help="time for everything")
    parser.add_argument("--no-tests", action="store_true", help="leave out tests/gpu")
    options = parser.parse_args(argv)
    began = time.monotonic()
    reason = _missing()
    if reason:
        print(f"gpu_check: no usable GPU: {reason}", file=sys.stderr)
        return NO_GPU
    return _check(options, began)


def _missing() -> str | None:
    try:
        from llmctl.targets.cuda.launch import missing_device
    except ImportError as error:
        return str(error)
    return missing_device()


def _check(options: argparse.Namespace, began: float) -> int:
    import torch
    from gpu_cases import all_cases
    from gpu_expert_cases import expert_cases

    from llmctl.checkpoint.resolve import cache_dir
    from llmctl.targets.cuda.compile import SOURCE_DIR
    from llmctl.targets.cuda.launch import compiled_machine

    torch.manual_seed(0)
    machine = compiled_machine(tuple(sorted(p.name for p in SOURCE_DIR.glob("*.cu"))), cache_dir() / "kernels")
    compiled = time.monotonic() - began
    tests = "left out" if options.no_tests else run_tests(options.seconds * 0.45)
    print(f"compiled in {compiled:.0f} s; tests/gpu {tests}", flush=True)
    copy, matmul = device_rates()
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "CUDA": torch.version.cuda,
        "copy": f"{copy:.0f} GB/s (reads and writes of a device copy)", "matmul": f"{matmul:.0f} TFLOP/s (bf16, 8192³)",
        "kernels compiled in": f"{compiled:.1f} s", "tests/gpu": tests,
    }  # fmt: skip
    rows: list[Row] = []
    failures = [f"tests/gpu {tests}"] if tests.startswith("failed") else []
    left_out = 0
    for case in (*all_cases(), *expert_cases()):
        if time.monotonic() - began > options.seconds:
            left_out += 1
            continue
        try:
            rows.append(measure(case, machine, copy, matmul))
        except Exception as error:  # one case must not cost the others their figures
            failures.append(f"{case.kernel} {case.shape}, {case.rows} rows: {' '.join(str(error).split())[:200]}")
            continue
        if rows[-1].error is not None and not rows[-1].error <= _TOLERANCE:
            failures.append(f"{case.kernel} {case.shape}, {case.rows} rows: error {rows[-1].error:.3g}")
        print(_line(rows[-1]), flush=True)
    facts |= {"cases": f"{len(rows)} measured, {left_out} left out for time", "failures": failures or "none"}
    facts["seconds"] = round(time.monotonic() - began)
    write_report(options.output, rows, facts)
    print(f"{len(rows)} cases, {len(failures)} failures, {left_out} left out; {options.output / 'gpu_check.md'}")
    return 1 if failures else 0


def _line(row: Row) -> str:
    shares = f"{row.copy_share:6.0%} of copy {row.matmul_share:6.0%} of matmul"
    return f"{row.kernel:18} {row.shape:48} {row.rows:6} {row.us:10.2f} us {shares}"


def write_report(folder: Path, rows: list[Row], facts: dict[str, Any]) -> None:
    """gpu_check.json and gpu_check.md in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu_check.json").write_text(
        json.dumps({"facts": facts, "rows": [asdict(row) for row in rows]}, indent=1)
    )
    (folder / "gpu_check.md").write_text(markdown(rows, facts))


if __name__ == "__main__":
    sys.exit(main())
