"""What a process needs before it begins: address space, and torch where it runs on torch. Light imports only."""

from __future__ import annotations

import resource

from llmctl.errors import HostMemoryError
from llmctl.extras import require

LEAST_ADDRESS_SPACE = 512 << 20
"""Bytes of address space without which no command gets far."""
LEAST_WITH_TORCH = 1 << 30
"""The same for what runs on torch, whose libraries abort the process, or throw anything, when they cannot be mapped."""


def check_address_space(least: int = LEAST_ADDRESS_SPACE) -> None:
    """Refuse a limit on this process's address space in which not even its libraries fit: they would abort.

    Raises:
        HostMemoryError: below ``least`` bytes.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit < least:
        raise HostMemoryError(
            f"the limit on address space: expected at least {least >> 20} MiB, found {limit >> 20} MiB",
            fix="ulimit -v unlimited",
        )


def check_torch(what: str) -> None:
    """Refuse what runs on torch where torch does not.

    Args:
        what: needs it; a message begins with it.

    Raises:
        MissingPackageError: it is not installed.
        HostMemoryError: its libraries do not fit into this process's address space.
    """
    require("quantize", what)
    check_address_space(LEAST_WITH_TORCH)
