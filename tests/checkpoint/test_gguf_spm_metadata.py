"""Sentencepiece's tokenizers as GGUF's scores: the same tokens and texts after reading them back, or a refusal."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from gguf_files import tokenizer_keys
from hypothesis import given, settings
from hypothesis import strategies as st
from spm_vocabulary import LETTERS, PIECES, SPECIAL, USER_DEFINED, spm_vocabulary

from llmctl.checkpoint.gguf_spm_metadata import check_same_merges, scores
from llmctl.checkpoint.gguf_tokenizer import synthesise_aux_files
from llmctl.checkpoint.gguf_tokenizer_metadata import tokenizer_metadata
from llmctl.checkpoint.gguf_vocabulary import BYTE, CONTROL, UNKNOWN
from llmctl.checkpoint.gguf_vocabulary import USER_DEFINED as DEFINED
from llmctl.errors import UnsupportedModelError, UsageError
from llmctl.text.tokenizer import Tokenizer

Files = dict[str, bytes]
Edit = Callable[[dict[str, Any]], None]
ROWS = len(spm_vocabulary()["list"])
TEXTS = st.lists(
    st.sampled_from([*PIECES, *LETTERS, *USER_DEFINED, *SPECIAL, " ", "  ", " the", "../", "é", "界", "<0x0A>", "\n"]),
    max_size=14,
).map("".join)


def files(edit: Edit = lambda _: None, **changes: Any) -> Files:
    """A tokenizer's files, of a vocabulary with scores; ``edit`` changes its tokenizer.json."""
    made = synthesise_aux_files(tokenizer_keys(spm_vocabulary(**changes)), "a test")
    document = json.loads(made["tokenizer.json"])
    edit(document)
    return {**made, "tokenizer.json": json.dumps(document).encode()}


def keys(given: Files, rows: int = ROWS) -> dict[str, Any]:
    return tokenizer_metadata(given, rows, "a test")


def read_back(metadata: dict[str, Any]) -> Tokenizer:
    names = {"tokens": "list", "token_type": "types", "scores": "token_scores"}
    facts = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    return Tokenizer.from_files(
        synthesise_aux_files(tokenizer_keys({names.get(k, k): v for k, v in facts.items()}), "x")
    )


def before_and_after(source: Files, rows: int = ROWS) -> tuple[Tokenizer, Tokenizer]:
    return Tokenizer.from_files(source), read_back(keys(source, rows))


PAIRS = {prefix: before_and_after(files(add_space_prefix=prefix)) for prefix in (True, False)}


@settings(max_examples=150, deadline=None)
@given(TEXTS, st.booleans())
def test_the_same_tokens_and_texts(text: str, prefix: bool) -> None:
    before, after = PAIRS[prefix]
    assert after.encode(text) == before.encode(text)
    assert after.decode(before.encode(text)) == before.decode(before.encode(text))


def test_what_is_written() -> None:
    made = keys(files())
    assert (made["tokenizer.ggml.model"], made["tokenizer.ggml.pre"]) == ("llama", "default")
    assert made["tokenizer.ggml.add_space_prefix"] is True
    assert made["tokenizer.ggml.add_bos_token"] is True
    kinds = dict(zip(made["tokenizer.ggml.tokens"], made["tokenizer.ggml.token_type"], strict=True))
    assert (kinds["<unk>"], kinds["<s>"], kinds["<0x0A>"], kinds["<tool>"]) == (UNKNOWN, CONTROL, BYTE, DEFINED)
    of = dict(zip(made["tokenizer.ggml.tokens"], made["tokenizer.ggml.scores"], strict=True))
    ranks = [of[piece] for piece in PIECES if len(piece) > 1]
    assert ranks == sorted(ranks, reverse=True)
    assert keys(files(add_space_prefix=False))["tokenizer.ggml.add_space_prefix"] is False


def test_tokens_whose_merges_take_turns_share_a_score() -> None:
    merges = [("a", "b"), ("x", "yz"), ("p", "q"), ("xy", "z"), ("m", "n")]
    assert scores(merges, ["ab", "xyz", "pq", "mn", "a"]) == [0.0, -1.0, -1.0, -4.0, -5.0]


def gemma_stages(document: dict[str, Any]) -> None:
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    document.update(normalizer=document["normalizer"]["normalizers"][0], pre_tokenizer=split)


