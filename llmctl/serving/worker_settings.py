"""What a worker is told before there is a channel to it."""

from __future__ import annotations

from dataclasses import fields

import msgspec

from llmctl.affinity import parse_cpus
from llmctl.config import EngineOptions, ServeConfig

IDLE_SECONDS = 10.0
"""An idle worker reports at least this often."""
_SIGNS_PER_STALL = 4
"""An idle worker gives so many signs of life within ``stall_timeout``, at least."""


class Processors(msgspec.Struct, frozen=True):
    """What a worker gets of the processors: by how much it is nicer than the API process (None: the target's), and
    those it is kept to (none: all that the API process may use)."""

    nice: int | None = None
    cpus: tuple[int, ...] = ()

    @classmethod
    def of(cls, config: ServeConfig) -> Processors:
        """``--worker-nice`` and ``--worker-cpus``.

        Raises:
            UsageError: these are no processors of this machine.
        """
        cpus = () if config.worker_cpus is None else parse_cpus(config.worker_cpus, param="worker_cpus")
        return cls(config.worker_nice, cpus)


ALL_PROCESSORS = Processors()


class WorkerSettings(msgspec.Struct, frozen=True):
    """One JSON line on the worker's stdin.

    ``channel`` is the descriptor of the worker's end of the channel; ``idle_seconds``: see ``EngineLoop``.
    """

    config: EngineOptions
    channel: int
    parent_pid: int
    log_level: str = "info"
    idle_seconds: float = IDLE_SECONDS
    processors: Processors = ALL_PROCESSORS


def engine_options(config: EngineOptions) -> EngineOptions:
    """What of a server's configuration its worker is told."""
    return EngineOptions(**{f.name: getattr(config, f.name) for f in fields(EngineOptions)})


def idle_seconds(stall_timeout: float) -> float:
    """How often an idle worker gives a sign of life, where none for ``stall_timeout`` seconds means that it stalls."""
    return min(IDLE_SECONDS, stall_timeout / _SIGNS_PER_STALL)
