"""Which bytes each token contributes to a text.

Most decoders are context-free but for two things: a text's first token may lose a leading space, and one character's
UTF-8 bytes may be spread over tokens. So a text is the concatenation of its tokens' bytes, decoded as UTF-8.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer as _Backend

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_level_alphabet() -> dict[str, int]:
    """Character -> byte of GPT-2's byte-level BPE: printable bytes stand for themselves, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_ALPHABET = byte_level_alphabet()


class TokenBytes:
    """The bytes of every token of a ``tokenizers`` tokenizer, computed on demand and remembered."""

    def __init__(self, backend: _Backend) -> None:
        self._backend = backend
        decoder = _decoder_state(backend)
        kinds = {part["type"] for part in _parts(decoder)}
        self._byte_level = "ByteLevel" in kinds
        self._byte_fallback = "ByteFallback" in kinds
        self._special = {i: t.content for i, t in backend.get_added_tokens_decoder().items() if t.special}
        self._anchor = None if self._byte_level else self._find_anchor()
        self._middle: dict[int, bytes] = {}
        self._texts: dict[int, str | None] = {}

    def middle(self, token_id: int) -> bytes:
        """Bytes of a token within a text; b"" for an unknown id."""
        found = self._middle.get(token_id)
        if found is None:
            found = self._middle[token_id] = self._compute(token_id)
        return found

    def text(self, token_id: int) -> str | None:
        """``middle`` as text; None when it is not UTF-8 by itself."""
        try:
            return self._texts[token_id]
        except KeyError:
            found = self._texts[token_id] = _whole(self.middle(token_id))
            return found

    def first(self, token_id: int) -> bytes:
        """Bytes of a token at a text's start."""
        middle = self.middle(token_id)
        if self._byte_level or (len(middle) == 1 and middle != b" "):
            return middle
        return self._backend.decode([token_id], skip_special_tokens=False).encode()

    def _compute(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_level:
            if all(c in _ALPHABET for c in token):
                return bytes(_ALPHABET[c] for c in token)
            return token.encode()
        if self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        if self._anchor is None:
            return self._backend.decode([token_id], skip_special_tokens=False).encode()
        anchor_text = self._backend.decode([self._anchor], skip_special_tokens=False)
        both = self._backend.decode([self._anchor, token_id], skip_special_tokens=False)
        return both[len(anchor_text) :].encode()

    def _find_anchor(self) -> int | None:
        """A token of plain letters: whatever is decoded after it is in the middle of a text."""
        for token_id in range(self._backend.get_vocab_size(with_added_tokens=False)):
            token = self._backend.id_to_token(token_id)
            if token and token_id not in self._special and token.isascii() and token.isalpha():
                return token_id
        return None


def _whole(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def _decoder_state(backend: _Backend) -> dict[str, Any] | None:
    """The ``decoder`` section of tokenizer.json."""
    state: dict[str, Any] | None = json.loads(backend.decoder.__getstate__()) if backend.decoder else None
    return state


def _parts(decoder: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A decoder's parts, sequences flattened."""
    if decoder is None:
        return
    if decoder.get("type") == "Sequence":
        for part in decoder["decoders"]:
            yield from _parts(part)
        return
    yield decoder
