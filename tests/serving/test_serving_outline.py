"""A body's outline counts as the parser of its fields would find, and never fails."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmctl.serving.outline import Outline


@pytest.mark.parametrize("separators", [(",", ":"), (" , ", " :  ")])
@pytest.mark.parametrize(
    ("prompt", "count"),
    [("a[,", 1), ([5, 6], 1), (["a", "b,["], 2), ([[5], [6, 7], [8]], 3), ([[]], 1), ([[5]] * 9000, 9000), ([-1], 1)],
)
def test_prompts(prompt: Any, count: int, separators: tuple[str, str]) -> None:
    body = json.dumps({"prompt": prompt, "n": 3}, separators=separators).encode()
    assert Outline(body).prompts() == count
    assert Outline(body).sequences() == 3 * count
    assert Outline(body.replace(b"prompt", b"input")).prompts("input") == count


def test_n_out_of_its_range_is_for_others_to_refuse() -> None:
    for n in (0, -4, 129, 10**400, "3", 2.5, None, [2]):
        assert Outline(json.dumps({"prompt": [[5]] * 7, "n": n}).encode()).sequences() == 7


def test_ids_and_items() -> None:
    outline = Outline(
        b'{"tokens": [ 1, 2,3 ], "messages": [{}, {"a": [1, 2]}], "prompt": [ -1 ], "input": "[1,2]", "stop": []}'
    )
    assert [outline.ids(name) for name in ("tokens", "prompt", "messages", "input", "stop", "n")] == [3, 1, 0, 0, 0, 0]
    assert [outline.count(name) for name in ("tokens", "messages", "input", "stop", "n")] == [3, 2, 0, 0, 0]
    assert outline.has("messages")
    assert not outline.has("n")


@pytest.mark.parametrize("texts", [["a", ""], ['"', "\\", '\\"', "\\\\"], ["\\u0022", "x\n", ","], []], ids=str)
def test_strings(texts: list[str]) -> None:
    outline = Outline(json.dumps({"stop": texts, "prompt": "a", "tokens": [1], "messages": [{"a": "b"}]}).encode())
    assert outline.strings("stop") == len(texts)
    assert [outline.strings(name) for name in ("prompt", "tokens", "messages", "n")] == [0, 0, 0, 0]


@pytest.mark.parametrize("separators", [(",", ":"), (" , ", " :  ")])
def test_members(separators: tuple[str, str]) -> None:
    body = {"logit_bias": {str(i): -1.5 for i in range(700)}, "stop": {}, "model": "{a:b}", "input": {"a": {"b": 1}}}
    outline = Outline(json.dumps(body, separators=separators).encode())
    assert [outline.members(name) for name in ("logit_bias", "stop", "model", "n")] == [700, 0, 0, 0]
    assert outline.members("input") >= 1


@pytest.mark.parametrize(
    "body", [b"", b"[1]", b'"x"', b"{", b"\xff", b'{"prompt": [[', b'{"a":' + b"[" * 10**5, b"nan"]
)
def test_what_is_no_object_asks_for_nothing(body: bytes) -> None:
    outline = Outline(body)
    assert (outline.count("prompt"), outline.ids("prompt"), outline.sequences(), outline.has("n")) == (0, 0, 1, False)


def test_what_is_nested_too_deep_counts_as_nothing() -> None:
    outline = Outline(b'{"prompt": [[' + b"[" * 400 + b"]" * 400 + b"]]}")
    assert outline.count("messages") == 0
    assert outline.sequences() >= 1


LETTERS = st.text(st.sampled_from('a\\"\n\x04éÿ\u20ac\U0001f600\ud7ff')).map(lambda text: text * 3)


@given(LETTERS, st.integers(1, 80), st.booleans())
def test_the_beginning_of_a_text_is_one(text: str, size: int, ascii_only: bool) -> None:
    data = json.dumps(text, ensure_ascii=ascii_only).encode()
    found = Outline(b'{"prompt": ' + data + b"}").beginning("prompt", size)
    assert text.startswith(found)
    if len(data) <= size:
        assert found == ""
    else:
        assert len(json.dumps(found, ensure_ascii=ascii_only).encode()) - 2 > size - 14


def test_what_is_no_text_has_no_beginning() -> None:
    for value in (b"[1, 2, 3]", b"null", b"12345", b'{"a": "bcd"}'):
        assert Outline(b'{"prompt": ' + value + b"}").beginning("prompt", 2) == ""
    assert Outline(b"{}").beginning("prompt", 2) == ""
    assert Outline(b'{"prompt": "ab\\q-------"}').beginning("prompt", 10) == ""
