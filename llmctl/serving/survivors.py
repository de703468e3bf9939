"""Which requests outlive a worker, and how the next worker gets them.

A request that has a token ends with its worker: what its client has was computed from a state that is gone. The others
are kept. Of those, the ones that were in a step when the worker died, or whose grammar it had, may be why it died: the
next worker gets them one at a time, each alone with those that have their first token, before anything else. So a
request that kills two workers in a row is known by it, it is not given to a third, and it takes few others with it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from llmctl.errors import LlmctlError
from llmctl.serving.generation import Generation

MOST_DEATHS = 2
"""Deaths in a row that a request may be in the middle of."""


class QuarantinedError(LlmctlError):
    """The engine died again and again while it ran this request."""

    code = "request_quarantined"


class Survivors:
    """Requests that wait for a worker, in the order in which it gets them.

    Args:
        send: gives a generation's sequences to the worker. room: how many sequences it could take now.
    """

    def __init__(self, send: Callable[[Generation], None], room: Callable[[], int]) -> None:
        self._send = send
        self._room = room
        self._suspects: deque[Generation] = deque()
        self._others: deque[Generation] = deque()
        self._on_trial: Generation | None = None
        self.holding = False

    def sort(self, running: Iterable[Generation]) -> tuple[list[Generation], list[Generation]]:
        """Keep what outlives a worker that has just died, and hold everything from now on.

        Args:
            running: what it had, and what was held from it, in order of arrival.

        Returns:
            Those that end with it, and those to be quarantined.
        """
        lost, quarantined = [], []
        self._clear()
        self.holding = True
        for generation in running:
            if generation.begun:
                lost.append(generation)
                continue
            suspect = any(sequence.in_hand for sequence in generation.sequences)
            generation.deaths = generation.deaths + 1 if suspect else 0
            for sequence in generation.sequences:
                sequence.sent = sequence.scheduled = False
            if generation.deaths >= MOST_DEATHS:
                quarantined.append(generation)
            else:
                (self._suspects if suspect else self._others).append(generation)
        return lost, quarantined

    def hold(self, generation: Generation) -> None:
        """Keep a new request behind those that are held."""
        self._others.append(generation)

    def release(self) -> None:
        """Send what may be sent now; to be called when a worker is there, and after each of its steps."""
        if self._on_trial is not None and not self._on_trial.done and not self._on_trial.all_begun:
            return
        self._on_trial = None
        while self._suspects:
            suspect = self._suspects.popleft()
            if not suspect.done:
                self._on_trial = suspect
                self._send(suspect)
                return
        room = self._room()
        while self._others and (self._others[0].done or room >= len(self._others[0].sequences)):
            generation = self._others.popleft()
            if not generation.done:
                room -= len(generation.sequences)
                self._send(generation)
        self.holding = bool(self._others)

    def _clear(self) -> None:
        self._suspects.clear()
        self._others.clear()
        self._on_trial = None
