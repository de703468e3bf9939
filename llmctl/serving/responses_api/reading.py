"""An answer's text as pieces, and which tokens' log-probabilities are those of its messages."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from llmctl.engine.output import PositionLogprobs, TextOutput
from llmctl.serving.tools.message import MessageReader
from llmctl.text.output_parser.parser import Piece


class ScoredReader:
    """Pieces of one answer as it is written, those of content with the log-probabilities of their tokens.

    Where these are asked for, text is read token by token, so that they do not depend on how it came. A piece of
    content has the tokens since the piece before, but for those whose text ends before its own begins: markers.

    Args:
        reader: None: all text is content.

    Attributes:
        rest: positions of tokens that no piece has come after.
    """

    def __init__(self, reader: MessageReader | None) -> None:
        self.rest: list[PositionLogprobs] = []
        self._reader = reader
        self._ahead: deque[PositionLogprobs] = deque()  # tokens whose text has not come
        self._chars = 0
        self._unclaimed = ""  # the text since the last piece

    @property
    def complete(self) -> Sequence[bool]:
        """Of each call so far, whether its arguments are a whole JSON object."""
        return () if self._reader is None else self._reader.complete

    def read(self, output: TextOutput) -> Iterator[tuple[Piece, Sequence[PositionLogprobs]]]:
        """What a delta of the output adds."""
        last = output.finish_reason is not None
        if output.logprobs is None and not self._ahead:
            yield from self._scored(self._pieces(output.text, last=last))
            return
        self._ahead.extend(output.logprobs or ())
        for text in self._by_tokens(output.text):
            yield from self._scored(self._pieces(text, last=False))
        if last:
            self.rest += self._ahead
            yield from self._scored(self._pieces("", last=True))

    def _by_tokens(self, text: str) -> Iterator[str]:
        """A text in parts of a token each, whose positions are at the end of ``rest`` by then."""
        start, end = self._chars, self._chars + len(text)
        while self._chars < end:
            while self._ahead and self._ahead[0].offset <= self._chars:
                self.rest.append(self._ahead.popleft())
            stop = min(self._ahead[0].offset, end) if self._ahead else end
            part = text[self._chars - start : stop - start]
            self._chars = stop
            self._unclaimed += part
            yield part

    def _pieces(self, text: str, *, last: bool) -> list[Piece]:
        if self._reader is not None:
            return self._reader.read(text, last=last)
        return [Piece("content", text)] if text else []

    def _scored(self, pieces: list[Piece]) -> Iterator[tuple[Piece, Sequence[PositionLogprobs]]]:
        if not pieces:
            return
        positions, self.rest = self.rest, []
        text, self._unclaimed = self._unclaimed, ""
        for piece in pieces:
            if piece.kind == "content":
                begin = self._chars - len(text) + max(0, text.rfind(piece.text))
                yield piece, _from(begin, positions)
                positions = []
            else:
                yield piece, ()


def _from(begin: int, positions: Sequence[PositionLogprobs]) -> Sequence[PositionLogprobs]:
    """Positions but for those whose texts end at ``begin`` or before."""
    ends = [position.offset for position in positions[1:]]
    first = next((i for i, end in enumerate(ends) if end > begin or positions[i].offset >= begin), len(ends))
    return positions[first:]
