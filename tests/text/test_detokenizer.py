"""Incremental detokenization against whole decodes; stop strings against a search of the whole text."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_tokenizers import byte_fallback, byte_level, metaspace

from llmctl.text.detokenizer import IncrementalDetokenizer, StopChecker
from llmctl.text.tokenizer import Tokenizer

KINDS = {"byte_level": byte_level, "byte_fallback": byte_fallback, "metaspace": metaspace}
IDS = st.lists(st.integers(0, 345), max_size=24)
TEXTS = st.text(st.sampled_from("the fox dog世界你好😀é🇩 \n.x"), max_size=20)


def pushed(tokenizer: Tokenizer, prompt: list[int], ids: list[int], skip: bool) -> str:
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, skip)
    return "".join([detokenizer.push(i) for i in ids]) + detokenizer.flush()


def begun(tokenizer: Tokenizer, prompt: list[int], skip: bool) -> str:
    """The prompt's text, without the replacement of a character that its end leaves unfinished."""
    detokenizer = IncrementalDetokenizer(tokenizer, [], skip)
    return "".join([detokenizer.push(i) for i in prompt])


def valid_fallback_ids() -> st.SearchStrategy[list[int]]:
    """Ids whose byte tokens spell whole characters: words and special tokens between them."""
    tokenizer = byte_fallback()
    character = st.sampled_from(" aé世😀\n▁").map(
        lambda c: [tokenizer.token_to_id(f"<0x{byte:02X}>") or 0 for byte in c.encode()]
    )
    words = [i for i in range(tokenizer.vocab_size + 2) if not 5 <= i < 261]
    return st.lists(character | st.sampled_from(words).map(lambda i: [i]), max_size=12).map(
        lambda pieces: [i for piece in pieces for i in piece]
    )


@given(prompt=IDS, ids=IDS, skip=st.booleans())
def test_byte_level_equals_the_whole_decode_for_any_ids(prompt: list[int], ids: list[int], skip: bool) -> None:
    tokenizer = byte_level()
    whole = tokenizer.decode(prompt + ids, skip_special_tokens=skip)
    head = begun(tokenizer, prompt, skip)
    assert whole.startswith(head)
    assert pushed(tokenizer, prompt, ids, skip) == whole[len(head) :]


@given(prompt=IDS, ids=IDS, skip=st.booleans())
def test_metaspace_equals_the_whole_decode_for_any_ids(prompt: list[int], ids: list[int], skip: bool) -> None:
    tokenizer = metaspace()
    whole = tokenizer.decode(prompt + ids, skip_special_tokens=skip)
    head = tokenizer.decode(prompt, skip_special_tokens=skip)
    assert pushed(tokenizer, prompt, ids, skip) == whole[len(head) :]


@given(ids=valid_fallback_ids(), at=st.integers(0, 20), skip=st.booleans())
def test_byte_fallback_equals_the_whole_decode_of_valid_bytes(ids: list[int], at: int, skip: bool) -> None:
    """Of a run of byte tokens that is not UTF-8 as a whole, tokenizers replaces every byte. That cannot be known while
    the run goes on, so characters are released as they complete; hence valid bytes only, the prompt's end apart."""
    tokenizer = byte_fallback()
    prompt, ids = ids[:at], ids[at:]
    whole = tokenizer.decode(prompt + ids, skip_special_tokens=skip)
    head = begun(tokenizer, prompt, skip)
    assert whole.startswith(head)
    assert pushed(tokenizer, prompt, ids, skip) == whole[len(head) :]


@given(prompt=TEXTS, text=TEXTS)
@pytest.mark.parametrize("kind", KINDS)
def test_real_text_comes_back(kind: str, prompt: str, text: str) -> None:
    tokenizer = KINDS[kind]()
    head, ids = tokenizer.encode(prompt, add_special_tokens=False), tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.decode(head + ids)
    assert pushed(tokenizer, head, ids, True) == whole[len(tokenizer.decode(head)) :]


