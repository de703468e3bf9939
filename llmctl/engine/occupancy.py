"""Where the wall time of an engine goes: on a full device, on one that could have done more, or on none; and why.

Every second belongs to one state. Time is cut where the result of a step is taken in. Of the time since the cut before:

* what was waited without any request is ``no_requests``;
* of the rest, as much as the device computed goes to the step's ``Fill``. With steps in flight it may have begun before
  the last cut: what exceeds the time since then is carried over to the next cut;
* of what is left then, in which there were requests and the device had nothing to do, as much as went into sending
  reports to the API process is ``api_process``, and the remainder ``host``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

import msgspec

Fill = Literal["busy", "kv_full", "token_budget", "itl_target", "max_num_seqs", "deadline", "max_loras", "few_requests"]
"""What bounded a step. The first that holds:

* ``kv_full``: a request was preempted, or one waits for which there are too few free blocks.
* ``token_budget``: max_num_batched_tokens cut a prompt or kept a request out.
* ``itl_target``: a prompt was cut or kept out so that running requests get their next tokens in time.
* ``max_num_seqs``: requests wait, and all seats are taken.
* ``deadline``: a request was kept out because one decode row more would make a step longer than an ITL deadline.
* ``max_loras``: those that wait need adapters for which there is no slot, or that are being read.
* ``busy``: the step is full (max_num_seqs sequences or max_num_batched_tokens tokens), and kept nothing out.
* ``few_requests``: there was nothing more to compute.
"""


class StateSeconds(msgspec.Struct, frozen=True, array_like=True):
    """Total wall time by state, seconds; together they are the time since the start. See the module's text.

    Attributes:
        busy, kv_full, token_budget, itl_target, max_num_seqs, deadline, max_loras, few_requests: the device computed,
            and what bounded the step.
        host: scheduling, staging, taking in results. api_process: sending to an API process that is behind.
        no_requests: nothing to do.
    """

    busy: float = 0.0
    kv_full: float = 0.0
    token_budget: float = 0.0
    itl_target: float = 0.0
    max_num_seqs: float = 0.0
    deadline: float = 0.0
    max_loras: float = 0.0
    few_requests: float = 0.0
    host: float = 0.0
    api_process: float = 0.0
    no_requests: float = 0.0


class Occupancy:
    """Keeps the StateSeconds of one engine. ``clock``: seconds."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._cut = clock()
        self._carried = 0.0
        self._sending = 0.0
        self._seconds = dict.fromkeys(StateSeconds.__struct_fields__, 0.0)

    def waited(self, seconds: float) -> None:
        """So long, until now, there was no request, and no step in flight that anybody wants."""
        self._seconds["no_requests"] += seconds
        self._cut += seconds
        self._carried = 0.0

    def sent(self, seconds: float) -> None:
        """Sending a report took so long."""
        self._sending += seconds

    def step_done(self, fill: Fill, compute_seconds: float) -> None:
        """The result of a step has just been taken in."""
        now, seconds = self._clock(), self._seconds
        wall = now - self._cut
        computed = self._carried + compute_seconds
        device = min(computed, wall)
        sending = min(self._sending, wall - device)
        seconds[fill] += device
        seconds["api_process"] += sending
        seconds["host"] += wall - device - sending
        self._cut, self._carried, self._sending = now, computed - device, 0.0

    def seconds(self) -> StateSeconds:
        """The totals up to the last step, or to the end of the last wait."""
        return StateSeconds(**self._seconds)
