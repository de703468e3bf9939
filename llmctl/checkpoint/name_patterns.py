"""How a config names modules: each as it is, or ``re:`` and a regular expression that the name begins with.

Backtracking may take for ever, and some patterns in use look ahead, which no engine does in linear time: all that a
config's patterns are matched with has to be done within ``SECONDS``. To compile one takes as long as it is when its
repetitions are written out, so that is bounded, too.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable

from llmctl.errors import CheckpointError

SECONDS = 5.0
"""Patterns in use take microseconds a name."""
MOST_CHARS = 10**5
"""Of a list's patterns, written out; takes half a second at most to compile. Those in use have hundreds."""
_REGEX = "re:"
_LEAST_TIMES = re.compile(r"\{\s*(\d+)")


def check_patterns(entries: Iterable[str], where: str) -> None:
    """Refuse ``re:`` entries that cannot be compiled, or not in time.

    Raises:
        CheckpointError: naming the entry.
    """
    import regex

    left = MOST_CHARS
    for entry in entries:
        if not entry.startswith(_REGEX):
            continue
        left -= _written_out(entry)
        if left < 0:
            raise CheckpointError(
                f"{where}: '{entry[:80]}': expected patterns of at most {MOST_CHARS} characters together, repetitions "
                "written out"
            )
        try:
            regex.compile(entry.removeprefix(_REGEX))
        except (regex.error, RecursionError) as error:
            raise CheckpointError(f"{where}: '{entry[:80]}' is no regular expression: {error}") from error


def _written_out(pattern: str) -> int:
    """Characters of a pattern that says each repetition as often as it must occur, at most: as if all were nested."""
    times = 1
    for count in _LEAST_TIMES.findall(pattern):
        times = min(MOST_CHARS + 1, times * max(1, int(count[:9])))
    return len(pattern) * times


class NameMatcher:
    """Matches the modules of one checkpoint."""

    def __init__(self) -> None:
        self._left = SECONDS

    def matches(self, names: Iterable[str], entry: str, *, whole: bool = False) -> bool:
        """Whether an entry names a module.

        Args:
            names: what the module is called. whole: a pattern has to match all of a name.

        Raises:
            ValueError: no time is left.
        """
        if not entry.startswith(_REGEX):
            return entry in names
        return any(self._fits(name, entry, whole) for name in names)

    def _fits(self, name: str, entry: str, whole: bool) -> bool:
        import regex

        began = time.perf_counter()
        try:
            match = regex.fullmatch if whole else regex.match
            found = match(entry.removeprefix(_REGEX), name, timeout=self._left)
        except MemoryError as error:  # calls itself without an end
            raise ValueError(f"'{entry[:80]}' takes more memory than there is to match") from error
        except TimeoutError:
            self._left = 0.0
        else:
            self._left -= time.perf_counter() - began
        if self._left <= 0:
            raise ValueError(f"'{entry[:80]}' takes more than {SECONDS:g} s to match; name the modules without it")
        return found is not None
