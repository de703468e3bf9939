"""Token outputs to text: incremental detokenization, stop strings, log-probabilities with their tokens' text.

Runs wherever the text is wanted: in the API process when serving, next to the engine offline.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from llmctl.engine.llm_engine import TokenOutput
from llmctl.engine.request import FinishReason, RequestTimes
from llmctl.engine.sampling_params import SamplingParams
from llmctl.engine.step import TokenLogprobs, TokenScores
from llmctl.text.detokenizer import IncrementalDetokenizer, StopChecker
from llmctl.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TokenText:
    """A token with its log-probability (NaN: none is known).

    Attributes:
        text: has U+FFFD where ``data`` is a part of a character only. data: None where the tokenizer has no such token.
        rank: 1 = most likely; tokens that are as likely as one another rank alike.
    """

    token_id: int
    text: str
    data: bytes | None
    logprob: float
    rank: int


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """The token at a position, the most likely ones there, best first; ``offset``: characters of text before it."""

    token: TokenText
    top: tuple[TokenText, ...] = ()
    offset: int = 0


class TextOutput(msgspec.Struct, frozen=True):
    """What one step adds to one request's output.

    Attributes:
        text: new text; may be empty (a character or a possible stop string is not complete yet).
        token_ids: new tokens, the one that ended the output included.
        logprobs: one entry per new token; None when not asked for.
        finish_reason: None while it goes on. stop_reason: the stop string or stop token id that ended it.
        num_output_tokens: tokens generated so far. num_cached_tokens, prompt_scores, times, embedding: as in
            ``TokenOutput`` (a stop string ends the text before the engine knows, and gives no times).
    """

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...] | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    num_output_tokens: int
    num_cached_tokens: int
    prompt_scores: TokenScores | None
    times: RequestTimes | None
    embedding: NDArray[np.float32] | None = None


class Processed(NamedTuple):
    """Outputs of a step, and the requests that the engine must abort because a stop string ended them."""

    outputs: list[TextOutput]
    aborts: list[str]


def describe_token(tokenizer: Tokenizer, token_id: int, logprob: float, rank: int) -> TokenText:
    """A token with its text and bytes; special tokens have their vocabulary's spelling."""
    data = tokenizer.token_bytes(token_id)
    known = data or tokenizer.id_to_token(token_id) is not None
    return TokenText(token_id, data.decode("utf-8", "replace"), data if known else None, logprob, rank)


def describe_position(tokenizer: Tokenizer, token_id: int, entry: TokenLogprobs, offset: int) -> PositionLogprobs:
    """A position's tokens with their texts and bytes."""
    tops = zip(entry.top_ids, entry.top_logprobs, strict=True)
    return PositionLogprobs(
        describe_token(tokenizer, token_id, entry.logprob, entry.rank),
        tuple(describe_token(tokenizer, i, p, rank) for rank, (i, p) in enumerate(tops, start=1)),
        offset,
    )


def prompt_positions(
    tokenizer: Tokenizer, token_ids: Sequence[int], scores: TokenScores, top: int, offsets: Sequence[int] | None = None
) -> list[PositionLogprobs]:
    """The positions of a prompt; nothing is known of the first one's log-probability.

    Args:
        scores: of the tokens after the first. top: how many of the most likely tokens. offsets: of the tokens.
    """
    entries = [TokenLogprobs(math.nan, 0), *scores.entries([top] * len(scores))]
    rows = zip(token_ids, entries, offsets or [0] * len(token_ids), strict=True)
    return [describe_position(tokenizer, i, entry, at) for i, entry, at in rows if entry is not None]


