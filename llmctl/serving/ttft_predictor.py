"""How long a request's first token will take, by what is ahead of it and what was measured.

    TTFT = max(seats / finish rate, tokens ahead · u / prefill rate) + its own prompt · u / prefill rate

* seats: how many running requests have to end before it has a seat: those that run with its priority value or a lower
  one (the others make room), those that wait ahead of it, and itself, less ``max_num_seqs``. finish rate: requests a
  second, as a ``Retry-After`` counts them.
* tokens ahead: prompt tokens of the requests that wait ahead of it, and of those that run and have no token yet.
* u: share of prompt tokens that the prefix cache did not have. prefill rate: prompt tokens a second in steps with any,
  by least squares: large steps, which a queue makes, count most. Of both the latest count most.

Ahead are the requests with lower priority values; of the same value those of its tenant that are due earlier, and of
each other tenant the first, and as many tokens as of its own. What was not measured yet takes no time, nor does a wait
for KV blocks, which is not foreseen. So in doubt the prediction is short, and the request is admitted.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from dataclasses import dataclass, replace
from typing import NamedTuple

from llmctl.engine.llm_engine import EngineStats

_KEPT = 0.98  # of the weight of a measurement, at the next one: 34 later it counts half


@dataclass(frozen=True, slots=True)
class Waiting:
    """One sequence on its way to a first token. ``due``: when that is to be there, which is its place in the queue."""

    priority: int
    tenant: str
    due: float
    tokens: int
    scheduled: bool = False


class Ahead(NamedTuple):
    """Requests ahead of one, and the tokens of their prompts."""

    requests: int
    tokens: int


class _Line:
    """One tenant's sequences that wait with one priority: (due, id, prompt tokens) in order."""

    def __init__(self) -> None:
        self.places: list[tuple[float, str, int]] = []
        self.tokens = 0

    def before(self, due: float) -> Ahead:
        count = bisect_right(self.places, due, key=lambda place: place[0])
        return Ahead(count, sum(place[2] for place in self.places[:count]))


class _Ratio:
    """The quotient of two sums in which the latest terms count most; ``unknown`` until there are any."""

    def __init__(self, unknown: float) -> None:
        self._unknown = unknown
        self._over = self._under = 0.0

    def add(self, over: float, under: float) -> None:
        self._over = _KEPT * self._over + over
        self._under = _KEPT * self._under + under

    @property
    def value(self) -> float:
        return self._over / self._under if self._under else self._unknown


class TtftPredictor:
    """Keeps the account of what waits, and what prompts cost. ``fair``: tenants take turns."""

    def __init__(self, *, fair: bool) -> None:
        self._fair = fair
        self._waiting: dict[str, Waiting] = {}
        self._lines: dict[int, dict[str, _Line]] = {}
        self._running: dict[str, int] = {}  # id -> priority
        self._computing = 0  # prompt tokens of those that run and have no token yet
        self._token_seconds, self._uncached = _Ratio(0.0), _Ratio(1.0)
        self._last: tuple[EngineStats, float] | None = None
        self._forced = 0  # tokens that the last step's result brought and the next step computes

    # -- what is ahead ----------------------------------------------------------------------------------------

    def waits(self, request_id: str, waiting: Waiting) -> None:
        """A sequence is on its way to the queue."""
        waiting = replace(waiting, tenant=self._tenant(waiting.tenant))
        self._waiting[request_id] = waiting
        line = self._lines.setdefault(waiting.priority, {}).setdefault(waiting.tenant, _Line())
        insort(line.places, (waiting.due, request_id, waiting.tokens))
        line.tokens += waiting.tokens

    def scheduled(self, request_id: str) -> None:
        """It is in a step for the first time. Ids that do not wait are passed over, here and below."""
        waiting = self._waiting.get(request_id)
        if waiting is None or waiting.scheduled:
            return
        self._leave_line(request_id, waiting)
        self._waiting[request_id] = replace(waiting, scheduled=True)
        self._computing += waiting.tokens
        self._running[request_id] = waiting.priority

    def begun(self, request_id: str, cached_tokens: int) -> None:
        """It has its first token; so many of its prompt came from the prefix cache."""
        waiting = self._waiting.get(request_id)
        if waiting is not None:
            self._uncached.add(waiting.tokens - cached_tokens, waiting.tokens)
            self._forget(request_id)

    def left(self, request_id: str) -> None:
        """It ended, in whatever way."""
        self._forget(request_id)
        self._running.pop(request_id, None)

    def worker_lost(self) -> None:
        """Those that have no token wait again, and totals begin at zero."""
        kept, self._last = self._waiting, None
        self._waiting, self._lines, self._running, self._computing = {}, {}, {}, 0
        for request_id, waiting in kept.items():
            self.waits(request_id, replace(waiting, scheduled=False))

    def _forget(self, request_id: str) -> None:
        waiting = self._waiting.pop(request_id, None)
        if waiting is None:
            return
        if waiting.scheduled:
            self._computing -= waiting.tokens
        else:
            self._leave_line(request_id, waiting)

    def _leave_line(self, request_id: str, waiting: Waiting) -> None:
        lines = self._lines[waiting.priority]
        line = lines[waiting.tenant]
        del line.places[bisect_left(line.places, (waiting.due, request_id))]
        line.tokens -= waiting.tokens
        if not line.places:
            del lines[waiting.tenant]
            if not lines:
                del self._lines[waiting.priority]

    def ahead(self, priority: int, tenant: str, due: float) -> Ahead:
        """What waits ahead of a request that would come now."""
        requests = tokens = 0
        for value, lines in self._lines.items():
            if value < priority:
                requests += sum(len(line.places) for line in lines.values())
                tokens += sum(line.tokens for line in lines.values())
        same = self._lines.get(priority, {})
        own = same.get(self._tenant(tenant), _Line())
        before = own.before(due)
        for line in same.values():
            if line is not own:
                requests += min(len(line.places), 1 + before.requests)
                tokens += min(line.tokens, line.places[0][2] + before.tokens)
        return Ahead(requests + before.requests, tokens + before.tokens)

    def _tenant(self, name: str) -> str:
        return name if self._fair else ""

    # -- what was measured ------------------------------------------------------------------------------------

    def step(self, stats: EngineStats, busy_seconds: float) -> None:
        """Take in the engine's totals after a step, and the worker's wall time with requests. O(1)."""
        last, self._last = self._last, (stats, busy_seconds)
        if last is None or stats.num_steps <= last[0].num_steps:
            return
        generated = stats.num_generated_tokens - last[0].num_generated_tokens
        forced, self._forced = self._forced, stats.num_forced_tokens - last[0].num_forced_tokens
        prompt = stats.last_step_tokens - (generated - self._forced) - forced
        if prompt > 0:
            self._token_seconds.add(prompt * (busy_seconds - last[1]), prompt * prompt)

    def predict(self, arriving: Waiting, seats: int, finish_rate: float) -> float:
        """Seconds to the first token of a request that arrives now.

        Args:
            seats: requests that run at once. finish_rate: requests a second; 0: not known.
        """
        ahead = self.ahead(arriving.priority, arriving.tenant, arriving.due)
        seated = sum(priority <= arriving.priority for priority in self._running.values())
        missing = seated + ahead.requests + 1 - seats
        seat = missing / finish_rate if missing > 0 and finish_rate > 0 else 0.0
        token = self._token_seconds.value * self._uncached.value
        return max(seat, (ahead.tokens + self._computing) * token) + arriving.tokens * token
