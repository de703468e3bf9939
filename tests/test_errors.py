"""Errors on one line; exceptions that mean that memory or threads are spent, however a library says so."""

from __future__ import annotations

import pytest

from llmctl.errors import HostMemoryError, LlmctlError, resource_error


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


@pytest.mark.parametrize(
    ("found", "shown"),
    [
        ("two  spaces, é 🙂", "two  spaces, é 🙂"),
        ("a\n  b\r\tc", "a b c"),
        ("\x1b[31mred\0", r"\x1b[31mred\x00"),
        ("\ud800\udcff\u202e", r"\ud800\udcff\u202e"),
    ],
)
def test_what_is_quoted_neither_breaks_the_line_nor_is_obeyed(found: str, shown: str) -> None:
    error = LlmctlError(f"no '{found}'", fix=f"rm '{found}'")
    assert (error.message, error.fix) == (f"no '{shown}'", f"rm '{shown}'")
    str(error).encode()
