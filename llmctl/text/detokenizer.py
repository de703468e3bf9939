"""Token ids to text as they are generated: no character is ever split, and no stop string slips out in halves."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from llmctl.text.output_parser.cursor import partial_match
from llmctl.text.tokenizer import Tokenizer

_UTF8_LONGEST = 4


class IncrementalDetokenizer:
    """Text of a growing token sequence, O(1) a token.

    The concatenation of what ``push`` and ``flush`` return is what the output adds to the decoded prompt. Bytes that
    are not UTF-8 become U+FFFD each, maximal part by maximal part.

    Args:
        tokenizer: the model's. prompt_ids: what precedes the output; decides the fate of a leading space, and a
            character begun there is completed here.
        skip_special_tokens: leave special tokens out, but for those ``shown``.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        skip_special_tokens: bool = True,
        shown: Sequence[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped: frozenset[int] = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        if shown:
            self._skipped -= frozenset(shown)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        tail = self._prompt_tail(prompt_ids)
        self._begun = bool(tail)
        self._utf8.decode(tail)
        self._between_characters = not self._utf8.getstate()[0]

    def push(self, token_id: int) -> str:
        """The text that this token completes; never a part of a character."""
        if self._between_characters and self._begun and token_id not in self._skipped:
            text = self._tokenizer.token_text(token_id)
            if text is not None:
                return text
        text = self._utf8.decode(self._bytes(token_id))
        self._between_characters = not self._utf8.getstate()[0]
        return text

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was never completed, else nothing."""
        return self._utf8.decode(b"", final=True)

    def _bytes(self, token_id: int) -> bytes:
        if token_id in self._skipped:
            return b""
        data = self._tokenizer.token_bytes(token_id)
        if not self._begun and data:
            self._begun = True
            return self._tokenizer.first_token_bytes(token_id)
        return data

    def _prompt_tail(self, prompt_ids: Sequence[int]) -> bytes:
        """The prompt's last bytes, enough to hold a character that its end leaves unfinished."""
        tail = b""
        for token_id in reversed(prompt_ids):
            if token_id not in self._skipped:
                tail = self._tokenizer.token_bytes(token_id) + tail
            if len(tail) >= _UTF8_LONGEST:
                break
        return tail


class StopChecker:
    """Finds stop strings in text that arrives in pieces, and holds back text that may be the start of one.

    Args:
        stops: non-empty strings. include_stop: release the stop string itself too.
    """

    def __init__(self, stops: Sequence[str], include_stop: bool = False) -> None:
        self._stops = tuple(stops)
        self._include_stop = include_stop
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Text that may be released now, and the stop string found, if any.

        The match is the one that completes first (the longest, of several), however the text was cut into pieces.
        After a match the text is over: what follows it is dropped.
        """
        if not self._stops:
            return text, None
        self._held += text
        found = min(
            ((at + len(stop), at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0), default=None
        )
        if found is None:
            return self._release(len(self._held) - partial_match(self._held, self._stops)), None
        end, start, stop = found
        released = self._release(end if self._include_stop else start)
        self._held = ""
        return released, stop

    def flush(self) -> str:
        """The text held back, when the output ended without a stop string."""
        return self._release(len(self._held))

    def _release(self, count: int) -> str:
        released, self._held = self._held[:count], self._held[count:]
        return released
