"""Whether one request more lets those that run keep their ITL deadlines, by the cost model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from llmctl.engine.request import Request
from llmctl.engine.step_cost import StepCost


class DecodeOutlook:
    """A step in which every request that was added decodes one token, but those that generate nothing.

    A request whose ITL deadline such a step would exceed even alone holds nobody up, nor itself: it cannot be helped.
    So where nobody decodes, anybody is admitted. Until the model knows anything, a step takes no time.

    Attributes:
        tightest: the least ITL deadline among them that can be kept, seconds; infinity: none.
    """

    def __init__(self, cost: StepCost, requests: Iterable[Request] = ()) -> None:
        each = cost.coefficients()
        self._base, self._row, self._context = each.base, each.decode_row, each.decode_context
        self._seconds = self._base
        self.tightest = math.inf
        for request in requests:
            self.add(request)

    def add(self, request: Request) -> None:
        """One more."""
        self._seconds += self._own(request)
        self.tightest = min(self.tightest, self._keepable(request))

    def admits(self, request: Request) -> bool:
        """Whether the step with this one more would keep the tightest deadline, its own included."""
        return self._seconds + self._own(request) <= min(self.tightest, self._keepable(request))

    def _own(self, request: Request) -> float:
        if request.pooling is not None:
            return 0.0
        return self._row + self._context * (len(request.token_ids) + 1)

    def _keepable(self, request: Request) -> float:
        itl = request.deadline.itl
        return math.inf if itl is None or self._base + self._own(request) > itl else itl


def admitting_prefixes(cost: StepCost, running: Sequence[Request], request: Request) -> list[bool]:
    """For each number of requests that run, from the front and from 0 to all: whether they admit one more."""
    outlook = DecodeOutlook(cost)
    admits = [outlook.admits(request)]
    for one in running:
        outlook.add(one)
        admits.append(outlook.admits(request))
    return admits
