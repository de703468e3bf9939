"""What may be shown of text that clients sent: no API key of the server, no query of a URL, no user in one.

Everything that is logged or traced passes through here. The server knows only digests of its keys, so that words are
hashed, and the parts of words that a key could be.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from urllib.parse import unquote

from llmctl.serving.keys import ServerKeys, key_digest

REDACTED = "[redacted]"
LONGEST_WORD = 256
_MOST_PARTS, _MOST_PARTS_OF_LONG_WORDS = 64, 16
"""Of a word, that a key may have: bounds what a word costs."""
MOST_WORK = 2**14
"""Digests that a line is worth, some 10 ms. Lines are made in the event loop, and of what clients send."""
_WORK_OF_CODES = 6
"""What looking below ``%``-codes costs, in digests."""

_USER = re.compile(r"//[^/?#\s\"']*(?:@|%40)")
_QUERY = re.compile(r"(/[^\s?\"'<>]*)\?[^\s\"'<>]+")
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

        A key is found wherever it stands between characters that are neither letters nor digits, plain or as
        ``%``-codes. It may have up to 31 of such characters inside, 7 within a word longer than ``LONGEST_WORD``.
        """
        if not self._keys.ever_accepted:
            return text
        return _WORD.sub(lambda match: self._word(match[0]), text)

    def _word(self, word: str) -> str:
        # Of "%3Babc" both readings count: the letters may begin after the code, or after the percent sign.
        ends_of_codes = {match.end() for match in _CODE.finditer(word)} if "%" in word else set()
        starts = sorted({match.start() for match in _PART.finditer(word)} | ends_of_codes - {len(word)})
        borders = [*starts, len(word)]
        most = _MOST_PARTS if len(word) <= LONGEST_WORD else _MOST_PARTS_OF_LONG_WORDS
        kept: list[str] = []
        at = 0
        while at < len(starts):
            ends = range(min(len(starts), at + most), at, -1)
            end = next((end for end in ends if self._is_key(word[borders[at] : borders[end]])), None)
            kept.append(word[borders[at] : borders[at + 1]] if end is None else REDACTED)
            at = at + 1 if end is None else end
        return "".join(kept)

    def _is_key(self, text: str) -> bool:
        accepted = self._keys.ever_accepted
        return any(key_digest(form.encode(errors="replace")) in accepted for form in _forms(text))


def _left_out(word: str) -> str:
    return f"[{len(word)} characters]"


def _work(word: str) -> int:
    """Digests that a search of a word for keys takes at most."""
    parts = len(_PART.findall(word))
    return parts * min(parts, _MOST_PARTS) * (_WORK_OF_CODES if "%" in word else 1)


def _forms(text: str) -> Iterator[str]:
    """A text, and what it says under up to two layers of ``%``-codes."""
    yield text
    for _ in range(2):
        plain = unquote(text) if "%" in text else text
        if plain == text:
            return
        text = plain
        yield text


class RedactingFormatter(logging.Formatter):
    """Formats records, their tracebacks included, as ``Redactor.line`` shows them."""

    def __init__(self, redactor: Redactor, fmt: str) -> None:
        super().__init__(fmt)
        self._redactor = redactor

    def format(self, record: logging.LogRecord) -> str:
        """Part of ``logging.Formatter``."""
        return "\n".join(map(self._redactor.line, super().format(record).split("\n")))
