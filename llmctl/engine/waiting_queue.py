"""Requests that wait, and which of them is next.

Policies:

* ``fcfs``: by arrival.
* ``priority``: lower values first, then by due time.
* ``fair``: lower values first; within one value tenants take turns: next is the first due request of the tenant that
  has been served least. That is the Virtual Token Counter of Sheng et al. 2024, "Fairness in Serving Large Language
  Models" (OSDI): a tenant is charged its prompt when a request is admitted, and each token when it is generated; one
  that comes to the queue with nothing waiting is raised to the least of those that wait there (else to whoever was
  there last), so that nobody saves up turns by being idle. Two tenants that both keep waiting differ in service by a
  bounded number of tokens, and a newcomer's request is passed by at most one request of each other tenant.

A request with a TTFT deadline is due then, any other ``PATIENCE`` after its arrival: without deadlines the order is
that of arrival, with them it is earliest deadline first (Liu and Layland 1973, "Scheduling Algorithms for
Multiprogramming in a Hard-Real-Time Environment"). Under overload that alone meets few deadlines, for each late request
makes the next one late. So a request that misses its deadline while it waits, and cannot be saved, is due a second and
last time ``LATE`` times the deadline after its arrival: those that can be saved pass it meanwhile.

Nothing starves within a priority: both due times follow from the arrival, so who arrives later than the second is due
later. Where the overload lasts longer than that, those that became late first are served first, late: then only
refusing some (``shed``) keeps others in time.

A preempted request comes back before any that never ran, but for earlier arrivals of the same tenant.

The order of running requests follows: ``sort_key`` is (priority, turn, arrival, number), where the turn is counted up
whenever another tenant than the last is admitted. So whoever is admitted later is preempted earlier, but for an earlier
arrival of the same tenant, and with one tenant ``fair`` is ``priority``, exactly. The other policies know one tenant.

Next is found in O(log tenants), whatever the number that waits: each tenant has one entry in a heap, by what it had
been served when the entry was made, and by when its first request is due. Both only grow, but where a request comes
that is due before the others of its line, for which a new entry is made: so an entry that is up to date at the top is
the least; one that is not is put back as it is now.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush, heapreplace, merge
from itertools import count
from typing import Any, TypeAlias

from llmctl.engine.request import Request, RequestStatus
from llmctl.engine.tenants import Account, Accounts

POLICIES = ("fcfs", "priority", "fair")
LATE = 10.0
"""A request that missed its TTFT deadline is due so many times the deadline after its arrival."""

_LEAST_ENTRIES = 16
"""Of a heap, before those that are not valid any more are looked for."""


class WaitingQueue:
    """The requests that wait under one of ``POLICIES``.

    Attributes:
        num_short: those that never ran, have at most ``short`` tokens, and are to generate.

    Args:
        short: tokens of a prompt that fits a step.
    """

    def __init__(self, policy: str, *, short: int = 0) -> None:
        self._short, self.num_short = short, 0
        self._by_priority, self._by_tenant = policy != "fcfs", policy == "fair"
        self._classes: dict[int, _Class] = {}
        self._priorities: list[int] = []  # of the classes, ascending
        self._hopeful: list[Request] = []  # those that have not missed a TTFT deadline, by due time
        self._accounts = Accounts()
        self._last_to_leave = self._last_admitted = Account()
        self._turn = self._arrivals = self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Request]:
        """All of them, in no particular order."""
        for waiting in self._classes.values():
            yield from waiting.resumed
            for line in waiting.lines.values():
                yield from line.hopeful
                yield from line.settled

    def add(self, request: Request, arrival: float) -> None:
        """Take in a new request."""
        account = request.account = self._accounts.open(request.tenant if self._by_tenant else "")
        request.sort_key = (request.priority if self._by_priority else 0, 0, arrival, self._arrivals)
        request.due = (request.deadline.due(arrival), arrival, self._arrivals)
        self._arrivals += 1
        waiting = self._class(request.sort_key[0])
        if not account.waiting:
            first = waiting.first_line()
            least = self._last_to_leave if first is None else first.account
            account.served = max(account.served, least.served)
        account.waiting += 1
        self._length += 1
        self.num_short += self._is_short(request)
        request.hopeful = request.deadline.ttft is not None
        if request.hopeful:
            insort(self._hopeful, request, key=_due)
        waiting.add(request)

    def _is_short(self, request: Request) -> bool:
        return request.num_prompt_tokens <= self._short and request.pooling is None

    @property
    def next_miss(self) -> float:
        """When the next TTFT deadline of a request that never ran passes; infinity: never."""
        return self._hopeful[0].due[0] if self._hopeful else math.inf

    def pass_time(self, now: float) -> list[Request]:
        """Put back the requests whose TTFT deadline has passed by now; these. O(log n) for each."""
        missed = []
        while self.next_miss < now:
            request = self._hopeful[0]
            waiting = self._classes[request.sort_key[0]]
            waiting.remove(request)
            self._give_up(request)
            assert request.deadline.ttft is not None
            arrival = request.due[1]
            request.due = (arrival + LATE * request.deadline.ttft, *request.due[1:])
            waiting.add(request)
            missed.append(request)
        return missed

    def _give_up(self, request: Request) -> None:
        """Its due time will not change any more."""
        del self._hopeful[bisect_left(self._hopeful, request.due, key=_due)]
        request.hopeful = False

    @property
    def least_priority(self) -> int:
        """No waiting request has a lower value; there must be one that waits."""
        return self._priorities[0]

    def put_back(self, request: Request) -> None:
        """Take in a request that was preempted; it keeps its place among those that run or ran."""
        insort(self._class(request.sort_key[0]).resumed, request, key=_key)
        self._length += 1

    def peek(self) -> Request:
        """The next one; there must be one."""
        waiting = self._classes[self._priorities[0]]
        line = waiting.first_line()
        if line is None:
            return waiting.resumed[0]
        first = line.first()
        if waiting.resumed and waiting.resumed[0].sort_key < self._key_if_admitted(first):
            return waiting.resumed[0]
        return first

    def first_short(self, may_enter: Callable[[Request], bool]) -> Request | None:
        """Of those with the least priority value, the first in order that may enter with at most ``short`` tokens;
        O(n). None: there is none, or it would pass one that was preempted."""
        waiting = self._classes[self._priorities[0]]
        if waiting.resumed:
            return None
        return waiting.first_where(lambda r: r.num_prompt_tokens <= self._short and may_enter(r))

    def first_where(self, may_enter: Callable[[Request], bool]) -> Request | None:
        """The first in order that may enter, those that were preempted before others of their priority; O(n)."""
        for priority in self._priorities:
            waiting = self._classes[priority]
            found = next(filter(may_enter, waiting.resumed), None) or waiting.first_where(may_enter)
            if found is not None:
                return found
        return None

    def pop(self, request: Request | None = None) -> Request:
        """Take out a request, the next one by default, to be run: its ``sort_key`` is now its place among those that
        run."""
        request = request or self.peek()
        key = self._key_if_admitted(request)
        self.remove(request)
        if request.status is RequestStatus.WAITING:
            request.sort_key = key
            self._turn, self._last_admitted = key[1], request.account
        return request

    def remove(self, request: Request) -> None:
        """Take out a request that waits."""
        waiting = self._classes[request.sort_key[0]]
        self._length -= 1
        if request.status is RequestStatus.PREEMPTED:
            del waiting.resumed[bisect_left(waiting.resumed, request.sort_key, key=_key)]
        else:
            waiting.remove(request)
            self._uncount(request)
        if not waiting:  # at once: clients may name as many priorities as there are integers
            del self._classes[request.sort_key[0]]
            del self._priorities[bisect_left(self._priorities, request.sort_key[0])]

    def _uncount(self, request: Request) -> None:
        """One less that never ran."""
        self.num_short -= self._is_short(request)
        if request.hopeful:
            self._give_up(request)
        request.account.waiting -= 1
        if not request.account.waiting:
            self._last_to_leave = request.account

    def ended(self, request: Request) -> None:
        """A request that was added, and does not wait any more, has ended."""
        self._accounts.close(request.account)

    def _key_if_admitted(self, request: Request) -> tuple[int, int, float, int]:
        priority, _, arrival, number = request.sort_key
        return (priority, self._turn + (request.account is not self._last_admitted), arrival, number)

    def _class(self, priority: int) -> _Class:
        found = self._classes.get(priority)
        if found is None:
            found = self._classes[priority] = _Class()
            insort(self._priorities, priority)
        return found


# Served, when the first is due, number, line: see the module's text. The number, because the first two can be equal in
# two lines of one tenant: where a TTFT deadline is less than a float tells from the arrival, a miss puts nothing off.
_Entry: TypeAlias = "tuple[int, Any, int, _Line]"


class _Line:
    """One tenant's waiting requests that never ran, by due time: those that may still meet a TTFT deadline, and those
    whose due time is settled. ``entry``: the valid one of its class's heap."""

    __slots__ = ("account", "entry", "hopeful", "settled")

    def __init__(self, account: Account) -> None:
        self.account = account
        self.hopeful: list[Request] = []
        self.settled: list[Request] = []
        self.entry: _Entry | None = None

    def __bool__(self) -> bool:
        return bool(self.settled or self.hopeful)

    def first(self) -> Request:
        """The one that is due first; there must be one."""
        if not self.hopeful:
            return self.settled[0]
        if self.settled and self.settled[0].due < self.hopeful[0].due:
            return self.settled[0]
        return self.hopeful[0]

    def first_where(self, fits: Callable[[Request], bool]) -> Request | None:
        """The one that is due first of those that fit."""
        return next(filter(fits, merge(self.hopeful, self.settled, key=_due)), None)

    def add(self, request: Request) -> None:
        insort(self.hopeful if request.hopeful else self.settled, request, key=_due)

    def remove(self, request: Request) -> None:
        requests = self.hopeful if request.hopeful else self.settled
        del requests[bisect_left(requests, request.due, key=_due)]