def tab_by_its_character(document: dict[str, Any]) -> None:
    vocabulary = document["model"]["vocab"]
    vocabulary["\t"] = vocabulary.pop("<0x09>")


def merges_of_what_is_cut_out(document: dict[str, Any]) -> None:
    document["model"]["vocab"]["\n"] = ROWS
    document["model"]["merges"].insert(3, ["\n", "\n"])


@pytest.mark.parametrize(
    ("edit", "rows"),
    [
        (gemma_stages, ROWS),
        (tab_by_its_character, ROWS),
        (merges_of_what_is_cut_out, ROWS + 1),
        (gemma_stages, ROWS + 3),
    ],
)
def test_gemmas_spelling_is_read_back_the_same(edit: Edit, rows: int) -> None:
    before, after = before_and_after(files(edit, add_space_prefix=edit is not gemma_stages), rows)
    for text in ("a\tb\t\tthe", "fox\n\n\nthe\n", "  the ../../fox  ▁▁ "):
        ids = before.encode(text)
        assert after.encode(text) == ids
        assert after.decode(ids) == before.decode(ids)


def metaspace(document: dict[str, Any]) -> None:
    document["normalizer"] = None
    document["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}


def model(**changes: Any) -> Edit:
    return lambda document: document["model"].update(changes)


def word_pieces(document: dict[str, Any]) -> None:
    given = {"unk_token": "<unk>", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    document["model"] = {"type": "WordPiece", **given, "vocab": document["model"]["vocab"]}


def reordered(document: dict[str, Any]) -> None:
    merges = document["model"]["merges"]
    merges.remove(["▁q", "u"])
    merges.insert(merges.index(["f", "o"]) + 1, ["▁q", "u"])


def one_way_less(document: dict[str, Any]) -> None:
    document["model"]["merges"].remove(["▁t", "he"])


def another_bos(document: dict[str, Any]) -> None:
    document["post_processor"]["single"][0]["SpecialToken"]["id"] = "</s>"
    document["post_processor"]["special_tokens"] = {"</s>": {"id": "</s>", "ids": [2], "tokens": ["</s>"]}}
    document["post_processor"]["pair"] = document["post_processor"]["single"] + [
        {"Sequence": {"id": "B", "type_id": 1}}
    ]


def without_a_byte(document: dict[str, Any]) -> None:
    vocabulary = document["model"]["vocab"]
    vocabulary["spare"] = vocabulary.pop("<0xFF>")


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (metaspace, "Metaspace puts a space before the first word"),
        (model(ignore_merges=True), "ignore_merges True"),
        (word_pieces, "its model is WordPiece, not BPE"),
        (lambda d: d["normalizer"]["normalizers"].append({"type": "NFKC"}), r"\(Prepend, Replace, NFKC\) are not"),
        (lambda d: d.update(decoder={"type": "Fuse"}), "would be written out otherwise"),
        (reordered, "in an order that no scores stand for"),
        (one_way_less, "does not join '▁t' and 'he', unlike any scores"),
        (without_a_byte, "without a byte token '<0xFF>'"),
        (another_bos, r"adds \[2\] where its BOS token would be"),
    ],
)
def test_what_would_be_read_as_another_is_refused(edit: Edit, said: str) -> None:
    with pytest.raises(UsageError, match=f"GGUF is not written for this tokenizer: .*{said}"):
        keys(files(edit))


@pytest.mark.parametrize(
    ("role", "said"),
    [("bos_token", "its BOS token is None, and readers would take '<s>' for it"), ("eos_token", "no token ends a gen")],
)
def test_a_role_that_readers_would_make_up_is_refused(role: str, said: str) -> None:
    made = files(lambda d: d.update(post_processor=None))
    config = json.loads(made["tokenizer_config.json"])
    made |= {"tokenizer_config.json": json.dumps({**config, role: None}).encode(), "generation_config.json": b"{}"}
    with pytest.raises(UsageError, match=said):
        keys(made)


def test_merges_are_compared_both_ways() -> None:
    with pytest.raises(UnsupportedModelError, match="its BPE joins 'a' and 'b'"):
        check_same_merges([("a", "b")], [])
    check_same_merges([("a", "bc"), ("ab", "c")], [("ab", "c"), ("a", "bc")])
