"""Text that arrives in pieces, read by generators that yield where they need more of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from functools import cache
from typing import TypeVar

T = TypeVar("T")
Reading = Generator[None, None, T]
"""A reader: yields to be resumed when there is more text, or when it is known that there is none."""
Sink = Callable[[str], object]

_SPACE = re.compile(r"\s*")


def partial_match(text: str, markers: Sequence[str]) -> int:
    """Length of the longest end of ``text`` that begins some marker, and is not the whole of one; 0 if none does."""
    longest = max(map(len, markers), default=0)
    for start in range(max(0, len(text) - longest + 1), len(text)):
        end = text[start:]
        if any(marker.startswith(end) for marker in markers):
            return len(end)
    return 0


@cache
def _first_of(markers: tuple[str, ...]) -> re.Pattern[str]:
    """Finds the marker that begins first: each would be looked for through the whole rest, whose length is anything."""
    return re.compile("|".join(map(re.escape, markers)) or "(?!)")


class Cursor:
    """What has come of a text and is not read yet. What is read while marked can be had back.

    No answer depends on where the text was cut into pieces: a reader that could get another one with more text waits.
    """

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._ended = False
        self._marked: list[str] | None = None

    def feed(self, text: str) -> None:
        """Add a piece."""
        self._text = self._text[self._at :] + text
        self._at = 0

    def end(self) -> None:
        """There is no more."""
        self._ended = True

    def mark(self, before: str = "") -> None:
        """Keep what is read from here on, after ``before``, which was read."""
        self._marked = [before]

    def unmark(self) -> str:
        """What was read since ``mark``, if that still holds; keep no more."""
        marked, self._marked = self._marked, None
        return "".join(marked or ())

    def take(self, count: int) -> str:
        """Read so many characters that have come."""
        taken = self._text[self._at : self._at + count]
        self._at += count
        if self._marked is not None:
            self._marked.append(taken)
        return taken

    def run(self, pattern: re.Pattern[str]) -> str:
        """Read what has come and matches here; a pattern of single characters, repeated."""
        match = pattern.match(self._text, self._at)
        return self.take(match.end() - self._at) if match else ""

    def peek(self) -> Reading[str]:
        """The next character; "" at the end."""
        while self._at == len(self._text) and not self._ended:
            yield
        return self._text[self._at : self._at + 1]

    def space(self) -> Reading[str]:
        """Read white space; the character after it is returned, and not read."""
        while True:
            self.run(_SPACE)
            char = yield from self.peek()
            if not char.isspace():
                return char

    def accept(self, literal: str) -> Reading[bool]:
        """Read ``literal`` if it comes next."""
        while True:
            found = self._text[self._at : self._at + len(literal)]
            if len(found) == len(literal) or self._ended or not literal.startswith(found):
                break
            yield
        if found != literal:
            return False
        self.take(len(literal))
        return True

    def until(self, markers: tuple[str, ...], sink: Sink) -> Reading[str | None]:
        """Read up to and with the marker that begins first (of several there, the one named first).

        ``sink`` is given the text before it as it comes. Returns the marker; None when the text ends without one. No
        marker may begin with another.
        """
        longest = max(map(len, markers), default=0)
        while True:
            found = _first_of(markers).search(self._text, self._at)
            # A marker that begins earlier may be incomplete as yet.
            end = self._text[max(self._at, len(self._text) - longest) :]
            free = len(self._text) - (0 if self._ended else partial_match(end, markers))
            stop = free if found is None else min(free, found.start())
            if stop > self._at:
                sink(self.take(stop - self._at))
            if found is not None and stop == found.start():
                return self.take(len(found[0]))
            if self._ended:
                return None
            yield
