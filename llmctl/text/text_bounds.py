"""How few tokens a text can be, told from its bytes alone.

A token stands for no more bytes than the longest one of the vocabulary, so a text of B bytes is at least B / longest
tokens, unless the tokenizer drops some of it. What each part of one may drop or shorten is listed here; with a part
that is not, nothing is known of its texts.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer as _Backend

from llmctl.text.token_bytes import byte_level_alphabet

# The most bytes of text that a byte of a normalizer's output can stand for.
_SHRINKS = {"NFC": 3, "NFD": 3, "NFKC": 4, "NFKD": 4, "Lowercase": 3, "ByteLevel": 1, "Prepend": 1}
_KEEPING_SPLITTERS = frozenset({"ByteLevel", "Metaspace", "Digits"})
# Every byte that UTF-8 spells whitespace with: what is left of a text without them is no whitespace.
_WHITESPACE_BYTES = bytes(sorted({b for i in range(0x3001) if chr(i).isspace() for b in chr(i).encode()}))

_UTF8_BYTES = frozenset(range(256)) - {0xC0, 0xC1, *range(0xF5, 0x100)}


class TextBounds:
    """What a tokenizer's vocabulary says of the length of texts. Reads all of it: a few ms per 10 000 tokens."""

    def __init__(self, backend: _Backend) -> None:
        shrink = _shrink(_state(backend.normalizer))
        dropped = _dropped_bytes(backend)
        known = dropped is not None and (not dropped or backend.normalizer is None)
        keeps = known and _splitter_keeps(_state(backend.pre_tokenizer))
        self._longest = _longest(backend) * shrink if keeps and shrink else 0
        self._uncounted = dropped or b""
        added = backend.get_added_tokens_decoder().values()
        if any(token.lstrip or token.rstrip for token in added):  # it takes any amount of whitespace beside it
            self._uncounted += _WHITESPACE_BYTES

    def least_tokens(self, text: str) -> int:
        """A number of tokens that the text surely has, special tokens that frame it aside; 0 when nothing is known."""
        if not self._longest:
            return 0
        data = text.encode("utf-8", "surrogatepass")
        if self._uncounted:
            data = data.translate(None, self._uncounted)
        return -(-len(data) // self._longest)

    def bytes_of(self, tokens: int) -> int | None:
        """The most bytes of UTF-8 that so many tokens can stand for, those that are dropped aside; None when nothing is
        known."""
        return self._longest * tokens or None


def _state(part: Any) -> dict[str, Any]:
    """A part's section of tokenizer.json; {} for none."""
    state: dict[str, Any] = {} if part is None else json.loads(part.__getstate__())
    return state


def _shrink(normalizer: dict[str, Any]) -> int:
    """The most bytes of text per byte of its normal form; 0 when there is no such number."""
    kind = normalizer.get("type")
    if kind is None:
        return 1
    if kind == "Sequence":
        product = 1
        for part in normalizer["normalizers"]:
            product *= _shrink(part)
        return product
    if kind == "Replace":
        pattern = normalizer["pattern"].get("String")
        content = normalizer["content"].encode()
        return 0 if not pattern or not content else -(-len(pattern.encode()) // len(content))
    return _SHRINKS.get(kind, 0)


def _splitter_keeps(splitter: dict[str, Any]) -> bool:
    kind = splitter.get("type")
    if kind == "Sequence":
        return all(_splitter_keeps(part) for part in splitter["pretokenizers"])
    if kind in ("Split", "Punctuation"):
        return bool(splitter["behavior"] != "Removed")
    return kind is None or kind in _KEEPING_SPLITTERS


def _dropped_bytes(backend: _Backend) -> bytes | None:
    """The bytes that are in no token, which a model may drop from a text; None where whole words may be unknown."""
    model = backend.model
    if type(model).__name__ not in ("BPE", "Unigram"):
        return None
    if getattr(model, "byte_fallback", False):
        known = all(backend.token_to_id(f"<0x{b:02X}>") is not None for b in range(256))
        return b"" if known else None
    if not _is_byte_level(backend):
        return None
    return bytes(b for c, b in byte_level_alphabet().items() if b in _UTF8_BYTES and backend.token_to_id(c) is None)


def _is_byte_level(backend: _Backend) -> bool:
    splitter, normalizer = _state(backend.pre_tokenizer), _state(backend.normalizer)
    parts = [splitter, *splitter.get("pretokenizers", ()), normalizer, *normalizer.get("normalizers", ())]
    return any(part.get("type") == "ByteLevel" for part in parts)


def _longest(backend: _Backend) -> int:
    """Bytes of the longest token. A byte-level token has a character per byte."""
    added = backend.get_added_tokens_decoder()
    byte_level = _is_byte_level(backend)
    longest = 1
    for token_id in range(backend.get_vocab_size(with_added_tokens=True)):
        token = backend.id_to_token(token_id) or ""
        size = len(token) if byte_level and token_id not in added else len(token.encode())
        longest = max(longest, size)
    return longest
