"""Tasks one after the other in worker processes, each for a bounded time.

A worker keeps what it has opened from task to task. When it dies, hangs or loses its device, the task that did it is
reported in a line, and the tasks after it get a new worker: what one of them does costs the others nothing but that.
Results come over a pipe as they are found, so that none is lost with its worker.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

GRACE = 6.0
"""Seconds beyond its time after which a task is ended by force."""


class LeftOut(Exception):
    """A task cannot be done here; the message says why, and that is no failure."""


@dataclass(frozen=True)
class Task:
    """A piece of work.

    Attributes:
        seconds: the most it may take. least: it is not begun with less time left.
        worker: label; tasks in a row with the same one share a process.
    """

    name: str
    seconds: float
    least: float
    worker: str


class Budget:
    """Time that is left to a task."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds; negative when it is over."""
        return self._end - time.monotonic()

    def holds(self, seconds: float) -> bool:
        """Whether so many seconds are left."""
        return self.left >= seconds


Emit = Callable[[Sequence[str], Any], None]
"""Report a result: its path of keys, and the value."""
RunTask = Callable[[str, Budget, Emit], None]


@dataclass
class Report:
    """What came of all tasks: results by path, problems, tasks not done and why, seconds of each task."""

    results: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def put(self, path: Sequence[str], value: Any) -> None:
        """Keep a result."""
        place = self.results
        for key in path[:-1]:
            place = place.setdefault(key, {})
        place[path[-1]] = value


# ---- the worker's side -----------------------------------------------------------------------------------------------


def work(run: RunTask, orders: IO[str], events: IO[str], lost: Callable[[], bool] = lambda: False) -> None:
    """Carry out orders (a JSON line each) until there are no more.

    Args:
        lost: whether the device is, asked after a task has failed.
    """

    def send(event: dict[str, Any]) -> None:
        events.write(json.dumps(event, default=str) + "\n")
        events.flush()

    for line in orders:
        order = json.loads(line)
        end: dict[str, Any] = {"event": "end"}
        try:
            run(order["task"], Budget(order["seconds"]), lambda path, value: send({"path": list(path), "value": value}))
        except LeftOut as reason:
            end["left out"] = str(reason)
        except Exception as error:
            print("".join(traceback.format_exc(limit=-5)), file=sys.stderr, flush=True)
            end["problem"] = in_one_line(error)
            end["lost"] = lost()
        send(end)


def in_one_line(error: BaseException) -> str:
    """A type and a message, shortened."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".rstrip(": ")


# ---- the supervisor's side -------------------------------------------------------------------------------------------


class Worker:
    """A process that carries out orders; in a session of its own, so that all it started ends with it."""

    def __init__(self, command: Sequence[str]) -> None:
        """``command``: gets ``--events N``, the descriptor to write events to, and orders on its standard input."""
        reading, writing = os.pipe()
        self._process = subprocess.Popen(
            [*command, "--events", str(writing)], stdin=subprocess.PIPE, text=True, pass_fds=(writing,),
            start_new_session=True,
        )  # fmt: skip
        os.close(writing)
        self._pipe = reading
        self._rest = b""

    def order(self, task: Task, seconds: float) -> None:
        """Hand a task over."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"task": task.name, "seconds": seconds}) + "\n")
            self._process.stdin.flush()

    def event(self, deadline: float) -> dict[str, Any] | None:
        """The next event; None when the deadline passes or the worker ends first."""
        while b"\n" not in self._rest:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._pipe], [], [], left)[0]:
                return None
            more = os.read(self._pipe, 1 << 16)
            if not more:
                return None
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found

    def stop(self) -> str:
        """End it and all it started; how it had ended by itself, if it had."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        said = ""
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(0.5)
            said = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._pipe)
        return said


def supervise(
    tasks: Sequence[Task], command: Sequence[str], seconds: float, report: Report,
    changed: Callable[[Report], None] = lambda _: None,
) -> None:  # fmt: skip
    """Have all tasks done that there is time for.

    Args:
        command: starts a worker. seconds: for everything. changed: told whenever the report has grown.
    """
    end = time.monotonic() + seconds
    worker: Worker | None = None
    label = ""
    try:
        for task in tasks:
            left = end - time.monotonic()
            if left < task.least:
                report.left_out.append(f"{task.name}: no time left")
                changed(report)
                continue
            if worker is not None and task.worker != label:
                worker.stop()
                worker = None
            if worker is None:
                worker, label = Worker(command), task.worker
            if not _carried_out(worker, task, min(task.seconds, left), report, changed):
                worker = None
            changed(report)
    finally:
        if worker is not None:
            worker.stop()


def _carried_out(worker: Worker, task: Task, seconds: float, report: Report, changed: Callable[[Report], None]) -> bool:
    """Whether the worker can go on to another task."""
    began = time.monotonic()
    worker.order(task, seconds)
    try:
        while True:
            event = worker.event(began + seconds + GRACE)
            if event is None:
                overdue = time.monotonic() >= began + seconds + GRACE
                said = worker.stop()
                why = f"not done after {seconds:.0f} s, ended" if overdue else f"the worker died: {said}"
                report.problems.append(f"{task.name}: {why}")
                return False
            if "path" in event:
                report.put(event["path"], event["value"])
                changed(report)
                continue
            if "left out" in event:
                report.left_out.append(f"{task.name}: {event['left out']}")
            if "problem" in event:
                report.problems.append(f"{task.name}: {event['problem']}")
            if event.get("lost"):
                worker.stop()
                return False
            return True
    finally:
        report.seconds[task.name] = round(time.monotonic() - began, 1)
