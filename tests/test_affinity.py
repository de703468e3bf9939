"""Which processors a process is kept to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from fixtures import ServerProcess
from hypothesis import given
from hypothesis import strategies as st

from llmctl.affinity import parse_cpus, run_on, written
from llmctl.config import ServeConfig
from llmctl.errors import UsageError
from llmctl.serving.config_check import check_config

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux keeps processes to processors")


@pytest.fixture
def many_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)


@pytest.mark.usefixtures("many_processors")
@pytest.mark.parametrize(
    ("text", "cpus"), [("0", (0,)), ("0-3,8", (0, 1, 2, 3, 8)), (" 5 , 1-2,2", (1, 2, 5)), ("63-63", (63,))]
)
def test_lists_are_read_as_taskset_writes_them(text: str, cpus: tuple[int, ...]) -> None:
    assert parse_cpus(text, "worker_cpus") == cpus


@given(st.sets(st.integers(0, 63), min_size=1))
def test_what_is_written_is_read_as_the_same(cpus: set[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "cpu_count", lambda: 64)
        assert parse_cpus(written(cpus), "worker_cpus") == tuple(sorted(cpus))
    assert written({0, 1, 2, 4, 6, 7}) == "0-2,4,6-7"


@pytest.mark.usefixtures("many_processors")
@pytest.mark.parametrize("text", ["", "a", "1,", "-1", "3-1", "1-2-3", "0x1", "٣", "9999999", "64", "0-64"])
def test_what_is_no_list_of_this_machine_s_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--worker-cpus: expected") as refused:
        parse_cpus(text, "worker_cpus")
    assert refused.value.param == "worker_cpus"


def test_all_threads_and_later_ones_are_kept_there() -> None:
    asks = """
import os, threading
from llmctl.affinity import run_on
ends, seen = threading.Event(), []
thread = threading.Thread(target=lambda: (ends.wait(), seen.append(os.sched_getaffinity(0))))
thread.start()
cpu = max(os.sched_getaffinity(0))
run_on((), "x")
run_on((cpu,), "x")
ends.set()
thread.join()
later = threading.Thread(target=lambda: seen.append(os.sched_getaffinity(0)))
later.start()
later.join()
assert seen == [{cpu}, {cpu}], seen
"""
    subprocess.run([sys.executable, "-c", asks], check=True)


def test_processors_that_a_cpuset_does_not_allow_are_refused() -> None:
    """The kernel leaves out in silence those that it does not give, and says nothing unless none is left."""
    everyone = os.sched_getaffinity(0)
    absent = max(everyone) + 1000
    try:
        for cpus in ((absent,), (min(everyone), absent)):
            with pytest.raises(UsageError, match=r"may not use all of them \(cpuset\)"):
                run_on(cpus, "worker_cpus")
    finally:
        run_on(tuple(everyone), "worker_cpus")  # every thread of this process


def test_processors_have_numbers_beyond_their_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2, 4, 6})
    assert parse_cpus("2,6", "worker_cpus") == (2, 6)


def test_more_threads_than_processors_are_refused() -> None:
    cpu = max(os.sched_getaffinity(0))
    check_config(ServeConfig(model="m", worker_cpus=str(cpu), threads=1))
    with pytest.raises(UsageError, match="--threads: expected at most 1, as many as --worker-cpus") as refused:
        check_config(ServeConfig(model="m", worker_cpus=str(cpu), threads=2))
    assert refused.value.param == "threads"


def test_a_server_s_worker_is_kept_to_its_processors(tiny_engine: Path) -> None:
    cpu = max(os.sched_getaffinity(0))
    with ServerProcess("--model", str(tiny_engine), "--worker-cpus", str(cpu)) as server:
        server.wait_ready()
        worker = psutil.Process(server.worker_pid)
        assert {tuple(os.sched_getaffinity(thread.id)) for thread in worker.threads()} == {(cpu,)}
        assert os.sched_getaffinity(server.process.pid) == os.sched_getaffinity(0)
