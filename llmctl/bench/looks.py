"""When a comparison looks at what it has, and what each look may err: repeated looks must not add up to false alarms.

Looks are fixed before the first round. The error allowed in all is spent over them by Lan and DeMets' function of
Pocock's kind (Biometrika 70, 1983), ``alpha * ln(1 + (e - 1) t)`` at share ``t`` of the rounds. Each look gets what was
spent since the one before as its own error, so that all together err no more often than ``alpha`` whatever the looks
have in common (the union bound; a recursion over joint distributions would need these to be normal).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

FIRST_LOOK = 10
_GROWTH = 1.4


@dataclass(frozen=True)
class Looks:
    """The plan of looks: after which rounds, and with which share of error.

    Attributes:
        max_rounds: the last look is then. alpha: the error of all looks together.
        first: rounds before the first look; the others follow 1.4 times as far each.
    """

    max_rounds: int
    alpha: float
    first: int = FIRST_LOOK

    @property
    def rounds(self) -> tuple[int, ...]:
        """After how many rounds there is a look, the last one included."""
        found = []
        at = float(self.first)
        while at < self.max_rounds:
            found.append(math.ceil(at))
            at = max(at * _GROWTH, at + 1)
        if found and self.max_rounds - found[-1] < 0.2 * found[-1]:
            found.pop()  # too little would have come to it since
        return (*found, self.max_rounds)

    def error(self, rounds: int, *, final: bool = False) -> float:
        """What the look after so many rounds may err; ``final``: it is the last one, and may spend what is left.

        Raises:
            ValueError: no look is planned then.
        """
        earlier = [at for at in self.rounds if at < rounds]
        if not final and rounds not in self.rounds:
            raise ValueError(f"no look is planned after {rounds} rounds: expected one of {self.rounds}")
        spent = self._spent(earlier[-1]) if earlier else 0.0
        return (self.alpha if final else self._spent(rounds)) - spent

    def _spent(self, rounds: int) -> float:
        return self.alpha * math.log(1 + (math.e - 1) * min(1.0, rounds / self.max_rounds))
