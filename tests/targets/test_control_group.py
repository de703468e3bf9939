"""Limits of control groups: the tightest from the process's own group up to the root holds."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from llmctl.targets import control_group, machine

GROUP = {
    "memory.max": "1000000\n",
    "memory.current": "900000\n",
    "memory.stat": "anon 1\ninactive_file 300000\nactive_file 5\n",
    "cpu.max": "150000 100000\n",
}


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A process in the group ``a.slice/b.service``, without limits yet."""
    (tmp_path / "root" / "a.slice" / "b.service").mkdir(parents=True)
    (tmp_path / "membership").write_text("1:cpu:/\n0::/a.slice/b.service\n")
    monkeypatch.setattr(control_group, "ROOT", tmp_path / "root")
    monkeypatch.setattr(control_group, "MEMBERSHIP", tmp_path / "membership")
    return tmp_path / "root"


def write(group: Path, **changed: str) -> None:
    for name, text in {**GROUP, **{k.replace("_", ".", 1): v for k, v in changed.items()}}.items():
        (group / name).write_text(text)


def test_without_limits_there_are_none(groups: Path) -> None:
    assert (control_group.memory_left(), control_group.cpu_quota()) == (None, None)
    write(groups / "a.slice", memory_max="max\n", cpu_max="max 100000\n")
    assert (control_group.memory_left(), control_group.cpu_quota()) == (None, None)


@pytest.mark.parametrize("where", ["", "a.slice", "a.slice/b.service"])
def test_a_limit_anywhere_above_holds(groups: Path, where: str) -> None:
    write(groups / where)
    assert control_group.memory_left() == 400_000  # what the kernel would drop first counts as free
    assert control_group.cpu_quota() == 1.5


def test_the_tightest_of_several_holds(groups: Path) -> None:
    write(groups)
    write(groups / "a.slice", memory_max="950000\n", cpu_max="300000 100000\n")
    write(groups / "a.slice/b.service", memory_max="max\n", cpu_max="50000 100000\n")
    assert control_group.memory_left() == 350_000
    assert control_group.cpu_quota() == 0.5


def test_nothing_is_left_rather_than_less(groups: Path) -> None:
    write(groups, memory_max="100\n")
    assert control_group.memory_left() == 0


@pytest.mark.parametrize("membership", ["", "4:memory:/x\n", "0::/../../elsewhere\n"])
def test_a_group_that_cannot_be_seen_counts_as_the_root(groups: Path, membership: str) -> None:
    control_group.MEMBERSHIP.write_text(membership)
    write(groups)
    assert control_group.cpu_quota() == 1.5


@pytest.mark.usefixtures("groups")
def test_without_control_groups_there_are_no_limits() -> None:
    control_group.MEMBERSHIP.unlink()
    assert (control_group.memory_left(), control_group.cpu_quota()) == (None, None)


def test_the_machine_is_what_the_group_allows(groups: Path) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    assert machine.usable_cores() == cores
    write(groups, cpu_max="150000 100000\n")
    assert machine.usable_cores() == machine.physical_cores() == 1
    write(groups, cpu_max="30000 100000\n")
    assert machine.usable_cores() == 1
    write(groups, cpu_max=f"{cores + 1}00000 100000\n")
    assert machine.usable_cores() == cores
    assert machine.available_memory() == 400_000
    write(groups, memory_max=f"{2 * psutil.virtual_memory().total}\n")
    assert machine.available_memory() > 400_000
