"""Pooling: a prompt's hidden states, after the final norm and before the output head, as one vector (an embedding)."""

from __future__ import annotations

from enum import StrEnum


class Pooling(StrEnum):
    """Whose hidden states an embedding is the mean of: the last token's alone, or all tokens'."""

    LAST = "last"
    MEAN = "mean"

    def rows(self, count: int, *, ends: bool) -> int:
        """Of a slice of ``count`` tokens, how many from its end on count; ``ends``: the prompt ends with it."""
        if self is Pooling.MEAN:
            return count
        return 1 if ends else 0
