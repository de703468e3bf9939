"""Where one request is in its grammar, and what may come next."""

from __future__ import annotations

import time
from collections import deque
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from llguidance import LLMatcher


STEP_SECONDS = 0.1
"""Processor time that a grammar may take for one token; ordinary ones take some ten µs. All requests wait meanwhile."""
TOO_SLOW = f"it takes more than {STEP_SECONDS:g} s for a token"


class TokenMatcher:
    """The state of one output. It knows end-of-sequence tokens only as what is allowed when the grammar is complete.

    Attributes:
        dead_end: nothing may come next: what else the request forbids leaves nothing of what the grammar allows, or the
            grammar has outgrown its limits (``problem``).
    """

    def __init__(self, matcher: LLMatcher, num_words: int) -> None:
        self._matcher = matcher
        self._num_words = num_words
        self.dead_end = False
        self._slow = False
        self._forced: deque[int] | None = None  # tokens that come next; None: not asked for

    @property
    def complete(self) -> bool:
        """Whether the output matches as it is."""
        return bool(self._matcher.is_accepting())

    @property
    def problem(self) -> str:
        """Why it cannot go on; empty while it can."""
        if self._slow:
            return TOO_SLOW
        return " ".join(self._matcher.get_error().split()) if self._matcher.is_error() else ""

    def accept(self, token_id: int) -> bool:
        """Take in a token that was allowed. Returns whether the output is complete and can have no other."""
        if self._forced and len(self._forced) > 1 and self._forced[0] == token_id:
            self._forced.popleft()
        else:
            self._forced = None
        return bool(self._matcher.consume_token(token_id) and self._matcher.is_stopped())

    def fill(self, row: NDArray[np.uint32]) -> None:
        """Write the mask of the tokens that may come next, u32 [ceil(V/32)], contiguous (``SamplingBatch``)."""
        if forced := self.forced(1):
            row[:] = 0
            row[forced[0] // 32] = 1 << forced[0] % 32
            return
        before = time.thread_time()
        if len(row) == self._num_words:
            self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        else:  # the compiler's own end-of-sequence id, for a model without one, begins a word
            row[:] = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: len(row)]
        self._slow |= time.thread_time() - before > STEP_SECONDS

    def forced(self, most: int) -> list[int]:
        """The next tokens, at most ``most``, whose masks have that one token: the grammar forces the text, and was
        compiled to force its spelling in tokens."""
        if self._forced is None:
            before = time.thread_time()
            self._forced = deque(self._matcher.compute_ff_tokens())
            self._slow |= time.thread_time() - before > STEP_SECONDS
        return list(islice(self._forced, most))