class _Class:
    """What waits with one priority: preempted requests in order, and a line of each tenant, never an empty one."""

    __slots__ = ("_heap", "_numbers", "lines", "resumed")

    def __init__(self) -> None:
        self.resumed: list[Request] = []
        self.lines: dict[str, _Line] = {}
        self._heap: list[_Entry] = []
        self._numbers = count()

    def __bool__(self) -> bool:
        return bool(self.lines or self.resumed)

    def add(self, request: Request) -> None:
        line = self.lines.get(request.account.tenant)
        if line is None:
            line = self.lines[request.account.tenant] = _Line(request.account)
        line.add(request)
        if line.first() is request:
            heappush(self._heap, self._entry(line))
            if len(self._heap) > 2 * len(self.lines) + _LEAST_ENTRIES:
                self._forget_stale()

    def remove(self, request: Request) -> None:
        line = self.lines[request.account.tenant]
        line.remove(request)
        if not line:
            del self.lines[request.account.tenant]

    def _forget_stale(self) -> None:
        """Of entries, keep those that are valid: nobody looks at a class while more important requests wait."""
        self._heap = [line.entry for line in self.lines.values() if line.entry is not None]
        heapify(self._heap)

    def first_line(self) -> _Line | None:
        """The line of the tenant that has been served least; of equals, the one with the request that is due first."""
        heap = self._heap
        while heap:
            entry = heap[0]
            served, due, _, line = entry
            if not line or entry is not line.entry:
                heappop(heap)
            elif served != line.account.served or due is not line.first().due:
                heapreplace(heap, self._entry(line))
            else:
                return line
        return None

    def first_where(self, fits: Callable[[Request], bool]) -> Request | None:
        """The first in order of the requests that never ran and fit."""
        lines = sorted(self.lines.values(), key=lambda line: (line.account.served, line.first().due))
        return next((found for line in lines if (found := line.first_where(fits)) is not None), None)

    def _entry(self, line: _Line) -> _Entry:
        """A line's valid entry from now on."""
        line.entry = (line.account.served, line.first().due, next(self._numbers), line)
        return line.entry


def _key(request: Request) -> Any:
    return request.sort_key


def _due(request: Request) -> Any:
    return request.due
