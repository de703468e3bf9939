"""Who comes first: the API process, then the worker's threads that compute, then those that compile grammars."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from fixtures import ServerProcess

from llmctl.targets.table import parse_target

_ASKS = """
import os, threading
from llmctl.niceness import be_a_nice_thread, be_nice
ends, began = threading.Event(), []
ask = lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
thread = threading.Thread(target=lambda: (ends.wait(), began.append(ask())))
thread.start()
be_nice({more})
ends.set()
thread.join()
later = threading.Thread(target=lambda: began.append(ask()))
later.start()
later.join()
print(began, ask())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads have a niceness of their own on Linux")
@pytest.mark.parametrize("more", [0, 3])
def test_all_threads_and_later_ones_are_nicer(more: int) -> None:
    own = os.getpriority(os.PRIO_PROCESS, 0)
    said = subprocess.run([sys.executable, "-c", _ASKS.format(more=more)], capture_output=True, text=True, check=True)
    assert said.stdout.split("]") == [f"[{own + more}, {own + more}", f" {own + more}\n"]


@pytest.mark.skipif(sys.platform != "linux", reason="threads have a niceness of their own on Linux")
@pytest.mark.parametrize("worker", [0, 5, 12, 19])
def test_threads_that_compile_are_nicer_than_those_that_compute(worker: int) -> None:
    """Whatever the worker's: a thread of an ordinary user may become nicer alone."""
    compiles = """
import os, sys, threading
from llmctl.niceness import be_nice
from llmctl.structured import compiler
if os.geteuid() == 0:
    os.setuid(65534)  # without the right to be less nice
be_nice(int(sys.argv[1]))
pool = compiler.GrammarCompiler(lambda: None, 1, ())._pool
print(pool.submit(lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id())).result())
"""
    own = os.getpriority(os.PRIO_PROCESS, 0)
    command = [sys.executable, "-c", compiles, str(worker)]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    assert min(own + worker, 19) <= int(said.stdout) == min(own + worker + 3, 19)


def test_targets_that_compute_on_the_processors_say_so() -> None:
    assert {name: parse_target(name).niceness > 0 for name in ("cpu", "reference", "cuda:sm_90")} == {
        "cpu": True, "reference": True, "cuda:sm_90": False,
    }  # fmt: skip


def test_a_server_s_worker_is_nicer_unless_its_user_says_otherwise(server: ServerProcess, tiny_engine: Path) -> None:
    def more(process: ServerProcess) -> int:
        return psutil.Process(process.worker_pid).nice() - psutil.Process(process.process.pid).nice()

    assert more(server) == 5
    with ServerProcess("--model", str(tiny_engine), "--worker-nice", "1") as other:
        other.wait_ready()
        assert more(other) == 1
