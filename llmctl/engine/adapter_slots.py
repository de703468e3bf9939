"""Which adapters are on the device, and whose requests may run: the scheduler's side of serving LoRA.

An adapter takes a slot when a request of it is admitted, and keeps it until another one needs it: of those that no
request runs with, the one that was admitted longest ago goes first, one that nobody waits for before all.

Fair among adapters: the queue's next request always enters if its adapter has a slot, or one is to be had. While it
waits for one, others may pass it, but no request of the adapters that are to make room: as many as there are that wait,
those that were admitted longest ago. So their running requests end, their slots become free, and the next request has
one as soon as the longest of them is done, however many requests keep coming for adapters that are there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Protocol

from llmctl.engine.request import Request, RequestStatus


class AdapterSource(Protocol):
    """Where adapters are read."""

    def ready(self, adapter_id: str) -> bool:
        """Whether an adapter can be put into a slot now; if not, begin to read it."""
        ...


class AdapterSlots:
    """Slots of one device.

    Args:
        source: reads what is to be put into them.
    """

    def __init__(self, count: int, source: AdapterSource) -> None:
        self._source = source
        self._count = count
        self._free = list(range(count - 1, -1, -1))
        self._slots: dict[str, int] = {}  # by adapter, the one that was admitted longest ago first
        self._running: Counter[str] = Counter()
        self._waiting: Counter[str] = Counter()
        self._reading: set[str] = set()  # for which a slot is kept
        self._puts: list[tuple[int, str]] = []

    @property
    def claimed(self) -> frozenset[str]:
        """The adapters that a slot is kept for: no more than there are slots."""
        return frozenset(self._reading)

    def reading(self) -> bool:
        """Whether a slot is kept for an adapter that is not read yet; if so, begin to read it."""
        return not all(self._source.ready(adapter) for adapter in self._reading)

    def wanted(self, adapter_id: str) -> bool:
        """Whether a request of it runs or waits."""
        return self._running[adapter_id] > 0 or self._waiting[adapter_id] > 0

    def added(self, request: Request) -> None:
        """A request came to the queue, new or preempted."""
        if request.adapter_id is not None:
            self._waiting[request.adapter_id] += 1

    def admits(self, adapter_id: str | None, leaving: Collection[str] = ()) -> bool:
        """Whether requests of an adapter (None: of none) may enter as far as that is concerned. One that is not in a
        slot has one kept for it if there is any, and is read.

        Args:
            leaving: adapters that are to make room, while another request before it waits for a slot.
        """
        if adapter_id is None:
            return True
        if adapter_id in self._slots:
            return adapter_id not in leaving and (self._running[adapter_id] > 0 or self._available() > 0)
        if adapter_id not in self._reading:
            if self._available() <= 0:
                return False
            self._reading.add(adapter_id)
        return self._source.ready(adapter_id)

    def admitted(self, request: Request) -> None:
        """A request enters: its adapter is put into a slot, unless it is in one."""
        adapter = request.adapter_id
        if adapter is None:
            return
        self._waiting[adapter] -= 1
        self._running[adapter] += 1
        slot = self._slots.pop(adapter, None)
        if slot is None:
            self._reading.discard(adapter)
            slot = self._free.pop() if self._free else self._slots.pop(self._next_to_go())
            self._puts.append((slot, adapter))
        self._slots[adapter] = slot
        request.adapter_slot = slot

    def left(self, request: Request) -> None:
        """A request ended, or was preempted; its status is still what it was."""
        adapter = request.adapter_id
        if adapter is None:
            return
        counts = self._running if request.status is RequestStatus.RUNNING else self._waiting
        counts[adapter] -= 1
        request.adapter_slot = -1
        if not self.wanted(adapter):
            del self._running[adapter], self._waiting[adapter]
            self._reading.discard(adapter)

    def take_puts(self) -> list[tuple[int, str]]:
        """(slot, adapter) of those that must be put there before the next step."""
        puts, self._puts = self._puts, []
        return puts

    def _available(self) -> int:
        """Slots that an adapter could have now."""
        return self._count - sum(self._running[a] > 0 for a in self._slots) - len(self._reading)

    def _next_to_go(self) -> str:
        """Of the adapters that nobody runs with, the one to be put out."""
        idle = (adapter for adapter in self._slots if not self._running[adapter])
        return min(idle, key=lambda adapter: self._waiting[adapter] > 0)

    def leaving(self) -> frozenset[str]:
        """The adapters that are to make room for those that wait: as many as have no idle slot in sight."""
        waiting = sum(count > 0 and adapter not in self._slots for adapter, count in self._waiting.items())
        idle = len(self._free) + sum(not self._running[adapter] for adapter in self._slots)
        busy = [adapter for adapter in self._slots if self._running[adapter]]
        return frozenset(busy[: max(0, min(waiting, self._count) - idle)])

    def check(self) -> None:
        """Slots are where they should be.

        Raises:
            RuntimeError: they are not.
        """
        if sorted([*self._free, *self._slots.values()]) != list(range(self._count)):
            raise RuntimeError("adapters: a slot is lost, or held twice")
        if any(self._running[adapter] > 0 for adapter in self._running.keys() - self._slots.keys()):
            raise RuntimeError("adapters: a request runs with an adapter that has no slot")
