"""How a config names modules: each as it is, or ``re:`` and a regular expression that the name begins with.

Backtracking may take for ever, and some patterns in use look ahead, which no engine does in linear time: all that a
config's patterns are matched with has to be done within ``SECONDS``.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from llmctl.errors import CheckpointError

SECONDS = 5.0
"""Patterns in use take microseconds a name."""
_REGEX = "re:"


def check_patterns(entries: Iterable[str], where: str) -> None:
    """Refuse ``re:`` entries that cannot be compiled.

    Raises:
        CheckpointError: naming the entry.
    """
    import regex

    for entry in entries:
        try:
            if entry.startswith(_REGEX):
                regex.compile(entry.removeprefix(_REGEX))
        except (regex.error, OverflowError, RecursionError) as error:
            raise CheckpointError(f"{where}: '{entry[:80]}' is no regular expression: {error}") from error


class NameMatcher:
    """Matches the modules of one checkpoint."""

    def __init__(self) -> None:
        self._left = SECONDS

    def matches(self, names: Iterable[str], entry: str) -> bool:
        """Whether an entry names a module.

        Args:
            names: what the module is called.

        Raises:
            ValueError: no time is left.
        """
        if not entry.startswith(_REGEX):
            return entry in names
        return any(self._begins(name, entry) for name in names)

    def _begins(self, name: str, entry: str) -> bool:
        import regex

        began = time.perf_counter()
        try:
            found = regex.match(entry.removeprefix(_REGEX), name, timeout=self._left)
        except TimeoutError:
            self._left = 0.0
        else:
            self._left -= time.perf_counter() - began
        if self._left <= 0:
            raise ValueError(f"'{entry[:80]}' takes more than {SECONDS:g} s to match; name the modules without it")
        return found is not None
