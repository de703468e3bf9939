"""A text's least number of tokens is never more than it has, and says nothing where a tokenizer may drop text."""

from __future__ import annotations

import random
import unicodedata

import pytest
from small_tokenizers import TEXT, byte_fallback_backend, byte_level_backend, metaspace_backend
from tokenizers import AddedToken, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from llmctl.text.text_bounds import TextBounds
from llmctl.text.token_bytes import byte_level_alphabet


def texts() -> list[str]:
    rng = random.Random(3)
    alphabet = "aé 世\U0001d400\u1f82가\u3000\t<|im_end|>😀"
    mixed = ["".join(rng.choices(alphabet, k=rng.randrange(1, 300))) for _ in range(200)]
    return [*TEXT, *mixed, " " * 1000, "<tool call>" * 50, unicodedata.normalize("NFD", "\u1f82각") * 100]


@pytest.mark.parametrize("make", [byte_level_backend, byte_fallback_backend])
@pytest.mark.parametrize(
    "normalizer", [None, normalizers.NFC(), normalizers.NFKC(), normalizers.Replace("  ", "x"), normalizers.Lowercase()]
)
def test_no_text_has_fewer_tokens(make: object, normalizer: object) -> None:
    backend = make()  # type: ignore[operator]
    if normalizer is not None:
        own = [] if backend.normalizer is None else [backend.normalizer]
        backend.normalizer = normalizers.Sequence([normalizer, *own])
    bounds = TextBounds(backend)
    for text in texts():
        assert 0 < bounds.least_tokens(text) <= len(backend.encode(text, add_special_tokens=False))


def test_the_bound_is_the_longest_token_in_bytes() -> None:
    backend = byte_level_backend()
    bounds = TextBounds(backend)
    longest = max(len(token) for token in backend.get_vocab() if "é̂" not in token)
    assert bounds.least_tokens("a" * 10 * longest) == 10
    assert bounds.least_tokens("a" * 10 * longest + "b") == 11
    assert bounds.least_tokens("世" * longest) == 3


def test_whitespace_that_an_added_token_takes_does_not_count() -> None:
    backend = byte_level_backend()
    backend.add_tokens([AddedToken("<|end|>", rstrip=True)])
    text = "<|end|>" + " \u3000\n\u2028" * 5000
    assert len(backend.encode(text, add_special_tokens=False)) == 1
    assert TextBounds(backend).least_tokens(text) == 1
    assert TextBounds(backend).least_tokens("a" * 5000) > 400


def test_bytes_that_are_in_no_token_do_not_count() -> None:
    """Vocabularies leave out bytes that never came up in training, and those that UTF-8 has not."""
    vocab = {
        c: i for i, c in enumerate(sorted(byte_level_alphabet())) if byte_level_alphabet()[c] not in (0, 7, 0xC0, 0xFF)
    }
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    text = "\0\7" * 500 + "ab世"
    assert TextBounds(backend).least_tokens(text) == len(backend.encode(text)) == 5
    backend.normalizer = normalizers.NFC()
    assert TextBounds(backend).least_tokens(text) == 0


def _unknown_dropped() -> Backend:
    return Backend(models.BPE(vocab={"a": 0}, merges=[]))


def _with(normalizer: object = None, splitter: object = None) -> Backend:
    backend = byte_level_backend()
    if normalizer is not None:
        backend.normalizer = normalizer
    if splitter is not None:
        backend.pre_tokenizer = pre_tokenizers.Sequence([splitter, backend.pre_tokenizer])
    return backend


@pytest.mark.parametrize(
    "backend",
    [
        metaspace_backend(),  # unknown characters are fused
        _unknown_dropped(),
        _with(normalizers.Strip()),
        _with(normalizers.StripAccents()),
        _with(normalizers.Replace(" ", "")),
        _with(splitter=pre_tokenizers.WhitespaceSplit()),
        _with(splitter=pre_tokenizers.Split(" ", "removed")),
    ],
)
def test_nothing_is_known_where_text_may_be_dropped(backend: Backend) -> None:
    assert TextBounds(backend).least_tokens("a" * 100_000) == 0
