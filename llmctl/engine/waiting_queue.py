"""Requests that wait, and which of them is next.

Policies:

* ``fcfs``: by arrival.
* ``priority``: lower values first, then by arrival.
* ``fair``: lower values first; within one value tenants take turns: next is the oldest request of the tenant that has
  been served least. That is the Virtual Token Counter of Sheng et al. 2024, "Fairness in Serving Large Language
  Models" (OSDI): a tenant is charged its prompt when a request is admitted, and each token when it is generated; one
  that comes to the queue with nothing waiting is raised to the least of those that wait there (else to whoever was
  there last), so that nobody saves up turns by being idle. Two tenants that both keep waiting differ in service by a
  bounded number of tokens, and a newcomer's request is passed by at most one request of each other tenant.

A preempted request comes back before any that never ran, but for earlier arrivals of the same tenant.

The order of running requests follows: ``sort_key`` is (priority, turn, arrival, number), where the turn is counted up
whenever another tenant than the last is admitted. So whoever is admitted later is preempted earlier, and with one
tenant ``fair`` is ``priority``, exactly. The other policies know one tenant.

Next is found in O(log tenants), whatever the number that waits: each tenant has one entry in a heap, by what it had
been served when the entry was made. Counters only grow, so an entry that is up to date at the top is the least; one
that is not is put back as it is now.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from heapq import heappop, heappush, heapreplace
from typing import Any

from llmctl.engine.request import Request, RequestStatus
from llmctl.engine.tenants import Account, Accounts

POLICIES = ("fcfs", "priority", "fair")


class WaitingQueue:
    """The requests that wait under one of ``POLICIES``.

    Attributes:
        num_short: those that never ran and have at most ``short`` tokens.
    """

    def __init__(self, policy: str, *, short: int = 0) -> None:
        self._short, self.num_short = short, 0
        self._by_priority, self._by_tenant = policy != "fcfs", policy == "fair"
        self._classes: dict[int, _Class] = {}
        self._priorities: list[int] = []  # of the classes, ascending
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
                yield from line.requests

    def add(self, request: Request, arrival: float) -> None:
        """Take in a new request."""
        account = request.account = self._accounts.open(request.tenant if self._by_tenant else "")
        request.sort_key = (request.priority if self._by_priority else 0, 0, arrival, self._arrivals)
        self._arrivals += 1
        waiting = self._class(request.sort_key[0])
        if not account.waiting:
            first = waiting.first_line()
            least = self._last_to_leave if first is None else first.account
            account.served = max(account.served, least.served)
        account.waiting += 1
        self._length += 1
        self.num_short += request.num_prompt_tokens <= self._short
        waiting.add(request)

    def put_back(self, request: Request) -> None:
        """Take in a request that was preempted; it keeps its place among those that run or ran."""
        insort(self._class(request.sort_key[0]).resumed, request, key=_key)
        self._length += 1

    def peek(self) -> Request:
        """The next one; there must be one."""
        while not (waiting := self._classes[self._priorities[0]]):
            del self._classes[self._priorities.pop(0)]
        line = waiting.first_line()
        if line is None:
            return waiting.resumed[0]
        first = line.requests[0]
        if waiting.resumed and waiting.resumed[0].sort_key < self._key_if_admitted(first):
            return waiting.resumed[0]
        return first

    def pop(self) -> Request:
        """Take out the next one, to be run: its ``sort_key`` is now its place among those that run."""
        request = self.peek()
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
            return
        waiting.remove(request)
        self.num_short -= request.num_prompt_tokens <= self._short
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


class _Line:
    """One tenant's waiting requests that never ran, by arrival."""

    __slots__ = ("account", "requests")

    def __init__(self, account: Account) -> None:
        self.account = account
        self.requests: list[Request] = []


class _Class:
    """What waits with one priority: preempted requests in order, and a line of each tenant, never an empty one."""

    __slots__ = ("_heap", "lines", "resumed")

    def __init__(self) -> None:
        self.resumed: list[Request] = []
        self.lines: dict[str, _Line] = {}
        self._heap: list[tuple[int, Any, _Line]] = []  # served, key of the oldest request, line: see the module's text

    def __bool__(self) -> bool:
        return bool(self.lines or self.resumed)

    def add(self, request: Request) -> None:
        line = self.lines.get(request.account.tenant)
        if line is None:
            line = self.lines[request.account.tenant] = _Line(request.account)
            heappush(self._heap, (request.account.served, request.sort_key, line))
        insort(line.requests, request, key=_key)

    def remove(self, request: Request) -> None:
        line = self.lines[request.account.tenant]
        del line.requests[bisect_left(line.requests, request.sort_key, key=_key)]
        if not line.requests:
            del self.lines[request.account.tenant]

    def first_line(self) -> _Line | None:
        """The line of the tenant that has been served least; of equals, the one with the oldest request."""
        heap = self._heap
        while heap:
            served, key, line = heap[0]
            if not line.requests:
                heappop(heap)
            elif served != line.account.served or key is not line.requests[0].sort_key:
                heapreplace(heap, (line.account.served, line.requests[0].sort_key, line))
            else:
                return line
        return None


def _key(request: Request) -> Any:
    return request.sort_key
