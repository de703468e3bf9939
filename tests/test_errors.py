"""Exceptions that mean that memory or threads are spent, however a library says so."""

from __future__ import annotations

import pytest

from llmctl.errors import HostMemoryError, resource_error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "out of memory"),
        (MemoryError("Unable to allocate 4.00 MiB"), "out of memory: Unable to allocate 4.00 MiB"),
        (ImportError("libx.so: failed to map segment from shared object"), "out of memory: libx.so: failed to map"),
        (RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory"), "out of memory: [enforce]"),
        (RuntimeError("std::bad_alloc"), "out of memory: std::bad_alloc"),
        (RuntimeError("can't start new thread"), "no more threads: can't start new thread"),
        (OSError(12, "Cannot allocate memory"), "out of memory: [Errno 12] Cannot allocate memory"),
    ],
)
def test_what_is_spent_is_said(error: Exception, said: str) -> None:
    found = resource_error(error)
    assert isinstance(found, HostMemoryError)
    assert found.message.startswith(said)
    assert (found.exit_code, found.fix is not None) == (1, True)


@pytest.mark.parametrize("error", [ImportError("No module named 'x'"), RuntimeError("a shape"), ValueError("bad")])
def test_other_faults_stay_what_they_are(error: Exception) -> None:
    assert resource_error(error) is None
