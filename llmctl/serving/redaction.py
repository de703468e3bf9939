"""What may be shown of text that clients sent: no API key of the server, no query of a URL, no user in one.

Everything that is logged or traced passes through here. The server knows only digests of its keys, so that words are
hashed, and the parts of words that a key could be.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from urllib.parse import unquote_to_bytes

from llmctl.serving.keys import ServerKeys, key_hash

REDACTED = "[redacted]"
LONGEST_WORD = 256
_MANY_PARTS = 96
_MOST_PARTS, _MOST_PARTS_OF_MANY = 64, 16
"""Of a word, that a key may have; the latter in a word that has more than ``_MANY_PARTS``, which bounds the work."""
MOST_WORK = 2**14
"""Digests that a line is worth. Lines are made in the event loop, and of what clients send."""

_USER = re.compile(r"//[^/?#\s\"']*(?:@|%40)")
# A path is looked for at the first of its characters only, and taken whole: otherwise a word of nothing but slashes
# takes as many searches as it has characters.
_QUERY = re.compile(r"(?<![^\s?\"'<>])([^\s?\"'<>/]*+/[^\s?\"'<>]*+)\?[^\s\"'<>]+")
_WORD = re.compile(r"\S+")
_PART = re.compile(r"[^\W_]+|[\W_]")  # a run of letters and digits, or another character
_CODE = re.compile(r"%(?:25)*[0-9A-Fa-f]{2}")


class Redactor:
    """Makes text fit to be shown.

    Args:
        keys: the keys that must not be in it: those of now and those that it had before.
    """

    def __init__(self, keys: ServerKeys) -> None:
        self._keys = keys

    def line(self, text: str) -> str:
        """A text without keys, queries and users of URLs. Words longer than ``LONGEST_WORD`` are left out, as are those
        that cost more than what the words before them leave of ``MOST_WORK``.
        """
        short = _WORD.sub(lambda m: m[0] if len(m[0]) <= LONGEST_WORD else _left_out(m[0]), text)
        shown = _QUERY.sub(rf"\1?{REDACTED}", _USER.sub(f"//{REDACTED}@", short))
        if not self._keys.ever_accepted:
            return shown
        left = MOST_WORK

        def word(match: re.Match[str]) -> str:
            nonlocal left
            if (work := _work(match[0])) > left:
                return _left_out(match[0])
            left -= work
            return self._word(match[0])

        return _WORD.sub(word, shown)

    def prose(self, text: str) -> str:
        """A text without keys.

        A key is found wherever it stands between characters that are neither letters nor digits, plain or under up to
        two layers of ``%``-codes. It may have up to 31 of such characters inside, 7 within a word of more than
        ``_MANY_PARTS`` parts.
        """
        if not self._keys.ever_accepted:
            return text
        return _WORD.sub(lambda match: self._word(match[0]), text)

    def _word(self, word: str) -> str:
        readings = _readings(word)
        kept: list[str] = []
        at = 0
        for start in sorted({start for reading in readings for start in reading}):
            if start < at:
                continue
            end = max(self._end_of_key(reading, start) for reading in readings)
            if end > start:
                kept += [word[at:start], REDACTED]
                at = end
        return "".join([*kept, word[at:]])

    def _end_of_key(self, reading: Mapping[int, tuple[bytes, int]], start: int) -> int:
        """Where the longest key ends that begins at ``start``; 0: there is none."""
        accepted, hashed = self._keys.ever_accepted, key_hash()
        end, found = start, 0
        for _ in range(_most_parts(len(reading))):
            if end not in reading:
                break
            part, end = reading[end]
            hashed.update(part)
            if hashed.digest() in accepted:
                found = end
        return found


def _readings(word: str) -> list[dict[int, tuple[bytes, int]]]:
    """The parts of a word, as it stands and under one and two layers of codes: start -> (what it says, its end)."""
    starts = {match.start() for match in _PART.finditer(word)}
    if "%" not in word:
        return [_parts(word, starts, 0)]
    codes = [match.span() for match in _CODE.finditer(word)]
    # Of "%3Babc" both count: the letters may begin after the code, or after the percent sign, which is none then.
    starts |= {end for _, end in codes}
    whole = starts - {at for start, end in codes for at in range(start + 1, end)}
    return [_parts(word, starts, 0), _parts(word, whole, 1), _parts(word, whole, 2)]


def _parts(word: str, starts: Iterable[int], layers: int) -> dict[int, tuple[bytes, int]]:
    parts = {}
    for start, end in pairwise(sorted({*starts, len(word)})):
        part = word[start:end].encode(errors="replace")
        for _ in range(layers):
            part = unquote_to_bytes(part)
        parts[start] = (part, end)
    return parts


def _left_out(word: str) -> str:
    return f"[{len(word)} characters]"


def _work(word: str) -> int:
    """Digests that a search of a word for keys takes at most."""
    parts = len(_PART.findall(word))
    if "%" not in word:
        return parts * _most_parts(parts)
    parts += len(_CODE.findall(word))
    return 3 * parts * _most_parts(parts)


def _most_parts(parts: int) -> int:
    """Of how many parts a key may be in a word that has so many."""
    return _MOST_PARTS if parts <= _MANY_PARTS else _MOST_PARTS_OF_MANY


class RedactingFormatter(logging.Formatter):
    """Formats records, their tracebacks included, as ``Redactor.line`` shows them."""

    def __init__(self, redactor: Redactor, fmt: str) -> None:
        super().__init__(fmt)
        self._redactor = redactor

    def format(self, record: logging.LogRecord) -> str:
        """Part of ``logging.Formatter``."""
        return "\n".join(map(self._redactor.line, super().format(record).split("\n")))
