"""One option for each of several groups, of the least loss together that a budget pays: the multiple-choice knapsack.

By dynamic programming over the budget (Dudzinski and Walukiewicz, "Exact methods for the knapsack problem and its
generalizations", 1987). Costs are counted in units that depend on the options alone, never on the budget, so that a
larger budget never has a larger loss. The solution is exact where the costs' common divisor makes few enough units;
else costs are rounded up to a unit: what is chosen is affordable, and no worse than the best of a budget that is
smaller by a unit a group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MOST_UNITS = 2**16


@dataclass(frozen=True)
class Option:
    """What a choice costs and loses; both not negative."""

    cost: int
    loss: float


def choose(groups: Sequence[Sequence[Option]], budget: int, most_units: int = MOST_UNITS) -> list[int] | None:
    """The index of the option to take in each group; None where the cheapest of all cost more than the budget.

    Of equal losses the cheaper is taken.

    Args:
        most_units: units that the costs beyond the least are counted in.
    """
    least = [min(option.cost for option in group) for group in groups]
    if sum(least) > budget:
        return None
    extras = [[option.cost - low for option in group] for group, low in zip(groups, least, strict=True)]
    unit = _unit(extras, most_units)
    units = [[-(-extra // unit) for extra in group] for group in extras]
    limit = min((budget - sum(least)) // unit, sum(max(group) for group in units))
    best = np.zeros(limit + 1)
    taken: list[NDArray[np.uint8]] = []  # of every group, for every budget: wider indices are hundreds of MB
    for group, costs in zip(groups, units, strict=True):
        order = sorted(range(len(group)), key=lambda i: (costs[i], group[i].cost))
        trials = np.full((len(group), limit + 1), math.inf)
        for row, i in enumerate(order):
            if costs[i] <= limit:
                trials[row, costs[i] :] = best[: limit + 1 - costs[i]] + group[i].loss
        first = trials.argmin(axis=0)
        taken.append(np.array(order, np.uint8)[first])
        best = trials[first, np.arange(limit + 1)]
    left = int(best.argmin())
    chosen = []
    for costs, choices in zip(reversed(units), reversed(taken), strict=True):
        chosen.append(int(choices[left]))
        left -= costs[chosen[-1]]
    return chosen[::-1]


def _unit(extras: Sequence[Sequence[int]], most_units: int) -> int:
    divisor = math.gcd(*(extra for group in extras for extra in group)) or 1
    span = sum(max(group) for group in extras)
    return max(divisor, -(-span // most_units))
