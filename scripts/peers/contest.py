"""What a contestant of the benchmark is: an engine with one kind of weights, and how it is installed and started."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path


class PeerError(Exception):
    """A contestant cannot be installed, prepared, started or measured; one line that says which and why."""


class StartError(PeerError):
    """A server ended before it was ready."""


_KINDS = {"avx2": "AVX2", "avx512_vnni": "AVX-512 VNNI", "avx512_bf16": "AVX-512 bf16", "amx_int8": "AMX"}


@dataclass(frozen=True)
class Cpu:
    """What of the processor decides which configurations are worth measuring.

    Attributes:
        vendor: ``AuthenticAMD``, ``GenuineIntel``; empty where it cannot be told.
        bf16: whether it multiplies bf16 numbers itself.
        kinds: of its instructions for such work, as a report names them.
    """

    vendor: str
    bf16: bool
    kinds: tuple[str, ...] = ()

    @classmethod
    def of(cls, cpuinfo: str) -> Cpu:
        """From the text of ``/proc/cpuinfo``."""
        fields: dict[str, str] = {}
        for line in cpuinfo.splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
        flags = set(fields.get("flags", "").split()) | set(fields.get("Features", "").split())
        kinds = tuple(shown for flag, shown in _KINDS.items() if flag in flags)
        return cls(fields.get("vendor_id", ""), bool(flags & {"avx512_bf16", "amx_bf16", "bf16"}), kinds)

    @classmethod
    def here(cls) -> Cpu:
        """This machine's."""
        return cls.of(Path("/proc/cpuinfo").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Setup:
    """What every contestant is given.

    Attributes:
        work: folder of virtual environments, models and logs; its models are made from one ``model`` only.
        model: what llmctl resolves to a checkpoint; every contestant serves this model.
        cores: the processors that servers are pinned to; each runs one thread on each.
        torch: requirement of the PyTorch that peers are installed with.
        pip_flags: further options of every ``pip install``.
        preload: libraries that are preloaded where a contestant gains by it, tcmalloc and the like.
    """

    work: Path
    model: str
    cores: tuple[int, ...]
    torch: str = "torch==2.13.0"
    pip_flags: tuple[str, ...] = ()
    preload: tuple[Path, ...] = ()

    @property
    def threads(self) -> int:
        """Threads a server may compute with."""
        return len(self.cores)

    @property
    def models(self) -> Path:
        """Folder of the models made for the contestants."""
        return self.work / "models"

    def venv(self, name: str) -> Path:
        """Folder of a virtual environment."""
        return self.work / name

    def binary(self, venv: str, name: str) -> str:
        """Path of a program of a virtual environment."""
        return str(self.venv(venv) / "bin" / name)


@dataclass(frozen=True)
class Install:
    """A throw-away virtual environment.

    Attributes:
        venv: its name below the work folder; contestants may share one.
        groups: what is installed, one ``pip install`` each, in order.
        unwanted: distributions removed afterwards.
        environment: variables of the installation, for what is compiled then.
        shown: distributions whose versions are reported; the first must be there for the installation to count.
    """

    venv: str
    groups: tuple[tuple[str, ...], ...]
    shown: tuple[str, ...]
    unwanted: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Launch:
    """How a server is started.

    Attributes:
        environment: variables set beside those of this process.
        ready: path that answers 200 once requests are served.
    """

    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    ready: str = "/health"


@dataclass(frozen=True)
class Contestant:
    """One engine with one kind of weights.

    Attributes:
        name: as ``--peers`` says it. title: as the table shows it.
        install: None for llmctl itself, which runs in this Python.
        prepare: makes the model's files unless they are there; returns their path.
        launch: the command line for that model on a port. plain: one that asks least of the processor, for where a
            server ends while it starts; None: there is no other.
    """

    name: str
    title: str
    install: Callable[[Setup], Install] | None
    prepare: Callable[[Setup], Path]
    launch: Callable[[Setup, Path, int], Launch]
    plain: Callable[[Setup, Path, int], Launch] | None = None
