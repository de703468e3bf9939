"""What waiting requests cost those that run: steps of the same streams with a full queue and with an empty one.

Each round starts some streams on a server that has seats for just those, and looks at their steps in three windows:
nothing waits, many requests wait, nothing waits again. Steps grow with the context, so those with a queue are held
against what the other two windows give for the same step. Every window must begin and end with just those requests
running and waiting, and every step in it must yield one token of each that runs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import aiohttp
from served import Server, client_session, prompts, stream

REACH_SECONDS = 60
SETTLE_SECONDS = 0.5
STEPS, BUSY, COMPUTE = "engine_steps_total", "engine_busy_seconds_total", "engine_compute_seconds_total"
TIMES = {"step_us": "step", "python_us": "of it Python", "token_gap_us": "token to token"}
"""The times of a Window, and what a table calls them."""


@dataclass(frozen=True)
class Window:
    """Steps between two looks at the counters. middle: number of the one in the middle. Microseconds a step: in all,
    outside the model, and between two tokens of a stream as the API process sees them."""

    middle: float
    steps: int
    step_us: float
    python_us: float
    token_gap_us: float

    @classmethod
    def between(cls, before: dict[str, float], after: dict[str, float]) -> Window:
        """From two answers of /metrics.

        Raises:
            RuntimeError: no step or no token in between.
        """
        grown = {name: after[name] - before[name] for name in after}
        if not grown[STEPS] or not grown["inter_token_latency_seconds_count"]:
            raise RuntimeError(
                "a window without a step: the model is slow for it, take a longer --window or more --queued"
            )
        steps, busy, compute = (grown[name] for name in (STEPS, BUSY, COMPUTE))
        gap = grown["inter_token_latency_seconds_sum"] / grown["inter_token_latency_seconds_count"]
        middle = (before[STEPS] + after[STEPS]) / 2
        return cls(middle, int(steps), 1e6 * busy / steps, 1e6 * (busy - compute) / steps, 1e6 * gap)


@dataclass(frozen=True)
class Round:
    """Windows in order: nothing waits; requests are being submitted; all of them wait; nothing waits again."""

    before: Window
    submission: Window
    queued: Window
    after: Window

    def alone(self, time: str, window: Window) -> float:
        """What ``time`` would be at the middle of ``window`` if nothing waited."""
        first, last = getattr(self.before, time), getattr(self.after, time)
        share = (window.middle - self.before.middle) / (self.after.middle - self.before.middle)
        return float(first + share * (last - first))

    def ratio(self, time: str, window: Window) -> float:
        """``time`` in ``window`` over what it would be if nothing waited."""
        return float(getattr(window, time)) / self.alone(time, window)


class Requests:
    """Requests that run or wait until they are dropped."""

    def __init__(self, session: aiohttp.ClientSession, server: Server) -> None:
        self._session, self._server = session, server
        self._tasks: list[asyncio.Task[None]] = []

    def send(self, count: int, prompt_tokens: int, output_tokens: int) -> None:
        """That many more."""
        for prompt in prompts(count, prompt_tokens):
            self._tasks.append(asyncio.create_task(stream(self._session, self._server, prompt, output_tokens)))

    async def drop(self, first: int = 0) -> None:
        """Leave, all from number ``first`` on."""
        leaving, self._tasks = self._tasks[first:], self._tasks[:first]
        for task in leaving:
            task.cancel()
        await asyncio.gather(*leaving, return_exceptions=True)

    async def look(self) -> dict[str, float]:
        """The metrics.

        Raises:
            RuntimeError: a request has ended that should not have.
        """
        for task in self._tasks:
            if task.done():
                why = task.exception() or "its context is full"
                raise RuntimeError(f"a request ended while it was measured: {why}")
        return await asyncio.to_thread(self._server.metrics)

    async def reach(self, *state: int) -> dict[str, float]:
        """The metrics as soon as that many run and wait.

        Raises:
            RuntimeError: it does not come to that.
        """
        end = time.monotonic() + REACH_SECONDS
        while state_of(found := await self.look()) != state:
            if time.monotonic() > end:
                now = state_of(found)
                raise RuntimeError(f"(running, waiting): expected {state} within {REACH_SECONDS} s, found {now}")
            await asyncio.sleep(0.02)
        return found

    async def window(self, seconds: float, *state: int) -> Window:
        """Steps with that many running and waiting.

        Raises:
            RuntimeError: others ran or waited, or a step did not give each of them one token.
        """
        await self.reach(*state)
        await asyncio.sleep(SETTLE_SECONDS)
        before = await self.look()
        await asyncio.sleep(seconds)
        after = await self.look()
        steps, tokens = (int(after[n] - before[n]) for n in (STEPS, "generation_tokens_total"))
        if state_of(after) != state or tokens != steps * state[0]:
            found = f"found {state_of(after)} and {tokens} tokens in {steps} steps"
            raise RuntimeError(f"(running, waiting): expected {state} for {seconds:g} s, {found}")
        return Window.between(before, after)


def state_of(metrics: dict[str, float]) -> tuple[int, int]:
    """Requests (running, waiting)."""
    return int(metrics["num_requests_running"]), int(metrics["num_requests_waiting"])


async def play_round(server: Server, running: int, waiting: int, prompt_tokens: int, seconds: float) -> Round:
    """One round, with windows of so many seconds; at its end no request is left.

    Raises:
        RuntimeError: something else ran or waited in a window.
    """
    async with client_session() as session:
        requests = Requests(session, server)
        try:
            requests.send(running, prompt_tokens, server.max_model_len - prompt_tokens)
            before = await requests.window(seconds, running, 0)
            start = await requests.look()
            requests.send(waiting, prompt_tokens, 1)
            submission = Window.between(start, await requests.reach(running, waiting))
            queued = await requests.window(seconds, running, waiting)
            await requests.drop(running)
            after = await requests.window(seconds, running, 0)
        finally:
            await requests.drop()
        await requests.reach(0, 0)
    return Round(before, submission, queued, after)


@dataclass(frozen=True)
class QueueRow:
    """What the rounds say of one time of a Window: medians, and the range of the ratio. Times in microseconds."""

    running: int
    waiting: int
    time: str
    alone: float
    queued: float
    ratio: float
    ratio_range: tuple[float, float]
    submission_ratio: float

    @classmethod
    def of(cls, running: int, waiting: int, time: str, rounds: Sequence[Round]) -> QueueRow:
        """A row of the table."""
        ratios = [r.ratio(time, r.queued) for r in rounds]
        return cls(
            running,
            waiting,
            time,
            alone=median(r.alone(time, r.queued) for r in rounds),
            queued=median(getattr(r.queued, time) for r in rounds),
            ratio=median(ratios),
            ratio_range=(min(ratios), max(ratios)),
            submission_ratio=median(r.ratio(time, r.submission) for r in rounds),
        )
