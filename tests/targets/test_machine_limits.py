"""What this machine, and the limits on this process, leave to be taken."""

from __future__ import annotations

import resource

import psutil
import pytest

from llmctl.errors import HostMemoryError, UsageError
from llmctl.targets import address_space, machine


def set_limit(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (size, size))


def test_a_limit_on_address_space_bounds_what_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    free = machine.available_memory()
    used = psutil.Process().memory_info().vms
    set_limit(monkeypatch, used + machine.SPACE_ASIDE + (64 << 20))
    assert 0 < machine.available_memory() <= 64 << 20
    set_limit(monkeypatch, used + machine.SPACE_ASIDE // 2)
    assert machine.available_memory() == 0
    set_limit(monkeypatch, used // 2)
    assert machine.available_memory() == 0
    set_limit(monkeypatch, resource.RLIM_INFINITY)
    assert machine.available_memory() > free // 2


def test_too_small_a_limit_is_refused_with_both_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    set_limit(monkeypatch, 600 << 20)
    address_space.check_address_space()
    with pytest.raises(HostMemoryError, match="expected at least 1024 MiB, found 600 MiB"):
        address_space.check_address_space(address_space.LEAST_WITH_TORCH)
    set_limit(monkeypatch, address_space.LEAST_ADDRESS_SPACE - 1)
    with pytest.raises(HostMemoryError, match="expected at least 512 MiB, found 511 MiB"):
        address_space.check_address_space()


def test_threads_are_at_most_the_machines_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    for fine in (None, 1, 6):
        machine.check_threads(fine)
    for bad in (0, 7):
        with pytest.raises(UsageError, match=f"expected 1 to 6, this machine's processors, found {bad}"):
            machine.check_threads(bad)
