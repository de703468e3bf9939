"""Threads for long texts: parsing, tokenizing, chat templates, detokenizing, answers. The event loop has streams."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from llmctl.errors import QueueFullError
from llmctl.serving.finish_rate import FinishRate

T = TypeVar("T")

INLINE_BYTES = 4096
"""Work on so much text takes a few ms, and is done at once: a thread would make the usual request wait longer."""
THREADS = 2
MOST_WAITING = 32


class TextWorkers:
    """A few threads, and a bounded queue before them.

    Args:
        threads: work done at a time. waiting: work that waits, beyond which more is refused.
    """

    def __init__(self, threads: int = THREADS, waiting: int = MOST_WAITING) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="llmctl-text")
        self._waiting = waiting
        self._places = threading.BoundedSemaphore(threads + waiting)
        self._rate = FinishRate()

    async def run(self, size: int, work: Callable[[], T]) -> T:
        """What ``work`` returns or raises; done in a thread if ``size``, bytes of text, is more than ``INLINE_BYTES``.

        Raises:
            QueueFullError: too much work is waiting.
        """
        if size <= INLINE_BYTES:
            return work()
        if not self._places.acquire(blocking=False):
            error = QueueFullError(
                f"{self._waiting} long texts are waiting to be parsed or tokenized", fix="try again later"
            )
            error.retry_after = self._rate.seconds_until(1)
            raise error
        future = self._pool.submit(work)
        future.add_done_callback(lambda _: self._places.release())  # not when the caller goes away: the thread is busy
        try:
            return await asyncio.wrap_future(future)
        finally:
            self._rate.count()

    async def finish(self, size: int, work: Callable[[], T]) -> T:
        """As ``run``, for the end of what was served: it is never refused, and takes no place of the queue."""
        if size <= INLINE_BYTES:
            return work()
        return await asyncio.wrap_future(self._pool.submit(work))
