"""The targets that there are: the one list of them, and how a text or a manifest becomes one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llmctl.errors import UsageError
from llmctl.targets.base import Target, TargetName
from llmctl.targets.cpu import target as cpu
from llmctl.targets.cuda import target as cuda
from llmctl.targets.reference import target as reference


@dataclass(frozen=True)
class Room:
    """A target's room: how its targets are spelled, made of what stands behind the colon, and of a manifest's name."""

    spellings: tuple[str, ...]
    parse: Callable[[str], Target]
    named: Callable[[TargetName], Target]


ROOMS = {
    "cpu": Room(cpu.SPELLINGS, cpu.parse, cpu.named),
    "reference": Room(reference.SPELLINGS, reference.parse, reference.named),
    "cuda": Room(cuda.SPELLINGS, cuda.parse, cuda.named),
}


def parse_target(text: str) -> Target:
    """A ``--target``: ``cpu`` (what is best here), ``cpu:avx2,portable``, ``reference`` or ``cuda:sm_80,sm_90``.

    Raises:
        UsageError: anything else.
    """
    kind, _, archs = text.partition(":")
    if kind not in ROOMS:
        known = ", ".join(spelling for room in ROOMS.values() for spelling in room.spellings)
        raise UsageError(f"--target: expected one of {known}, found '{text}'", param="target")
    return ROOMS[kind].parse(archs)


def target_of(name: TargetName) -> Target:
    """The target that a manifest names.

    Raises:
        ValueError: a kind that this version does not have.
    """
    if name.kind not in ROOMS:
        raise ValueError(f"target.kind: expected one of {', '.join(ROOMS)}, found '{name.kind}'")
    return ROOMS[name.kind].named(name)
