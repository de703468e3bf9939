"""The tokens that end a generation, read without the tokenizer, are the tokenizer's."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from fixtures import make_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmctl.errors import CheckpointError
from llmctl.text import end_tokens
from llmctl.text.end_tokens import end_token_ids
from llmctl.text.tokenizer import Tokenizer

WORDS = ["<a>", "<b>", "<c>", "the", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(found)
    return found


def edited(folder: Path, output: Path, **changes: Any) -> Path:
    """A copy with other members of ``tokenizer.json`` and ``tokenizer_config.json`` (``eos``)."""
    output.mkdir(exist_ok=True)
    stored = json.loads((folder / "tokenizer.json").read_text())
    eos = changes.pop("eos", "<|im_end|>")
    (output / "tokenizer.json").write_text(json.dumps({**stored, **changes}))
    (output / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    (output / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 11]}))
    return output


def added(content: str, number: int) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": number, "content": content, **flags}


def test_they_are_read_without_the_tokenizer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Tokenizer.from_folder(folder).eos_token_ids
    assert expected
    monkeypatch.setattr(end_tokens, "_read_whole", lambda _: pytest.fail("the tokenizer is read"))
    assert end_token_ids(folder) == expected
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert end_token_ids(folder) == expected


@settings(max_examples=60, deadline=None)
@example(tokens=[("<b>", 0), ("<b>", 0), ("<a>", 0)], consecutive=True, eos="<a>")
@given(
    tokens=st.lists(st.tuples(st.sampled_from(WORDS), st.integers(0, 6)), max_size=5),
    consecutive=st.booleans(),
    eos=st.sampled_from([*WORDS, "<|im_end|>", "nowhere", None]),
)
def test_they_are_the_tokenizers(
    tmp_path_factory: pytest.TempPathFactory,
    folder: Path,
    tokens: list[tuple[str, int]],
    consecutive: bool,
    eos: str | None,
) -> None:
    """However added tokens are numbered: the library numbers some of them anew."""
    size = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])
    more = [added(word, size + (i if consecutive else n)) for i, (word, n) in enumerate(tokens)]
    found = edited(folder, tmp_path_factory.mktemp("edited"), added_tokens=more, eos=eos)
    assert end_token_ids(found) == Tokenizer.from_folder(found).eos_token_ids


def test_a_vocabulary_that_is_a_list(folder: Path, tmp_path: Path) -> None:
    pieces = [["<unk>", 0.0], ["<|im_end|>", 0.0], ["a", -1.0]]
    model = {"type": "Unigram", "unk_id": 0, "vocab": pieces, "byte_fallback": False}
    found = edited(folder, tmp_path, model=model, added_tokens=[], pre_tokenizer=None, decoder=None)
    assert end_token_ids(found) == Tokenizer.from_folder(found).eos_token_ids == {1, 7, 11}


def test_what_is_damaged_is_refused_as_by_the_tokenizer(folder: Path, tmp_path: Path) -> None:
    found = edited(folder, tmp_path)
    (found / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not understood"):
        end_token_ids(found)
