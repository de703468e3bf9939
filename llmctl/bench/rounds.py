"""Rounds of a comparison: A, B, B, A and then B, A, A, B, the same work each time.

In a round each side is early as often as it is late, so that whatever drifts steadily while it is played (a processor
that warms up, a neighbour that comes) is in both sides alike. A server that is started here is started anew for each
stretch of its visits: what chance gives one process (where its memory lies, which page is huge) is noise of a round
then, and no lasting difference between the sides; and at no time do two servers share the machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count, groupby
from typing import Any

from llmctl.bench import metrics
from llmctl.bench.client import Target
from llmctl.bench.endpoint import make_endpoint
from llmctl.bench.local_tokenizer import local_counter
from llmctl.bench.progress import Progress
from llmctl.bench.serve import connect, find_counter, run_once, warm_up
from llmctl.bench.serve_plan import Plan, make_items
from llmctl.bench.sides import Side
from llmctl.bench.workloads import TokenCounter

ORDERS = ("ABBA", "BAAB")


@dataclass(frozen=True)
class Visit:
    """The load once on one side, ``a`` or ``b``: when, the figures of the run, and what failed."""

    side: str
    date: str
    figures: dict[str, Any]
    failures: list[dict[str, Any]]

    @property
    def failed_ratio(self) -> float:
        """Share of its requests that failed."""
        return float(self.figures["failed_ratio"])


@dataclass(frozen=True)
class Round:
    """Two visits a side, in the order that they were played in. ``busy_before``: share of the processors that others
    used before it."""

    order: str
    busy_before: float
    visits: tuple[Visit, ...]

    def of(self, side: str) -> list[Visit]:
        """The visits of one side."""
        return [visit for visit in self.visits if visit.side == side]

    def log_mean(self, side: str, metric: str) -> float | None:
        """Mean of the logarithms of a side's two visits; None where one has no positive value."""
        values = [visit.figures.get(metric) for visit in self.of(side)]
        if not all(isinstance(value, int | float) and 0 < value < math.inf for value in values):
            return None
        return math.fsum(math.log(float(value)) for value in values if value is not None) / len(values)

    def log_ratio(self, metric: str) -> float | None:
        """Logarithm of B's value over A's, means of two visits; None where a visit has no positive value."""
        a, b = (self.log_mean(side, metric) for side in ("a", "b"))
        return None if a is None or b is None else b - a


class FailedRequestsError(Exception):
    """A visit in which more requests failed than are allowed; it carries the visits of its round so far."""

    def __init__(self, visits: Sequence[Visit]) -> None:
        figures, failures = visits[-1].figures, visits[-1].failures
        first = "".join(f": {row['messages'][0]}" for row in failures[:1])
        super().__init__(f"{figures['failed']} of {figures['failed'] + figures['completed']} requests failed{first}")
        self.visits = tuple(visits)


class Player:
    """Plays rounds, and keeps what it learnt of the sides: the model that each is asked for, and its version."""

    def __init__(self, plan: Plan, a: Side, b: Side, progress: Progress) -> None:
        self.sides = {"a": a, "b": b}
        self.models: dict[str, str] = {}
        self.versions: dict[str, str | None] = {}
        self._plan, self._progress = plan, progress
        self._streams = count()  # other words in every visit: no cache of prefixes knows them
        self._counter: TokenCounter | None = None
        self.counted_by: str | None = None

    def play(self, number: int) -> Round:
        """The round of that number, counted from 0.

        Raises:
            FailedRequestsError: a visit's requests failed; the round ends there.
            LlmctlError: a side cannot be reached, started or ended.
        """
        import psutil

        order = ORDERS[number % 2]
        busy = psutil.cpu_percent(interval=0.2) / 100
        visits: list[Visit] = []
        for letter, stretch in groupby(order.lower()):
            self._stretch(letter, len(list(stretch)), visits)
        return Round(order, busy, tuple(visits))

    def _stretch(self, letter: str, times: int, visits: list[Visit]) -> None:
        """Visits of one side, one after another, added to the round's.

        Requests that failed are an error while the side is open: if its server has died, it tells why.
        """
        config, side = self._plan.config, self.sides[letter]
        with side.opened(config.ready_timeout, self._progress.log) as url:
            plan = replace(
                self._plan,
                endpoint=make_endpoint(
                    url, config.endpoint, config.backend, side.api_key, config.header, not config.insecure
                ),
            )
            target = self._ready(letter, plan)
            counter = self._count_by(plan, target)
            for _ in range(times):
                visits.append(self._visit(letter, plan, target, counter))
                if visits[-1].failed_ratio > config.max_failed_ratio:
                    raise FailedRequestsError(visits)

    def _ready(self, letter: str, plan: Plan) -> Target:
        server, target = connect(plan, self._progress)
        self.models[letter], self.versions[letter] = target.model, server.version
        return target

    def _count_by(self, plan: Plan, target: Target) -> TokenCounter | None:
        """One counter for both sides, so that both are sent prompts of the same lengths, found once."""
        if self.counted_by is None:
            self._counter, self.counted_by = self._find_counter(plan, target)
        return self._counter

    def _find_counter(self, plan: Plan, target: Target) -> tuple[TokenCounter | None, str]:
        ours = next((side.model for side in self.sides.values() if side.model is not None), None)
        if plan.config.tokenizer is None and ours is not None:
            return local_counter(ours, special=not plan.endpoint.chat), "tokenizer"
        return find_counter(plan, target.model, self._progress)

    def _visit(self, letter: str, plan: Plan, target: Target, counter: TokenCounter | None) -> Visit:
        items = make_items(plan, next(self._streams), counter)
        target = warm_up(plan, target, counter, self._progress)
        self._progress.start(f"{letter.upper()}: requests", len(items))
        run = run_once(plan, target, items, 0, self._progress)  # arrivals are the same in each visit
        self._progress.stop()
        if run.load.interrupted:
            raise KeyboardInterrupt
        figures = metrics.run_metrics(run.load.records, run.load.duration, plan.options)
        return Visit(letter, run.date, figures, metrics.failure_summary(run.load.records))
