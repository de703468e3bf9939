"""Where tokens begin in the text that they were made of."""

from __future__ import annotations

from collections.abc import Sequence

from llmctl.text.detokenizer import IncrementalDetokenizer
from llmctl.text.tokenizer import Tokenizer


def token_offsets(tokenizer: Tokenizer, token_ids: Sequence[int], text: str) -> list[int]:
    """Characters of ``text`` before each token; before the character that it goes on with, of a token within one.

    Args:
        text: what was tokenized, or what the tokens decode to. A special token takes up characters only where the text
            spells it: one that the tokenizer adds, or that decoding leaves out, does not. Where a tokenizer changes
            what it reads (composes or drops characters), offsets are of what it made of it, up to the text's length.
    """
    detokenizer = IncrementalDetokenizer(tokenizer, ())
    offsets, at = [], 0
    for token_id in token_ids:
        offsets.append(min(at, len(text)))
        if token_id in tokenizer.special_token_ids:
            spelling = tokenizer.id_to_token(token_id) or ""
            at += len(spelling) if text.startswith(spelling, at) else 0
        else:
            at += len(detokenizer.push(token_id))
    return offsets
