"""What a request is promised: a time until its first token, and a time for each token after it."""

from __future__ import annotations

import re

import msgspec

from llmctl.errors import UsageError

PATIENCE = 60.0
"""Seconds after its arrival at which a request without a TTFT deadline counts as due, beside those that have one."""


_POSITIVE = r"([0-9]*[1-9][0-9]*(\.[0-9]+)?|[0-9]+\.[0-9]*[1-9][0-9]*)"
PATTERN = f"^(ttft:{_POSITIVE}(,itl:{_POSITIVE})?|itl:{_POSITIVE}(,ttft:{_POSITIVE})?)$"
"""Of a deadline's text, in the dialect of JSON schemas, too."""
MAX_CHARS = 64
_GRAMMAR = re.compile(PATTERN)


class Deadline(msgspec.Struct, frozen=True, array_like=True):
    """Seconds that a request may take; None: any.

    Attributes:
        ttft: from its arrival to its first token. itl: between tokens after the first, in the mean.
    """

    ttft: float | None = None
    itl: float | None = None

    @classmethod
    def parse(cls, text: str | None, name: str) -> Deadline:
        """The deadline that a text such as ``ttft:300,itl:50`` (milliseconds, in any order, either alone) means.

        Args:
            text: None: no deadline. name: of the option or request field, for the error.

        Raises:
            UsageError: any other text.
        """
        if text is None:
            return cls()
        if len(text) > MAX_CHARS or not _GRAMMAR.fullmatch(text):
            raise UsageError(
                f"{name}: expected ttft:MS, itl:MS or ttft:MS,itl:MS with milliseconds above 0, found '{text[:80]}'",
                param="deadline",
            )
        parts = (part.split(":") for part in text.split(","))
        return cls(**{key: float(number) / 1000 for key, number in parts})

    def over(self, default: Deadline) -> Deadline:
        """This one, with what it lacks taken from ``default``."""
        return Deadline(default.ttft if self.ttft is None else self.ttft, default.itl if self.itl is None else self.itl)

    def due(self, arrival: float) -> float:
        """When the first token of a request that arrived then is to be there."""
        return arrival + (PATIENCE if self.ttft is None else self.ttft)

    def __bool__(self) -> bool:
        return self.ttft is not None or self.itl is not None


NO_DEADLINE = Deadline()
