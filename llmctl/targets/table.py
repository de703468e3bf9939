"""The targets that there are: the one list of them, and how a text or a manifest becomes one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from llmctl.errors import UsageError
from llmctl.targets.base import Finding, Offer, Target, TargetName


@dataclass(frozen=True)
class Room:
    """A target's room: how its targets are spelled, made of what stands behind the colon, and of a manifest's name.

    ``offer``: whether a model that nobody names a target for should be built for it here; None never offers itself.
    ``findings``: what there is on this machine for it, and what is missing.
    """

    spellings: tuple[str, ...]
    parse: Callable[[str], Target]
    named: Callable[[TargetName], Target]
    offer: Callable[[], Offer | None] | None = None
    findings: Callable[[], Sequence[Finding]] = tuple


def _cpu() -> Room:
    from llmctl.targets.cpu import findings, target

    return Room(target.SPELLINGS, target.parse, target.named, target.offer, findings.findings)


def _reference() -> Room:
    from llmctl.targets.reference import target

    return Room(target.SPELLINGS, target.parse, target.named)


def _cuda() -> Room:
    from llmctl.targets.cuda import findings, readiness, target

    return Room(target.SPELLINGS, target.parse, target.named, readiness.offer, findings.findings)


class Rooms(Mapping[str, Room]):
    """Rooms by name, each imported when it is asked for: who serves an engine needs one of them."""

    def __init__(self, **enter: Callable[[], Room]) -> None:
        self._enter = enter

    def __getitem__(self, name: str) -> Room:
        """A room.

        Raises:
            KeyError: there is none of that name.
        """
        return self._enter[name]()

    def __iter__(self) -> Iterator[str]:
        """Their names."""
        return iter(self._enter)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._enter)

    def __contains__(self, name: object) -> bool:
        """Whether there is one of that name; none is imported for it."""
        return name in self._enter


ROOMS = Rooms(cpu=_cpu, reference=_reference, cuda=_cuda)
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


def machine_findings() -> dict[str, Sequence[Finding]]:
    """What every room says of this machine; rooms that say nothing are left out."""
    said = {name: room.findings() for name, room in ROOMS.items()}
    return {name: findings for name, findings in said.items() if findings}


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
