"""Log-probabilities as answers show them: OpenAI's of completions and of chats, vLLM's of prompts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from llmctl.engine.output import PositionLogprobs, TokenText, prompt_positions
from llmctl.engine.step import TokenScores
from llmctl.serving.intake import Prompt
from llmctl.text.token_offsets import token_offsets
from llmctl.text.tokenizer import Tokenizer

_LOWEST_LOGPROB = -9999.0  # JSON has no -inf; the value other servers use


def finite(logprob: float) -> float | None:
    """A log-probability that JSON can hold; None for one that is not a number."""
    return None if math.isnan(logprob) else max(logprob, _LOWEST_LOGPROB)


def shown(token: TokenText, as_id: bool = False) -> str:
    """A token's name: its text; ``bytes:\\xe2…`` for a part of a character, as OpenAI writes it; ``token_id:7``, as
    vLLM does, of one that the tokenizer does not know, or of any when ``as_id``."""
    if as_id or token.data is None:
        return f"token_id:{token.token_id}"
    if "\ufffd" not in token.text or token.text.encode() == token.data:
        return token.text
    return "bytes:" + "".join(f"\\x{b:02x}" for b in token.data)


def chat_logprobs(positions: Sequence[PositionLogprobs] | None, as_ids: bool = False) -> dict[str, Any] | None:
    """OpenAI's ``choices[].logprobs`` of chat completions; None of None."""
    if positions is None:
        return None
    content = [
        {**_token_entry(position.token, as_ids), "top_logprobs": [_token_entry(t, as_ids) for t in position.top]}
        for position in positions
    ]
    return {"content": content}


def _token_entry(token: TokenText, as_ids: bool) -> dict[str, Any]:
    data = None if token.data is None else list(token.data)
    return {"token": shown(token, as_ids), "logprob": finite(token.logprob), "bytes": data}


def completion_logprobs(
    positions: Sequence[PositionLogprobs], as_ids: bool = False, start: int = 0
) -> dict[str, list[Any]]:
    """OpenAI's ``choices[].logprobs`` of completions; positions begin ``start`` characters into the text."""
    named = [_named(position, as_ids) for position in positions]
    return {
        "text_offset": [start + position.offset for position in positions],
        "token_logprobs": [top[name] for name, top in named],
        "tokens": [name for name, _ in named],
        "top_logprobs": [None if top[name] is None else top for name, top in named],
    }


def _named(position: PositionLogprobs, as_ids: bool) -> tuple[str, dict[str, float | None]]:
    """The token's name, and log-probabilities by name: its own, then the most likely ones'.

    A name is one token's: another of the same text goes by its id.
    """
    own = shown(position.token, as_ids)
    top = {own: finite(position.token.logprob)}
    for token in _others(position):
        name = shown(token, as_ids)
        top[shown(token, as_id=True) if name in top else name] = finite(token.logprob)
    return own, top


def _others(position: PositionLogprobs) -> Iterator[TokenText]:
    """The most likely tokens but the position's own."""
    return (token for token in position.top if token.token_id != position.token.token_id)


def echoed_positions(tokenizer: Tokenizer, prompt: Prompt, scores: TokenScores, top: int) -> list[PositionLogprobs]:
    """The prompt's tokens with the ``top`` most likely in their places."""
    offsets = token_offsets(tokenizer, prompt.token_ids, prompt.text or "")
    return prompt_positions(tokenizer, prompt.token_ids, scores, top, offsets)


def prompt_logprobs(
    tokenizer: Tokenizer, prompt: Prompt, scores: TokenScores, top: int
) -> list[dict[str, dict[str, Any]] | None]:
    """vLLM's ``prompt_logprobs``: by id, each of the prompt's tokens and the ``top`` most likely; the first is None."""
    positions = prompt_positions(tokenizer, prompt.token_ids, scores, top)[1:]
    return [None, *({str(t.token_id): _prompt_entry(t) for t in (p.token, *_others(p))} for p in positions)]


def _prompt_entry(token: TokenText) -> dict[str, Any]:
    decoded = None if token.data is None else token.text
    return {"logprob": finite(token.logprob), "rank": token.rank, "decoded_token": decoded}
