"""Memory and threads that are not there: one line and an exit code, of every command that runs or makes an engine."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

MIB = 1 << 20


def run(*args: str, address_space: int | None = None) -> tuple[int, str]:
    """Exit code and stderr of a command under ``ulimit -v``, bytes."""

    def limit() -> None:
        if address_space is not None:
            resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))

    done = subprocess.run(
        [sys.executable, "-m", "llmctl", *args],
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=limit,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return done.returncode, done.stderr


def error_line(stderr: str) -> str:
    """The only error, which is the last line."""
    assert "Traceback" not in stderr
    assert "terminate called" not in stderr
    (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert stderr.rstrip().endswith(line)
    return line


def commands(engine: Path) -> dict[str, list[str]]:
    offline = ["--model", str(engine), "--input-len", "8", "--output-len", "2"]
    return {
        "serve": ["serve", "--model", str(engine), "--port", "1"],
        "latency": ["bench", "latency", *offline, "--batch-size", "1"],
        "throughput": ["bench", "throughput", *offline, "--num-prompts", "1"],
    }


@pytest.mark.parametrize("name", ["serve", "latency", "throughput"])
@pytest.mark.parametrize("threads", [(os.cpu_count() or 1) + 1, 100_000])
def test_more_threads_than_processors_are_refused(tiny_engine: Path, name: str, threads: int) -> None:
    code, stderr = run(*commands(tiny_engine)[name], "--threads", str(threads))
    line = error_line(stderr)
    assert code == 2
    assert f"--threads: expected 1 to {os.cpu_count()}, this machine's processors, found {threads}" in line


@pytest.mark.parametrize("name", ["serve", "latency", "build"])
@pytest.mark.parametrize("mib", [pytest.param(200, marks=pytest.mark.slow), 700])
def test_too_little_address_space_is_one_line(
    tiny_engine: Path, tiny_llama: Path, tmp_path: Path, name: str, mib: int
) -> None:
    """200 MiB is too little for anything, 700 MiB for torch, which runs this engine and packs weights."""
    build = ["build", "--model", str(tiny_llama), "--target", "reference", "--output", str(tmp_path / "out")]
    args = {**commands(tiny_engine), "build": build}[name]
    if name == "serve":
        args = ["serve", "--model", str(tiny_engine), "--port", "18765"]
    code, stderr = run(*args, address_space=mib * MIB)
    line = error_line(stderr)
    assert code == 1
    assert f"the limit on address space: expected at least {512 if mib == 200 else 1024} MiB, found {mib} MiB" in line
    assert not (tmp_path / "out").exists()
