#!/usr/bin/env python3
"""Asks /health for ever, each time on a connection of its own, as a supervisor does; in a process of its own, so that
what holds the attackers up does not count.

    python scripts/hostile/prober.py HOST PORT

A line for each probe: when it began (``time.monotonic``), seconds until the answer was whole, status (0: none), and
seconds by which this process woke late.
"""

from __future__ import annotations

import http.client
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

GAP_SECONDS = 0.05
PATIENCE_SECONDS = 20.0


@dataclass(frozen=True)
class Probe:
    """One look at /health."""

    at: float
    seconds: float
    status: int
    late: float

    @classmethod
    def parse(cls, line: str) -> Probe:
        """From a line of the prober."""
        at, seconds, status, late = line.split()
        return cls(float(at), float(seconds), int(status), float(late))


class Prober:
    """The process, and what it has seen."""

    def __init__(self, lines: IO[str]) -> None:
        self._lines = lines

    def probes(self) -> list[Probe]:
        """All so far."""
        self._lines.seek(0)
        return [Probe.parse(line) for line in self._lines.read().splitlines(keepends=True) if line.endswith("\n")]


@contextmanager
def probing(host: str, port: int) -> Iterator[Prober]:
    """A prober for the time of the context."""
    with tempfile.NamedTemporaryFile("r+") as lines, open(lines.name, "w") as written:
        process = subprocess.Popen([sys.executable, __file__, host, str(port)], stdout=written)
        try:
            yield Prober(lines)
        finally:
            process.kill()
            process.wait()


def probe(host: str, port: int) -> int:
    """Status of /health; 0 without an answer."""
    connection = http.client.HTTPConnection(host, port, timeout=PATIENCE_SECONDS)
    try:
        connection.request("GET", "/health")
        answer = connection.getresponse()
        answer.read()
        return answer.status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


def main(arguments: Sequence[str]) -> None:
    """For ever."""
    host, port = arguments[0], int(arguments[1])
    due = time.monotonic()
    while True:
        began = time.monotonic()
        status = probe(host, port)
        end = time.monotonic()
        print(f"{began:.4f} {end - began:.5f} {status} {began - due:.5f}", flush=True)
        due = time.monotonic() + GAP_SECONDS
        time.sleep(GAP_SECONDS)


if __name__ == "__main__":
    main(sys.argv[1:])
