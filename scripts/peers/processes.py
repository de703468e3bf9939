"""A server under test as a tree of processes: started, awaited, its peak memory and processor time, and stopped."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from peers.contest import Launch, PeerError, StartError

_POLL = 0.02
_STOP_GRACE = 30.0


@dataclass(frozen=True)
class Running:
    """A server that answers. ``start_seconds``: from its start to the first 200 of its readiness path."""

    url: str
    process: subprocess.Popen[bytes]
    start_seconds: float

    def tree(self) -> list[psutil.Process]:
        """Its processes that are alive."""
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.process.pid)
            return [root, *root.children(recursive=True)]
        return []

    def peak_memory(self) -> int:
        """Sum of the peak resident bytes (VmHWM) of every process alive."""
        return sum(_peak(process.pid) for process in self.tree())

    def cpu_seconds(self) -> float:
        """Processor time of every process alive so far."""
        total = 0.0
        for process in self.tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total


def _peak(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    return peak_from_status(text)


def peak_from_status(text: str) -> int:
    """VmHWM of a ``/proc/PID/status`` in bytes; 0 for a process that has ended (it shows none)."""
    line = next((line for line in text.splitlines() if line.startswith("VmHWM:")), "VmHWM: 0 kB")
    return int(line.split()[1]) * 1024


@contextlib.contextmanager
def serving(launch: Launch, port: int, cores: Sequence[int], log: Path, patience: float) -> Iterator[Running]:
    """The server, pinned to ``cores``, from ready to stopped with all its children.

    Raises:
        StartError: it ended before it was ready.
        PeerError: it was not ready within ``patience`` seconds.
    """
    url = f"http://127.0.0.1:{port}"
    with log.open("ab") as output:
        start = time.perf_counter()
        process = subprocess.Popen(
            launch.argv,
            env=_environment() | dict(launch.environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
    try:
        _await(process, url + launch.ready, patience, log)
        yield Running(url, process, time.perf_counter() - start)
    finally:
        _stop(process)


def _environment() -> dict[str, str]:
    """This process's, less a thread count meant for it: servers are told theirs in their own ways."""
    return {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}


def _await(process: subprocess.Popen[bytes], url: str, patience: float, log: Path) -> None:
    deadline = time.perf_counter() + patience
    while not _answers(url):
        if process.poll() is not None:
            raise StartError(f"the server ended with code {process.returncode} before it was ready (log: {log})")
        if time.perf_counter() > deadline:
            raise PeerError(f"the server was not ready within {patience:.0f} s (log: {log})")
        time.sleep(_POLL)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server's whole session: children that outlive it would take the next one's processors."""
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@dataclass(frozen=True)
class CpuTimes:
    """Seconds summed over all processors since the machine started; ``stolen`` went to other virtual machines."""

    wall: float
    busy: float
    stolen: float

    @classmethod
    def now(cls) -> CpuTimes:
        """A reading."""
        times = psutil.cpu_times()
        stolen = float(getattr(times, "steal", 0.0))
        idle = times.idle + float(getattr(times, "iowait", 0.0))
        guest = float(getattr(times, "guest", 0.0)) + float(getattr(times, "guest_nice", 0.0))
        return cls(time.perf_counter(), sum(times) - guest - idle - stolen, stolen)


@dataclass(frozen=True)
class Busyness:
    """How much of the machine others took in an interval: shares of all processors, 0 to 1."""

    others: float
    stolen: float


def busyness(before: CpuTimes, after: CpuTimes, ours: float, processors: int) -> Busyness:
    """Shares of the interval that went to other processes and to other machines.

    Args:
        ours: processor seconds of the server and the load generator in that interval.
    """
    capacity = max(after.wall - before.wall, 1e-9) * processors
    return Busyness(
        others=max(0.0, (after.busy - before.busy - ours) / capacity),
        stolen=max(0.0, (after.stolen - before.stolen) / capacity),
    )
