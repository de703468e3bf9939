"""What a worker is told before there is a channel to it."""

from __future__ import annotations

from dataclasses import fields

import msgspec

from llmctl.config import EngineOptions

IDLE_SECONDS = 10.0
"""An idle worker reports at least this often."""
_SIGNS_PER_STALL = 4
"""An idle worker gives so many signs of life within ``stall_timeout``, at least."""


class WorkerSettings(msgspec.Struct, frozen=True):
    """One JSON line on the worker's stdin.

    ``channel`` is the descriptor of the worker's end of the channel; ``idle_seconds``: see ``EngineLoop``; ``nice``: of
    its threads, more than the API process; None: the target's.
    """

    config: EngineOptions
    channel: int
    parent_pid: int
    log_level: str = "info"
    idle_seconds: float = IDLE_SECONDS
    nice: int | None = None


def engine_options(config: EngineOptions) -> EngineOptions:
    """What of a server's configuration its worker is told."""
    return EngineOptions(**{f.name: getattr(config, f.name) for f in fields(EngineOptions)})


def idle_seconds(stall_timeout: float) -> float:
    """How often an idle worker gives a sign of life, where none for ``stall_timeout`` seconds means that it stalls."""
    return min(IDLE_SECONDS, stall_timeout / _SIGNS_PER_STALL)
