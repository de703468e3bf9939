"""The targets that there are: the one list of them, and how a text or a manifest becomes one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llmctl.errors import UsageError
from llmctl.targets.base import Offer, Target, TargetName
from llmctl.targets.cpu import target as cpu
from llmctl.targets.cuda import readiness
from llmctl.targets.cuda import target as cuda
from llmctl.targets.reference import target as reference


@dataclass(frozen=True)
class Room:
    """A target's room: how its targets are spelled, made of what stands behind the colon, and of a manifest's name.

    ``offer``: whether a model that nobody names a target for should be built for it here; None never offers itself.
    """

    spellings: tuple[str, ...]
    parse: Callable[[str], Target]
    named: Callable[[TargetName], Target]
    offer: Callable[[], Offer | None] | None = None


ROOMS = {
    "cpu": Room(cpu.SPELLINGS, cpu.parse, cpu.named, cpu.offer),
    "reference": Room(reference.SPELLINGS, reference.parse, reference.named),
    "cuda": Room(cuda.SPELLINGS, cuda.parse, cuda.named, readiness.offer),
}
BEST_FIRST = ("cuda", "cpu")
"""The rooms that are asked for an offer, in this order."""


@dataclass(frozen=True)
class DefaultTarget:
    """The ``--target`` that "auto" means on this machine; ``said``: lines for the terminal about the choice."""

    spelling: str
    said: tuple[str, ...] = ()


def default_target() -> DefaultTarget:
    """This machine's best: the first room that offers itself and lacks nothing."""
    said: list[str] = []
    for name in BEST_FIRST:
        ask = ROOMS[name].offer
        offer = None if ask is None else ask()
        if offer is None:
            continue
        if offer.missing:
            said.append(f"warning: {offer.missing}")
            continue
        if said:
            said[-1] += f"; building for the target {offer.spelling} instead"
        elif offer.said:
            said.append(offer.said)
        return DefaultTarget(offer.spelling, tuple(said))
    raise AssertionError("every machine has a CPU")


def parse_target(text: str) -> Target:
    """A ``--target``: ``cpu``, ``cpu:avx2,portable``, ``cuda``, ``cuda:sm_80,sm_90`` or ``reference``.

    A kind alone is what is best on this machine.

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
