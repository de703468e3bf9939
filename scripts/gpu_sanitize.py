"""``scripts/gpu_check.sh --sanitize``: tests/gpu under compute-sanitizer, several runs at once.

memcheck runs all tests; racecheck and synccheck those of kernels whose threads share memory or wait for each other. A
run is one test module under one tool. Exit codes: 0 clean, 1 an error, a failed test or a run that did not finish, 3 no
compute-sanitizer or no usable GPU here.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

NOT_HERE = 3
REPOSITORY = Path(__file__).resolve().parent.parent
_EMULATION = REPOSITORY / "tests" / "targets" / "cuda" / "emulation"
_SHARING = (
    "attention_decode", "attention_prefill", "gemm_stream", "gemm_tile", "logits_kernels", "lora_kernels",
    "norm_kernels", "quantize_rows_kernels", "sampling_kernels",
)  # fmt: skip
"""Test modules of kernels with shared memory, barriers or counters between blocks."""
_LONGEST_FIRST = ("attention_prefill", "attention_decode", "gemm_tile", "gemm_stream")
_SUMMARIES = (r"ERROR SUMMARY: (\d+) error", r"RACECHECK SUMMARY: (\d+) hazard")
_KEPT_LINES = 12


@dataclass(frozen=True)
class Run:
    """One test module under one tool. ``module``: a test file's name without ``test_``."""

    tool: str
    module: str


@dataclass(frozen=True)
class Found:
    """What a run said: tests passed, errors (hazards, failed tests), and the lines that tell; None: not finished."""

    run: Run
    tests: int
    errors: int | None
    lines: tuple[str, ...] = ()


def modules() -> list[str]:
    """The modules that tests/gpu takes over, the longest first."""
    source = (REPOSITORY / "tests" / "gpu" / "test_gpu_kernels.py").read_text()
    left_out = set(re.findall(r'"test_(\w+)"', source.partition("NOT_HERE = (")[2].partition(")")[0]))
    found = sorted(path.stem.removeprefix("test_") for path in _EMULATION.glob("test_*.py"))
    names = [name for name in found if name not in left_out]
    return sorted(names, key=lambda name: (name not in _LONGEST_FIRST, name))


def runs(tools: Sequence[str]) -> list[Run]:
    """Every run, tool by tool."""
    return [Run(tool, name) for tool in tools for name in modules() if tool == "memcheck" or name in _SHARING]


def find_sanitizer(environment: Mapping[str, str]) -> str | None:
    """compute-sanitizer on the path, or in a CUDA toolkit where toolkits lie."""
    roots = [environment.get("CUDA_HOME"), environment.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [environment.get("PATH", ""), *(str(Path(root) / "bin") for root in roots if root)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def command(sanitizer: str, run: Run) -> list[str]:
    """What is executed for a run."""
    tests = [
        sys.executable, "-m", "pytest", "-q", "-c", "/dev/null", "--rootdir", str(REPOSITORY), "-m", "not slow", "-o",
        f"pythonpath={REPOSITORY / 'tests'}", "-p", "no:cacheprovider", "-W", "ignore", "--tb=line",
        str(REPOSITORY / "tests" / "gpu" / "test_gpu_kernels.py"), "-k", f"__{run.module}",
    ]  # fmt: skip
    return [sanitizer, "--tool", run.tool, "--print-limit", "20", *tests]


def read(run: Run, text: str) -> Found:
    """A run's own summary, and pytest's."""
    summaries = [int(number) for pattern in _SUMMARIES for number in re.findall(pattern, text)]
    tests = " ".join(line for line in text.splitlines() if re.search(r" in [\d.:]+s", line))  # pytest's last word
    passed = sum(int(number) for number in re.findall(r"(\d+) passed", tests))
    failed = sum(int(number) for number in re.findall(r"(\d+) (?:failed|error)", tests))
    telling = [line for line in text.splitlines() if re.match(r"=========\s+\S|FAILED|ERROR|E  ", line)]
    if not summaries or not passed + failed:
        return Found(run, passed, None, tuple(text.splitlines()[-_KEPT_LINES:]))
    errors = sum(summaries) + failed
    return Found(run, passed, errors, tuple(telling[:_KEPT_LINES]) if errors else ())


def execute(sanitizer: str, run: Run, deadline: float) -> Found:
    """Carry a run out, ended at the deadline (of the monotonic clock)."""
    left = deadline - time.monotonic()
    if left <= 0:
        return Found(run, 0, None, ("not begun: no time left",))
    with tempfile.TemporaryFile("w+") as output:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
        process = subprocess.Popen(
            command(sanitizer, run), stdout=output, stderr=subprocess.STDOUT, cwd=REPOSITORY, env=environment,
            start_new_session=True,
        )  # fmt: skip
        try:
            process.wait(left)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return Found(run, 0, None, ("not finished in time",))
        output.seek(0)
        return read(run, output.read())


def report(found: Sequence[Found]) -> str:
    """A line a tool, and below it the lines of every run that was not clean."""
    lines = []
    for tool in dict.fromkeys(f.run.tool for f in found):
        own = [f for f in found if f.run.tool == tool]
        unfinished = sum(f.errors is None for f in own)
        errors = sum(f.errors or 0 for f in own)
        tail = f", {unfinished} of {len(own)} runs not finished" if unfinished else ""
        lines.append(f"{tool}: {sum(f.tests for f in own)} tests, {errors} errors{tail}")
        for f in own:
            if f.errors != 0:
                lines += [f"  {f.run.module}:", *(f"    {line}" for line in f.lines)]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(prog="gpu_check.sh --sanitize", description=__doc__)
    parser.add_argument("--seconds", type=float, default=240.0, help="time for everything (default: %(default)g)")
    parser.add_argument("--jobs", type=int, default=8, help="runs at once (default: %(default)d)")
    parser.add_argument("--tools", default="racecheck,synccheck,memcheck", help="(default: %(default)s)")
    options = parser.parse_args(argv)
    deadline = time.monotonic() + options.seconds
    sanitizer = find_sanitizer(os.environ)
    if sanitizer is None:
        print("gpu_check --sanitize: compute-sanitizer is missing: it comes with the CUDA toolkit", file=sys.stderr)
        return NOT_HERE
    from llmctl.targets.cuda.launch import missing_device

    reason = missing_device()
    if reason is not None:
        print(f"gpu_check --sanitize: no usable GPU: {reason}", file=sys.stderr)
        return NOT_HERE
    with ThreadPoolExecutor(options.jobs) as pool:
        found = list(pool.map(lambda run: execute(sanitizer, run, deadline), runs(options.tools.split(","))))
    print(report(found))
    return 0 if all(f.errors == 0 for f in found) else 1


if __name__ == "__main__":
    sys.exit(main())