class _Text:
    """The text side of one request. ``num_chars``: of its tokens' text so far, before any stop string."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        self.params = params
        self.num_tokens = 0
        self.num_chars = 0
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, prompt_ids, params.skip_special_tokens, params.shown_special_token_ids
        )
        self._stops = StopChecker(params.stop, params.include_stop_str_in_output)
        # A special token that is left out of the text is in no text that a stop string could be found in.
        self._unseen_stops = _special_tokens(tokenizer, params.stop) if params.skip_special_tokens else {}

    def push(self, token_id: int, *, ends: bool) -> tuple[str, str | None]:
        """Text released by one token, and the stop string it completes. A token that ``ends`` shows only on request."""
        self.num_tokens += 1
        if ends and not self.params.include_stop_str_in_output:
            return "", None
        text = self._detokenizer.push(token_id)
        self.num_chars += len(text)
        if self.num_tokens <= self.params.min_tokens:
            return text, None
        if self._unseen_stops and (stop := self._unseen_stops.get(token_id)) is not None:
            text, earlier = self.flush()
            if earlier is not None:
                return text, earlier
            return (text + stop if self.params.include_stop_str_in_output else text), stop
        return self._stops.push(text)

    def flush(self) -> tuple[str, str | None]:
        """All text still held back."""
        text, stop = self._stops.push(self._detokenizer.flush())
        return (text, stop) if stop is not None else (text + self._stops.flush(), None)


def _special_tokens(tokenizer: Tokenizer, texts: Iterable[str]) -> dict[int, str]:
    """Of some texts those that are special tokens, by id."""
    ids = {tokenizer.token_to_id(text): text for text in texts}
    return {token_id: text for token_id, text in ids.items() if token_id in tokenizer.special_token_ids}


class OutputProcessor:
    """Keeps the text state of every unfinished request of one model."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[str, _Text] = {}

    def add(self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        """Begin a request, before its first output."""
        self._texts[request_id] = _Text(self._tokenizer, prompt_ids, params)

    def drop(self, request_ids: Iterable[str]) -> None:
        """Forget requests that were aborted; later outputs of theirs are passed over."""
        for request_id in request_ids:
            self._texts.pop(request_id, None)

    def num_tokens(self, request_id: str) -> int:
        """How many tokens an unfinished request has so far; 0 for one that is not known."""
        text = self._texts.get(request_id)
        return 0 if text is None else text.num_tokens

    def process(self, outputs: Iterable[TokenOutput]) -> Processed:
        """The text of a step's outputs. Outputs of unknown (dropped, finished) requests are passed over."""
        processed = Processed([], [])
        for output in outputs:
            text = self._texts.get(output.request_id)
            if text is None:
                continue
            made = self._process(text, output)
            processed.outputs.append(made)
            if made.finish_reason is not None:
                del self._texts[output.request_id]
                if output.finish_reason is None:
                    processed.aborts.append(output.request_id)
        return processed

    def _process(self, text: _Text, output: TokenOutput) -> TextOutput:
        released = ""
        offsets: list[int] = []
        stop: str | None = None
        left = len(output.new_token_ids)
        for token_id in output.new_token_ids:
            left -= 1
            offsets.append(text.num_chars)
            ends = not left and output.finish_reason is FinishReason.STOP and not output.ends_in_text
            piece, stop = text.push(token_id, ends=ends)
            released += piece
            if stop is not None:
                break
        if stop is None and output.finish_reason is not None:
            piece, stop = text.flush()
            released += piece
        return TextOutput(
            output.request_id,
            released,
            output.new_token_ids[: len(offsets)] if left else output.new_token_ids,
            self._logprobs(output, offsets),
            output.finish_reason if stop is None else FinishReason.STOP,
            output.stop_reason if stop is None else stop,
            text.num_tokens,
            output.num_cached_tokens,
            output.prompt_scores,
            output.times,
            output.embedding,
        )

    def _logprobs(self, output: TokenOutput, offsets: Sequence[int]) -> tuple[PositionLogprobs, ...] | None:
        """Of the tokens that ``offsets`` has; a stop string may have ended the output before the others."""
        if output.logprobs is None:
            return None
        rows = zip(output.new_token_ids, output.logprobs, offsets, strict=False)
        return tuple(describe_position(self._tokenizer, *row) for row in rows)


def merge_outputs(parts: Sequence[TextOutput]) -> TextOutput:
    """One request's outputs as one: texts, tokens and log-probabilities joined, the rest from where it was given."""
    last = parts[-1]
    logprobs = [p.logprobs for p in parts if p.logprobs is not None]
    return msgspec.structs.replace(
        last,
        text="".join(p.text for p in parts),
        token_ids=tuple(t for p in parts for t in p.token_ids),
        logprobs=tuple(entry for part in logprobs for entry in part) if logprobs else None,
        prompt_scores=next((p.prompt_scores for p in parts if p.prompt_scores is not None), None),
    )
