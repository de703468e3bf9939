"""The highest load that still meets its objectives: a bracket by doubling, then bisection of it.

Higher loads are taken to be no better: what is found is the first edge that the search meets.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

_MOST_DOUBLINGS = 12


@dataclass(frozen=True)
class Verdict:
    """Whether a load met the objectives.

    Attributes:
        settled: whether chance is ruled out at the level asked for; otherwise the figures alone decided.
        requests: how many it was decided from. missed: the objectives that were not met.
    """

    meets: bool
    settled: bool
    requests: int
    missed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trial:
    """A load that was tried."""

    load: float
    verdict: Verdict


@dataclass(frozen=True)
class Capacity:
    """What a search found.

    Attributes:
        highest: the highest load that met the objectives; None: none did.
        missed: the lowest load above it that did not; None: none was found.
        trials: in the order in which they were tried.
    """

    highest: float | None
    missed: float | None
    trials: tuple[Trial, ...]

    @property
    def resolution(self) -> float | None:
        """How far the lowest load that missed is above the highest that met, as a share of this."""
        if self.highest is None or self.missed is None:
            return None
        return self.missed / self.highest - 1

    @property
    def settled(self) -> bool:
        """Whether both ends of the bracket were decided beyond chance."""
        ends = [trial.verdict.settled for trial in self.trials if trial.load in (self.highest, self.missed)]
        return bool(ends) and all(ends)


class Search:
    """One search; ``found`` is what is known so far, so that an interrupted one is not lost.

    Args:
        judge: tries a load.
        resolution: the share by which the bracket's ends may differ in the end.
        whole: loads are whole numbers from 1 on (requests at once); else they are rates.
    """

    def __init__(self, judge: Callable[[float], Verdict], *, resolution: float, whole: bool) -> None:
        if not resolution > 0:
            raise ValueError(f"resolution: expected a share above 0, found {resolution}")
        self._judge, self._resolution, self._whole = judge, resolution, whole
        self._trials: list[Trial] = []
        self._met: float | None = None
        self._missed: float | None = None

    @property
    def found(self) -> Capacity:
        """What is known so far."""
        return Capacity(self._met, self._missed, tuple(self._trials))

    def run(self, start: float) -> Capacity:
        """Search from a load on, up while it meets the objectives and down while it does not."""
        self._bracket(start)
        while (middle := self._middle()) is not None:
            self._try(middle)
        return self.found

    def _bracket(self, start: float) -> None:
        load, going_up = start, None
        for _ in range(_MOST_DOUBLINGS + 1):
            met = self._try(load)
            if going_up is not None and met != going_up:
                return
            going_up = met
            if self._whole and load == 1 and not met:
                return
            load = load * 2 if met else load / 2
            if self._whole:
                load = max(1, math.floor(load))

    def _middle(self) -> float | None:
        """The load to try next; None when the bracket is as narrow as it should be, or there is none."""
        if self._met is None or self._missed is None or self._missed / self._met - 1 <= self._resolution:
            return None
        if not self._whole:
            return math.sqrt(self._met * self._missed)
        middle = math.floor((self._met + self._missed) / 2)
        return middle if middle > self._met else None

    def _try(self, load: float) -> bool:
        verdict = self._judge(load)
        self._trials.append(Trial(load, verdict))
        if verdict.meets:
            self._met = load if self._met is None else max(self._met, load)
        else:
            self._missed = load if self._missed is None else min(self._missed, load)
        return verdict.meets