@given(ids=IDS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_push_ever_ends_in_half_a_character(kind: str, ids: list[int]) -> None:
    """What has been pushed is always a beginning of what will have been pushed."""
    detokenizer = IncrementalDetokenizer(KINDS[kind](), [])
    seen = ""
    for token_id in ids:
        seen += detokenizer.push(token_id)
    assert pushed(KINDS[kind](), [], ids, True).startswith(seen)


def test_a_character_spread_over_tokens_appears_with_its_last_byte() -> None:
    tokenizer = byte_fallback()
    ids = [tokenizer.token_to_id(f"<0x{b:02X}>") or 0 for b in "😀".encode()]
    detokenizer = IncrementalDetokenizer(tokenizer, [])
    assert [detokenizer.push(i) for i in ids] == ["", "", "", "😀"]
    assert [detokenizer.push(i) for i in ids[:2]] == ["", ""]
    assert detokenizer.flush() == "\ufffd"


def test_invalid_bytes_do_not_hold_up_what_follows_them() -> None:
    tokenizer = byte_fallback()
    bad = tokenizer.token_to_id("<0xFF>") or 0
    letter = tokenizer.token_to_id("a") or 0
    detokenizer = IncrementalDetokenizer(tokenizer, [])
    assert detokenizer.push(bad) == "\ufffd"
    assert detokenizer.push(letter) == "a"


def test_a_character_begun_in_the_prompt_is_completed() -> None:
    tokenizer = byte_fallback()
    ids = [tokenizer.token_to_id(f"<0x{b:02X}>") or 0 for b in "世".encode()]
    assert pushed(tokenizer, ids[:2], ids[2:], True) == "世"


@pytest.mark.parametrize(
    ("prompt", "expected"), [([], "fox"), (["<s>"], "fox"), (["dog"], " fox"), (["<0x41>"], " fox")]
)
def test_leading_space_depends_on_what_the_prompt_shows(prompt: list[str], expected: str) -> None:
    tokenizer = byte_fallback()
    head = [tokenizer.token_to_id(t) or 0 for t in prompt]
    assert pushed(tokenizer, head, [tokenizer.token_to_id("▁fox") or 0], True) == expected


def test_special_tokens_are_shown_on_request() -> None:
    tokenizer = byte_level()
    ids = [*tokenizer.encode("fox"), tokenizer.token_to_id("<|im_end|>") or 0]
    assert pushed(tokenizer, [], ids, True) == "fox"
    assert pushed(tokenizer, [], ids, False) == "fox<|im_end|>"


def test_unknown_ids_yield_nothing() -> None:
    assert pushed(byte_level(), [], [10_000, *byte_level().encode("fox")], True) == "fox"


# -- stop strings ---------------------------------------------------------------------------------------------

LETTERS = st.text("ab", max_size=12)
STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


def whole_search(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The match that completes first; the longest of those."""
    for end in range(1, len(text) + 1):
        found = [s for s in stops if text[:end].endswith(s)]
        if found:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def cut(text: str, sizes: list[int]) -> list[str]:
    pieces = []
    for size in sizes:
        pieces.append(text[:size])
        text = text[size:]
    return [*pieces, text]


@given(text=LETTERS, stops=STOPS, include=st.booleans(), sizes=st.lists(st.integers(0, 4), max_size=8))
def test_stops_are_found_however_the_text_is_cut(text: str, stops: list[str], include: bool, sizes: list[int]) -> None:
    checker = StopChecker(tuple(stops), include)
    released, match = "", None
    for piece in cut(text, sizes):
        more, match = checker.push(piece)
        released += more
        if match is not None:
            break
    else:
        released += checker.flush()
    assert (released, match) == whole_search(text, stops, include)


@given(text=LETTERS, stops=STOPS)
def test_only_what_may_become_a_stop_is_held_back(text: str, stops: list[str]) -> None:
    checker = StopChecker(tuple(stops))
    released, match = checker.push(text)
    if match is None:
        held = text[len(released) :]
        assert text.startswith(released)
        assert held == "" or any(s.startswith(held) and s != held for s in stops)


def test_stop_string_over_characters_of_many_bytes() -> None:
    checker = StopChecker(("。\n",))
    assert checker.push("你好。") == ("你好", None)
    assert checker.push("x") == ("。x", None)
    assert checker.push("。") == ("", None)
    assert checker.push("\nmore") == ("", "。\n")


def _kinds() -> list[Callable[[], Tokenizer]]:
    return list(KINDS.values())


@pytest.mark.parametrize("make", _kinds())
def test_token_bytes_concatenate_to_the_text(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    ids = tokenizer.encode("The fox. 世界 😀", add_special_tokens=False)
    data = tokenizer.first_token_bytes(ids[0]) + b"".join(tokenizer.token_bytes(i) for i in ids[1:])
    assert data.decode() == tokenizer.decode(ids)
