"""Where tokens begin in a text. Every tokenizer is held against texts in tests/serving/test_serving_logprobs.py."""

from __future__ import annotations

from small_tokenizers import byte_level

from llmctl.text.token_offsets import token_offsets


def test_parts_of_a_character_share_its_offset() -> None:
    tokenizer = byte_level()
    text = "aéb"
    ids = [tokenizer.token_to_id(c) or 0 for c in ("a", "Ã", "©", "b")]
    assert tokenizer.decode(ids) == text
    assert token_offsets(tokenizer, ids, text) == [0, 1, 1, 2]
    assert token_offsets(tokenizer, [], "") == []


def test_no_offset_is_beyond_the_text() -> None:
    """A tokenizer may make more characters of a text than it has."""
    tokenizer = byte_level()
    ids = [tokenizer.token_to_id(c) or 0 for c in "abcd"]
    assert token_offsets(tokenizer, ids, "ab") == [0, 1, 2, 2]
